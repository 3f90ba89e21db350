"""`export --facts`: what a cache knows about its images lets another one judge them without a network."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from proxy.bundle.facts import (
    BundledRepository,
    BundleFacts,
    ImageAge,
    encode_facts,
    parse_facts,
)
from proxy.errors import BundleError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.policy.facts import Badge, RepositoryFacts
from tests.fakes.faults import Fault
from tests.fakes.hub import FakeHub, HubRepository
from tests.support.admin_api import inspect_image
from tests.support.bundles import (
    build_layout,
    export_bundle,
    import_bundle,
    pull_all_platforms,
    unpack_tar,
)
from tests.support.commands import run_on
from tests.support.program import Program

FILE = "pullcache.facts.json"
DAY = 86_400.0
RULE = {
    "images": ["*"],
    "mode": "enforce",
    "trusted": ["official", "verified_publisher"],
    "min_age": "3d",
}
DIGEST = "sha256:" + "a" * 64

MakeProgram = Callable[..., Awaitable[Program]]


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    async with FakeHub() as hub:
        hub.repositories += [
            HubRepository("grafana/grafana", "verified_publisher", "Grafana Labs", "graphs", 5, 6),
            HubRepository("acme/app"),
        ]
        yield hub


@pytest.fixture
def start(registry, hub, make_program, tmp_path) -> MakeProgram:
    """Return a function that starts a program with a store of its own and one policy."""

    async def start(name: str = "here", *, offline: bool = False, **keys: Any) -> Program:
        upstream = {"url": registry.url, "facts_url": hub.url}
        program: Program = await make_program(
            tmp_path / name,
            upstreams={"docker.io": upstream},
            offline=offline,
            policy=[{**RULE, **keys}],
        )
        return program

    return start


# In another cache.


async def test_a_trusted_image_is_served_offline_in_another_cache_and_others_are_not(
    registry, hub, start
):
    here = await start(mode="audit")
    grafana, refused = registry.add_image("grafana/grafana"), registry.add_image("acme/app")
    for image in (grafana, refused):
        await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "grafana/grafana", "acme/app", facts=True)
    other = await start("other", offline=True)
    hub.log.requests.clear()
    report = await import_bundle(other, bundle)
    assert report["facts"] == 2
    await other.pull(grafana)
    for reference in ("latest", refused.digest):
        answer = await other.manifest(refused, reference)
        assert answer.status == 403
        assert (
            "neither official, nor of a verified publisher" in answer.json["errors"][0]["message"]
        )
    await other.restart()
    await other.pull(grafana)
    assert not hub.requests


async def test_without_facts_an_import_works_and_nothing_is_known_of_the_publisher(registry, start):
    here = await start(mode="audit")
    grafana, nginx = registry.add_image("grafana/grafana"), registry.add_image("library/nginx")
    for image in (grafana, nginx):
        await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "grafana/grafana", "nginx")
    other = await start("other", offline=True)
    report = await import_bundle(other, bundle)
    assert report["facts"] is None
    assert all(not image["missing"] and not image["reason"] for image in report["images"])
    await other.pull(nginx)
    assert (await other.manifest(grafana)).status == 503


async def test_an_image_of_a_bundle_without_facts_is_of_unknown_age(registry, start):
    here = await start(mode="audit")
    image = registry.add_image("library/nginx")
    await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "nginx")
    strict = await start("strict", offline=True, first_seen="deny")
    await import_bundle(strict, bundle)
    answer = await strict.manifest(image)
    assert answer.status == 403
    assert "imported without facts" in answer.json["errors"][0]["message"]
    strict.clock.advance(3 * DAY)
    await strict.pull(image)


async def test_a_tag_that_a_bundle_without_facts_moves_goes_on_meaning_what_it_meant(
    registry, start
):
    here, other = await start(mode="audit"), await start("other")
    old = registry.add_image("library/nginx")
    await other.pull(old)
    new = registry.add_image("library/nginx", layers=[b"new"])
    await pull_all_platforms(here, new)
    await other.restart(offline=True)
    other.clock.advance(10)
    await import_bundle(other, await export_bundle(here, "nginx"))
    assert (await other.manifest(new)).digest == old.digest
    other.clock.advance(3 * DAY)
    assert (await other.manifest(new)).digest == new.digest


async def test_the_age_of_an_image_comes_with_it(registry, hub, start):
    here = await start(mode="audit", first_seen="deny")
    image = registry.add_image("library/nginx")
    await pull_all_platforms(here, image)
    here.clock.advance(DAY)
    bundle = await export_bundle(here, "nginx", facts=True)
    other = await start("other", offline=True)
    other.clock.advance(DAY)
    await import_bundle(other, bundle)
    answer = await other.manifest(image)
    assert answer.status == 403
    assert "it is 1d old (first seen elsewhere, says the bundle of " in answer.body.decode()
    other.clock.advance(2 * DAY)
    await other.pull(image)
    hub.pushed["library/nginx", "latest"] = (image.digest, here.clock() - 9 * DAY)
    young = await start("young", first_seen="deny")
    await pull_all_platforms(young, image)
    strict = await start("strict", offline=True, min_age="10d")
    await import_bundle(strict, await export_bundle(young, "nginx", facts=True))
    strict.clock.advance(DAY)
    await strict.pull(image)


async def test_what_was_old_enough_once_is_so_in_another_cache(registry, start):
    here = await start()
    image = registry.add_image("library/nginx", index=True)
    await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "nginx", f"nginx@{image.digest}", facts=True)
    other = await start("other", offline=True, first_seen="deny")
    await import_bundle(other, bundle)
    await other.pull(image)


async def test_inspect_tells_the_source_and_the_age_of_imported_facts(registry, start):
    here = await start(mode="audit")
    image = registry.add_image("grafana/grafana")
    await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "grafana/grafana", facts=True)
    other = await start("other", offline=True)
    other.clock.advance(40 * DAY)
    await import_bundle(other, bundle)
    detail = await inspect_image(other, "grafana/grafana")
    assert detail["trust"]["badge"] == "verified_publisher"
    assert detail["trust"]["source"].startswith("bundle of 20")
    assert detail["trust"]["publisher"] == "Grafana Labs"
    assert detail["trust"]["asked"] <= here.clock()
    assert detail["history"][0]["source"] == detail["trust"]["source"]
    assert detail["policy"]["is_allowed"]


async def test_facts_of_a_bundle_do_not_replace_newer_ones_of_docker_hub(registry, hub, start):
    here, other = await start(mode="audit"), await start("other", mode="audit")
    image = registry.add_image("grafana/grafana")
    await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "grafana/grafana", facts=True)
    other.clock.advance(DAY)
    hub.repositories[0].badge = None
    await other.pull(image)
    await import_bundle(other, bundle)
    trust = (await inspect_image(other, "grafana/grafana"))["trust"]
    assert (trust["badge"], trust["source"]) == ("community", "Docker Hub")


async def test_docker_hub_corrects_what_a_bundle_says_also_of_the_future(registry, hub, start):
    builder, digest = build_layout(b"layer", name="docker.io/acme/app:1")
    document = {
        "version": 1,
        "made": 9e10,
        "repositories": [
            {
                "name": "docker.io/acme/app",
                "facts": {"badge": "verified_publisher", "asked": 9e10},
                "images": [{"digest": digest, "tag": "1", "first_seen": 9e10, "pushed": 9e10}],
            }
        ],
    }
    program = await start(mode="audit", min_age="0s")
    registry.add_image("acme/app", tag="1")
    builder.files[FILE] = json.dumps(document).encode()
    await import_bundle(program, builder.to_tar())
    program.clock.advance(2 * DAY)
    answer = await program.manifest("acme/app", "1")
    assert "neither official, nor of a verified publisher" in answer.headers["Warning"]


async def test_what_a_bundle_says_is_checked_at_the_first_pull_with_a_network(registry, hub, start):
    here = await start(mode="audit")
    image = registry.add_image("grafana/grafana")
    await pull_all_platforms(here, image)
    bundle = await export_bundle(here, "grafana/grafana", facts=True)
    other = await start("other", min_age="0s")
    await import_bundle(other, bundle)
    # While Docker Hub does not answer, the bundle counts.
    hub.break_with(Fault(status=500))
    assert (await other.manifest(image)).status == 200
    hub.repair()
    hub.repositories[0].badge = None
    other.clock.advance(3700)
    assert (await other.manifest(image)).status == 403


# The bundle.


async def test_only_with_the_option_a_bundle_has_facts_and_otherwise_the_same_bytes(
    registry, hub, start
):
    here = await start(mode="audit")
    image = registry.add_image("grafana/grafana")
    hub.repositories[0].description = "many\x1b graphs"
    await pull_all_platforms(here, image)
    before = await export_bundle(here, "grafana/grafana")
    here.clock.advance(5 * DAY)
    hub.repositories[0].stars = 99
    await pull_all_platforms(here, image)
    assert await export_bundle(here, "grafana/grafana") == before
    with_facts = unpack_tar(await export_bundle(here, "grafana/grafana", facts=True))
    (repository,) = json.loads(with_facts.pop(FILE))["repositories"]
    assert repository["name"] == "docker.io/grafana/grafana"
    assert repository["facts"]["stars"] == 99
    assert repository["images"][0]["digest"] == image.digest
    assert with_facts == unpack_tar(before)


async def test_the_command_writes_facts_and_the_import_says_so(registry, start, tmp_path):
    here = await start(mode="audit")
    await pull_all_platforms(here, registry.add_image("grafana/grafana"))
    file = str(tmp_path / "images.tar")
    exported = await run_on(here, "export", "--facts", "grafana/grafana", "-o", file)
    assert exported.exit_code == 0
    other = await start("other", offline=True)
    imported = await run_on(other, "import", file)
    assert imported.exit_code == 0
    assert "0 already stored, facts about 1 repository\n" in imported.stderr


VALID: dict[str, Any] = {"version": 1, "made": 1.0, "repositories": []}
HUB_FACTS = {"badge": "community", "asked": 1.0}


def with_repository(**keys: Any) -> dict[str, Any]:
    return {**VALID, "repositories": [{"name": "docker.io/acme/app", **keys}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "Expected `object`"),
        ({**VALID, "version": 2}, "export it with the same version"),
        ({**VALID, "made": -1}, "made"),
        ({**VALID, "made": 1e300}, "made"),
        ({**VALID, "repositories": 3}, "array"),
        ({**VALID, "repositories": [{"name": "a/b"}, {"name": "a/b"}]}, "a repository twice"),
        (with_repository(facts={**HUB_FACTS, "badge": "official"}), "calls docker.io/acme/app"),
        (with_repository(facts={**HUB_FACTS, "badge": "best"}), "Invalid enum value"),
        (with_repository(facts={**HUB_FACTS, "badge": "private"}), "private is no fact"),
        (with_repository(facts={**HUB_FACTS, "stars": -1}), "stars"),
        (with_repository(facts={**HUB_FACTS, "stars": 1 << 60}), "stars"),
        (with_repository(facts={**HUB_FACTS, "description": "x" * 1001}), "length"),
        (with_repository(facts={**HUB_FACTS, "publisher": "a\x1b[31m"}), "regex"),
        (with_repository(images=[{"digest": "sha256:1", "first_seen": 1}]), "is invalid"),
        (with_repository(images=[{"digest": DIGEST}]), "first_seen"),
        (with_repository(images=[{"digest": DIGEST, "first_seen": "1"}]), "float"),
        (with_repository(images=[{"digest": DIGEST, "first_seen": 1, "tag": "a b"}]), "not a tag"),
    ],
)
async def test_hostile_facts_are_refused_with_the_whole_bundle(program, document, message):
    builder, _ = build_layout(b"layer", name="docker.io/acme/app:1")
    builder.files[FILE] = json.dumps(document).encode()
    with pytest.raises(BundleError, match=message) as raised:
        await import_bundle(program, builder.to_tar())
    assert FILE in str(raised.value)
    assert len(str(raised.value)) <= 200
    assert not program.stored()


def test_facts_that_are_no_json_are_refused():
    for content in (b"", b"{", b"[" * 100_000, b'{"version": 1, "made": NaN, "repositories": []}'):
        with pytest.raises(BundleError, match="is invalid"):
            parse_facts(content)


times = st.floats(0, 1e11)
facts_of_repositories = st.builds(
    RepositoryFacts,
    badge=st.sampled_from([one for one in Badge if one.is_fact and one is not Badge.OFFICIAL]),
    publisher=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20),
    description=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20),
    stars=st.integers(0, 1 << 53),
    pulls=st.integers(0, 1 << 53),
    is_archived=st.booleans(),
    asked_at=times,
)
ages = st.builds(
    ImageAge,
    digest=st.binary().map(Digest.from_content),
    tag=st.none() | st.just(Tag("1.2")),
    first_seen=times,
    pushed_at=st.none() | times,
    is_ripe=st.booleans(),
)
repositories = st.lists(
    st.builds(
        BundledRepository,
        name=st.text(),
        facts=st.none() | facts_of_repositories,
        ages=st.lists(ages, max_size=3),
    ),
    max_size=3,
    unique_by=lambda one: one.name,
)


@given(st.builds(BundleFacts, made_at=times, repositories=repositories))
def test_facts_are_read_as_they_were_written(facts: BundleFacts):
    assert parse_facts(encode_facts(facts)) == facts
