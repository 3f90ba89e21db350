"""The table of spellings in the documentation, against the router."""

import pytest

from proxy.config import UpstreamSettings
from proxy.config.values import RegistryUrl
from proxy.errors import ProxyError, error_outcome
from proxy.server.registry.router import Router
from proxy.server.request import Request
from tests.support.markdown import read, rows

URL = RegistryUrl("https://registry.example")
ROUTER = Router(
    {
        "docker.io": UpstreamSettings(url=URL, deny=("corp/*",)),
        "ghcr.io": UpstreamSettings(url=URL, hosts=("ghcr.test",)),
        "harbor.test": UpstreamSettings(url=URL),
        "registry.test:5000": UpstreamSettings(url=URL),
    }
)
HEADER = ("path after `/v2/`", "`ns`", "`Host`", "result")
ROWS = rows(read("docs/configuration.md"), *HEADER)
REASONS = {
    "not configured": "is not configured",
    "denied": "does not allow",
    "no such repository at docker.io": "docker.io has no repository",
    "named twice": "more than once",
    "invalid name": "is not a repository name",
}


def target(path: str, namespaces: str) -> str:
    """Return the target of a request for a manifest, as a row of the table describes it."""
    values = {"none": [], "empty": [""]}.get(namespaces, namespaces.replace("`", "").split(" and "))
    query = "&".join(f"ns={value}" for value in values)
    return f"/v2/{path.strip('`')}/manifests/1" + (f"?{query}" if values else "")


def test_the_table_has_each_way_to_name_an_upstream_and_each_refusal():
    results = [row[3] for row in ROWS]
    assert len(ROWS) > 40
    assert {"`harbor.test`", "`ghcr.io` and `docker.io`"} <= {row[1] for row in ROWS}
    assert {"none", "`ghcr.test`"} <= {row[2] for row in ROWS}
    assert {one.partition(", ")[2] for one in results if ", " in one} == set(REASONS)


@pytest.mark.parametrize(("path", "namespaces", "host", "result"), ROWS)
def test_a_spelling_means_what_the_documentation_says(path, namespaces, host, result):
    headers = {"host": "127.0.0.1:5000" if host == "none" else host.strip("`")}
    request = Request("GET", target(path, namespaces), headers)

    def parse() -> str:
        namespace = request.query.get("ns")
        repository = ROUTER.parse(request.path, namespace, request.headers["host"]).repository
        return f"{repository.upstream}: `{repository.name}`"

    status, _, reason = result.partition(", ")
    if not reason:
        assert parse() == result
        return
    with pytest.raises(ProxyError, match=REASONS[reason]) as raised:
        parse()
    assert error_outcome(raised.value).status == int(status)
