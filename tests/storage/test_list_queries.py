"""Lists of repositories are read in pages, from one small table, whatever the names are."""

import random
import sqlite3
from contextlib import closing
from functools import partial

import pytest

from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_MANIFEST, Manifest
from proxy.oci.reference import Repository, Tag
from proxy.storage import list_queries
from proxy.storage.image_queries import ImageQueries
from proxy.storage.index import Index
from tests.storage.test_query_plans import traced

# Of one page of a repository.
SMALL_SCANS = ("SCAN (subquery-", "SCAN e")

_rng = random.Random(3)
_PARTS = ["library", "lib", "librarz", "nginx", "app", "app2", "z", "a", "l"]


def pull_name(repository: Repository) -> str:
    if repository.upstream == "docker.io":
        return repository.name
    return f"{repository.upstream}/{repository.name}"


@pytest.fixture
async def repositories(index):
    """Repositories of three upstreams with an image each, and some that only have a blob."""
    made = set()
    for _ in range(120):
        upstream = _rng.choice(["docker.io", "docker.io", "ghcr.io", "quay.io"])
        parts = [_rng.choice(_PARTS) for _ in range(_rng.randint(1, 3))]
        if upstream == "docker.io" and len(parts) == 1:
            parts = ["library", *parts]
        made.add(Repository(upstream, "/".join(parts)))
    for number, repository in enumerate(sorted(made, key=str)):
        digest = Digest.from_content(str(number).encode())
        await index.add_manifest(repository, digest, 1, Manifest(OCI_MANIFEST, (), None, "", {}))
        blob = Digest.from_content(f"blob {number}".encode())
        await index.add_blob(Repository("docker.io", f"no/images{number}"), blob, 1)
    return made


def is_allowed(repository: Repository) -> bool:
    return repository.upstream != "quay.io" and "app2" not in repository.name


async def list_page(index: Index, after: str, count: int) -> list[Repository]:
    return await index.read(
        lambda connection: list_queries.list_repositories(connection, after, count, is_allowed)
    )


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_pages_of_repositories_follow_each_other_by_name(index, repositories, size):
    expected = sorted(filter(is_allowed, repositories), key=pull_name)
    found: list[Repository] = []
    while page := await list_page(index, pull_name(found[-1]) if found else "", size):
        found += page
    assert found == expected


@pytest.mark.parametrize("terms", [[], ["app"], ["a"], ["z", "lib"], ["nginx"], ["none"], ["/"]])
@pytest.mark.parametrize("upstream", [None, "docker.io", "ghcr.io"])
@pytest.mark.parametrize("unrestricted", [["ghcr.io"], []])
async def test_a_search_finds_what_a_look_at_every_name_finds(
    index, repositories, terms, upstream, unrestricted
):
    def may_be_found(repository: Repository) -> bool:
        return repository.upstream in unrestricted or is_allowed(repository)

    expected = sorted(
        (
            repository
            for repository in repositories
            if may_be_found(repository)
            and upstream in (None, repository.upstream)
            and all(term in display_name(repository) for term in terms)
        ),
        key=lambda one: ("/" in display_name(one), display_name(one)),
    )
    for offset in range(0, len(expected) + 7, 7):
        search = partial(
            list_queries.search_repositories,
            terms=terms,
            upstream=upstream,
            offset=offset,
            count=7,
            is_allowed=is_allowed,
            unrestricted=unrestricted,
        )
        assert await index.read(search) == (expected[offset : offset + 7], len(expected))


async def test_lists_and_searches_read_the_catalog_alone_in_its_order(index, repositories):
    statements: list[str] = []

    def run(connection: sqlite3.Connection) -> None:
        with traced(connection) as seen:
            list_queries.list_repositories(connection, "m", 10, is_allowed)
            list_queries.search_repositories(
                connection,
                ["a"],
                "docker.io",
                offset=5,
                count=5,
                is_allowed=is_allowed,
                unrestricted=["docker.io", "ghcr.io", "quay.io"],
            )
        statements.extend(seen)

    await index.read(run)
    assert len(statements) >= 4
    with closing(sqlite3.connect(index.path)) as connection:
        for statement in statements:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
            text = " ".join(plan)
            assert "TEMP B-TREE" not in text, statement
            if "FROM catalog" in statement:
                assert "links" not in text
                assert "repositories" not in text
            else:
                # The upstreams, one at a time.
                assert "SCAN repositories" not in text


async def test_tags_and_images_are_read_in_the_order_of_their_indexes(index, repositories):
    repository = next(iter(repositories))
    statements: list[str] = []

    def run(connection: sqlite3.Connection) -> None:
        with traced(connection) as seen:
            list_queries.list_tags(connection, repository, 10)
            images = ImageQueries(connection).images()
            for _ in range(3):
                next(images)
        statements.extend(seen)

    await index.read(run)
    assert len(statements) >= 3
    with closing(sqlite3.connect(index.path)) as connection:
        for statement in statements:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
            scans = {step for step in plan if step.startswith("SCAN")}
            assert all(step.startswith(SMALL_SCANS) for step in scans), statement


async def test_an_image_is_known_to_be_held_from_one_of_its_many_names(index):
    """An image that a registry has tagged a thousand times must not cost a thousand rows."""
    app, manifest = Repository("docker.io", "library/app"), Digest.from_content(b"manifest")
    await index.add_manifest(app, manifest, 7, Manifest(OCI_MANIFEST, (), None, "", {}))
    for number in range(1000):
        await index.set_tag(app, Tag(f"v{number}"), manifest)
    rows = 0

    def count_rows(connection: sqlite3.Connection) -> tuple[int, int]:
        nonlocal rows
        queries = ImageQueries(connection)
        read = queries._root_references

        def read_and_count(digest: str, limit: int = -1) -> list[tuple[int, str]]:
            nonlocal rows
            found = read(digest, limit)
            rows += len(found)
            return found

        queries._root_references = read_and_count  # type: ignore[method-assign]
        image = next(one for one in queries.images() if one.reference == "v5")
        return queries.image_sizes(image)

    assert await index.read(count_rows) == (7, 0)
    assert rows <= 2
