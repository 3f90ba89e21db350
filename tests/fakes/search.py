"""The search of a fake registry, as index.docker.io offers it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from tests.fakes.faults import Reply


@dataclass(frozen=True, slots=True)
class ListedRepository:
    """A repository in the search index. Official images are listed without `library/`."""

    name: str
    description: str = ""
    stars: int = 0
    official: bool = False


def search(catalogue: Sequence[ListedRepository], request: web.BaseRequest) -> Reply:
    """Respond to GET /v1/search: names that contain the query, the most stars first."""
    terms, page = request.query.get("q", ""), int(request.query.get("page", 1))
    size = int(request.query.get("n", 25))
    if not terms or not 1 <= size <= 100:
        return Reply(400, {"Content-Type": "text/plain"}, b"bad request\n")
    found = sorted((one for one in catalogue if terms in one.name), key=lambda one: -one.stars)
    document = {
        "num_pages": -(-len(found) // size),
        "num_results": len(found),
        "page": page,
        "page_size": size,
        "query": terms,
        "results": [
            {
                "name": one.name,
                "description": one.description,
                "star_count": one.stars,
                "is_official": one.official,
                "is_automated": False,
                "is_trusted": False,
            }
            for one in found[(page - 1) * size : page * size]
        ],
    }
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(document).encode())
