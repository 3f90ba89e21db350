"""Policies decide what is served by tag and by digest, before the first byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from proxy.cli.api_client import AdminClient
from tests.fakes.content import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST, FakeImage
from tests.fakes.faults import HTML, Fault
from tests.fakes.hub import FakeHub, HubRepository
from tests.fakes.registry import FakeRegistry
from tests.support.admin_api import call, remove_images
from tests.support.program import Answer, Program

DAY = 86_400.0
TRUSTED = ["official", "verified_publisher"]

MakeProgram = Callable[..., Awaitable[Program]]


@pytest.fixture
async def hub() -> AsyncIterator[FakeHub]:
    async with FakeHub() as hub:
        hub.repositories += [
            HubRepository("library/nginx", "official"),
            HubRepository("grafana/grafana", "verified_publisher", "Grafana Labs"),
            HubRepository("traefik/whoami", "open_source"),
            HubRepository("acme/app"),
        ]
        yield hub


@pytest.fixture
def start(registry: FakeRegistry, hub: FakeHub, make_program: MakeProgram) -> MakeProgram:
    """Return a function that starts the program with one policy, enforced, and the fake hub."""

    async def start(**keys: Any) -> Program:
        rule = {"images": ["*"], "mode": "enforce", **keys}
        upstream = {"url": registry.url, "facts_url": hub.url}
        return await make_program(upstreams={"docker.io": upstream}, policy=[rule])

    return start


def problem(answer: Answer) -> str:
    assert answer.code
    return str(answer.json["errors"][0]["message"])


# Trusted content.


@pytest.mark.parametrize("repository", ["library/nginx", "grafana/grafana"])
async def test_a_trusted_image_is_served(registry, start, repository):
    program = await start(trusted=TRUSTED)
    image = registry.add_image(repository)
    await program.pull(image)


@pytest.mark.parametrize("repository", ["acme/app", "traefik/whoami"])
async def test_an_image_that_is_not_trusted_is_refused_with_rule_and_reason(
    registry, start, repository
):
    program = await start(trusted=TRUSTED)
    image = registry.add_image(repository)
    for reference in ("latest", image.digest):
        answer = await program.manifest(image, reference)
        assert (answer.status, answer.code) == (403, "DENIED")
        assert problem(answer) == (
            f'policy 1 ("*") refuses {repository}{"@" if ":" in reference else ":"}{reference}: '
            "it is neither official, nor of a verified publisher; "
            "to allow it: pullcache policy except"
        )
    assert (
        await program.metric("pullcache_policy_decisions_total", policy="1", decision="deny") == 2
    )


async def test_a_list_allows_an_image_besides_the_trusted_ones(registry, start):
    program = await start(trusted=TRUSTED, allow=["docker.io/acme/*"])
    await program.pull(registry.add_image("acme/app"))


async def test_a_refused_tag_is_not_asked_for_upstream_again_within_its_ttl(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    assert (await program.manifest(image)).status == 403
    registry.requests.clear()
    assert (await program.manifest(image)).status == 403
    assert not registry.requests


async def test_an_index_is_refused_and_so_is_its_child_by_digest(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app", index=True)
    assert (await program.manifest(image)).status == 403
    for digest in image.manifests.values():
        assert (await program.manifest(image, digest)).status == 403


async def test_a_refused_manifest_is_refused_among_the_blobs_too(registry, start):
    program = await start(trusted=TRUSTED)
    image, allowed = registry.add_image("acme/app", index=True), registry.add_image("library/nginx")
    for digest in (image.digest, image.manifest):
        await program.manifest(image, digest)
        for method in ("GET", "HEAD"):
            answer = await program.ask(f"/v2/acme/app/blobs/{digest}", method)
            assert answer.status == 403
    await program.pull(allowed)
    answer = await program.blob(allowed.digest, "library/nginx")
    assert (answer.status, answer.digest) == (200, allowed.digest)


async def test_the_status_line_says_why_because_head_has_no_body(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    async with program.opened("/v2/acme/app/manifests/latest", "HEAD") as response:
        assert response.status == 403
        assert response.reason == (
            'policy 1 ("*") refuses acme/app:latest: it is neither official, '
            "nor of a verified publisher; to allow it: pullcache policy except"
        )
    assert image.digest


async def test_an_image_of_another_registry_is_refused_as_not_trusted(registry, hub, make_program):
    async with FakeRegistry() as other:
        program = await make_program(
            upstreams={
                "docker.io": {"url": registry.url, "facts_url": hub.url},
                "ghcr.io": {"url": other.url},
            },
            policy=[{"images": ["*"], "mode": "enforce", "trusted": TRUSTED}],
        )
        image = other.add_image("acme/app")
        answer = await program.ask("/v2/ghcr.io/acme/app/manifests/latest")
        assert (answer.status, image.repository) == (403, "acme/app")


async def test_what_docker_hub_does_not_answer_is_503_with_retry_after_and_decided_later(
    registry, hub, start
):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("grafana/grafana")
    hub.break_with(Fault(status=500))
    answer = await program.manifest(image)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
    assert "Docker Hub did not answer" in problem(answer)
    hub.repair()
    program.clock.advance(3600)
    assert (await program.manifest(image)).status == 200


async def test_a_message_has_the_reason_and_what_helps_also_with_a_long_name(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image(f"acme/{'x' * 200}")
    message = problem(await program.manifest(image))
    assert message.startswith('policy 1 ("*") refuses acme/xxxxx')
    assert message.endswith(
        "...: Docker Hub's search does not list it; to allow it: pullcache policy except"
    )


async def test_offline_an_image_without_facts_is_503_that_says_where_facts_come_from(
    registry, make_program, hub
):
    upstream = {"url": registry.url, "facts_url": ""}
    program = await make_program(upstreams={"docker.io": upstream})
    image = registry.add_image("grafana/grafana")
    await program.pull(image)
    rule = {"images": ["*"], "mode": "enforce", "trusted": TRUSTED}
    program.upstreams["docker.io"]["facts_url"] = hub.url
    await program.restart(offline=True, policy=[rule])
    answer = await program.manifest(image)
    assert answer.status == 503
    assert "import a bundle that was made with export --facts" in problem(answer)
    assert not hub.requests


async def test_many_images_can_be_pulled_at_once_for_the_first_time(registry, hub, start):
    program = await start(trusted=TRUSTED, min_age="1s")
    images = [registry.add_image(f"grafana/app{number}") for number in range(12)]
    hub.repositories += [HubRepository(one.repository, "verified_publisher") for one in images]
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*map(program.manifest, images))
    assert [answer.status for answer in answers] == [200] * 12


async def test_beyond_the_rate_a_pull_waits_no_longer_than_for_an_answer_and_blocks_no_other(
    registry, hub, start, monkeypatch
):
    monkeypatch.setattr("proxy.cache.facts.QUESTION_TIMEOUT", 0.3)
    program = await start(min_age="3d", first_seen="deny")
    images = [registry.add_image(f"grafana/app{number}") for number in range(40)]
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*map(program.manifest, images))
    # What is not known for want of an answer is undecided, and nothing waits for it any more.
    statuses = [answer.status for answer in answers]
    assert statuses.count(503) >= 10
    assert statuses.count(403) + statuses.count(503) == 40
    assert 15 <= len(hub.requests) <= 30


async def test_a_push_time_is_asked_for_once(registry, hub, start):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image()
    for _ in range(3):
        assert (await program.manifest(image)).status == 403
        assert (await program.manifest(image, image.digest)).status == 403
        await program.reload(log={"level": "info"})
        program.clock.advance(1)
    assert hub.log.count("/tags/latest") <= 3


async def test_a_page_of_html_from_docker_hub_is_no_answer(registry, hub, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("grafana/grafana")
    hub.break_with(HTML)
    assert (await program.manifest(image)).status == 503


async def test_unknown_allow_serves_what_cannot_be_decided(registry, hub, start):
    program = await start(trusted=TRUSTED, unknown="allow")
    hub.break_with(Fault(status=429))
    image = registry.add_image("grafana/grafana")
    for _ in range(2):
        assert (await program.manifest(image)).status == 200
    metric = "pullcache_policy_decisions_total"
    assert await program.metric(metric, decision="allowed_unknown") == 1
    assert await program.metric(metric, decision="allow") == 0
    # It is decided anew as soon as Docker Hub may have answered.
    hub.repair()
    hub.repositories[1].badge = None
    program.clock.advance(700)
    assert (await program.manifest(image)).status == 403


async def test_a_private_repository_is_refused_and_docker_hub_does_not_learn_its_name(
    registry, hub, start
):
    program = await start(trusted=TRUSTED)
    registry.repository("acme/secret").private = True
    await program.manifest(registry.add_image("acme/secret"))
    assert not hub.requests


async def test_facts_survive_a_restart_and_are_good_offline(registry, hub, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("grafana/grafana")
    refused = registry.add_image("acme/app")
    await program.pull(image)
    assert (await program.manifest(refused)).status == 403
    await program.restart(offline=True)
    hub.log.requests.clear()
    program.clock.advance(30 * DAY)
    await program.pull(image)
    assert (await program.manifest(refused, refused.digest)).status == 403
    assert not hub.requests


async def test_facts_are_asked_for_again_after_a_day(registry, hub, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("grafana/grafana")
    await program.manifest(image)
    program.clock.advance(2 * DAY)
    hub.repositories[1].badge = None
    assert (await program.manifest(image)).status == 403


async def test_an_official_image_needs_no_answer_of_docker_hub(registry, hub, start):
    program = await start(trusted=["official"])
    hub.break_with(Fault(status=500))
    await program.pull(registry.add_image("library/nginx"))


# Modes.


async def test_audit_serves_and_warns(registry, start):
    program = await start(trusted=TRUSTED, mode="audit")
    image = registry.add_image("acme/app")
    for _ in range(2):
        answer = await program.manifest(image)
        assert answer.status == 200
        assert "would refuse acme/app:latest: it is neither official" in answer.headers["Warning"]
    metric = "pullcache_policy_decisions_total"
    assert await program.metric(metric, decision="would_deny") == 1


async def test_the_first_rule_that_matches_decides(registry, hub, make_program):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "facts_url": hub.url}},
        policy=[
            {
                "images": ["docker.io/*"],
                "except": ["docker.io/acme/*"],
                "mode": "enforce",
                "trusted": TRUSTED,
            },
            {"images": ["docker.io/acme/*"], "mode": "enforce", "deny_tags": ["latest"]},
        ],
    )
    image = registry.add_image("acme/app")
    assert "policy 2" in problem(await program.manifest(image))
    assert (await program.manifest(image, image.digest)).status == 200


async def test_rules_are_applied_by_a_reload(registry, start):
    program = await start(deny_tags=["latest"])
    image = registry.add_image()
    assert (await program.manifest(image)).status == 403
    assert await program.reload(policy=[])
    assert (await program.manifest(image)).status == 200
    assert await program.reload(policy=[{"images": ["*"], "mode": "enforce", "deny_tags": ["*"]}])
    assert (await program.manifest(image)).status == 403


# Minimum age.


async def test_a_moved_tag_means_its_earlier_content_until_the_new_one_is_old_enough(
    registry, start
):
    program = await start(min_age="3d")
    old = registry.add_image()
    await program.pull(old)
    program.clock.advance(10 * DAY)
    new = registry.add_image(layers=[b"new"])
    for _ in range(3):
        answer = await program.manifest(new)
        assert (answer.status, answer.digest) == (200, old.digest)
        assert "has moved; its earlier content is served until" in answer.headers["Warning"]
        program.clock.advance(600)
    assert (await program.manifest(new, new.digest)).status == 403
    program.clock.advance(3 * DAY)
    answer = await program.manifest(new)
    assert (answer.digest, answer.headers.get("Warning")) == (new.digest, None)


async def test_the_earlier_content_is_served_after_a_restart_and_offline_the_new_one_in_time(
    registry, start
):
    program = await start(min_age="3d")
    old = registry.add_image()
    await program.pull(old)
    program.clock.advance(10 * DAY)
    new = registry.add_image(layers=[b"new"])
    assert (await program.manifest(new)).digest == old.digest
    await program.restart(offline=True)
    answer = await program.manifest(new)
    assert answer.digest == old.digest
    assert "has moved" in answer.headers["Warning"]
    program.clock.advance(4 * DAY)
    assert (await program.manifest(new)).digest == new.digest


async def test_an_image_of_unknown_age_is_allowed_at_first_sight_and_counts_as_ripe(
    registry, start
):
    program = await start(min_age="3d")
    image = registry.add_image()
    await program.pull(image)
    await program.restart()
    await program.pull(image)


async def test_first_seen_deny_refuses_an_image_of_unknown_age_until_its_time_has_come(
    registry, start
):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image()
    answer = await program.manifest(image)
    assert answer.status == 403
    assert "it is 1s old (first seen here), and min_age is 3d; it may be pulled from" in problem(
        answer
    )
    program.clock.advance(3 * DAY)
    await program.pull(image)


async def test_unripe_deny_refuses_a_moved_tag(registry, start):
    program = await start(min_age="3d", unripe="deny")
    await program.pull(registry.add_image())
    program.clock.advance(10 * DAY)
    new = registry.add_image(layers=[b"new"])
    assert (await program.manifest(new)).status == 403
    program.clock.advance(3 * DAY)
    assert (await program.manifest(new)).digest == new.digest


async def test_docker_hubs_push_time_is_the_age_if_it_is_about_the_same_digest(
    registry, hub, start
):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image("library/nginx")
    hub.pushed["library/nginx", "latest"] = (image.digest, program.clock() - 5 * DAY)
    await program.pull(image)
    young = registry.add_image("grafana/grafana", layers=[b"young"])
    hub.pushed["grafana/grafana", "latest"] = (young.digest, program.clock() - DAY)
    answer = await program.manifest(young)
    assert "it is 1d old (pushed, says Docker Hub)" in problem(answer)
    other = registry.add_image("acme/app", layers=[b"other"])
    hub.pushed["acme/app", "latest"] = (young.digest, program.clock() - 5 * DAY)
    assert "first seen here" in problem(await program.manifest(other))


async def test_first_seen_does_not_allow_what_docker_hub_says_is_young(registry, hub, start):
    program = await start(min_age="3d", first_seen="allow")
    image = registry.add_image("library/nginx")
    hub.pushed["library/nginx", "latest"] = (image.digest, program.clock() - DAY)
    assert (await program.manifest(image)).status == 403


async def test_content_that_was_old_enough_under_another_tag_stands_in(registry, start):
    program = await start(min_age="3d")
    old = registry.add_image(tag="1.0")
    await program.pull(old)
    program.clock.advance(10)
    registry.move_tag("library/app", "latest", old.digest)
    assert (await program.manifest(old, "latest")).status == 200
    program.clock.advance(3600)
    new = registry.add_image(tag="latest", layers=[b"new"])
    assert (await program.manifest(new, "latest")).digest == old.digest


async def test_a_roll_back_is_ripe_at_once(registry, start):
    program = await start(min_age="3d")
    old = registry.add_image()
    await program.pull(old)
    program.clock.advance(10 * DAY)
    new = registry.add_image(layers=[b"new"])
    assert (await program.manifest(new)).digest == old.digest
    program.clock.advance(4 * DAY)
    assert (await program.manifest(new)).digest == new.digest
    registry.move_tag("library/app", "latest", old.digest)
    program.clock.advance(3600)
    answer = await program.manifest(old)
    assert (answer.digest, answer.headers.get("Warning")) == (old.digest, None)


async def test_a_clock_that_goes_back_makes_nothing_unripe(registry, start):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(4 * DAY)
    await program.pull(image)
    program.clock.advance(-30 * DAY)
    await program.restart()
    await program.pull(image)


async def test_a_child_of_a_ripe_index_is_ripe(registry, start):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image(index=True)
    assert (await program.manifest(image)).status == 403
    program.clock.advance(4 * DAY)
    await program.pull(image)
    for digest in image.manifests.values():
        assert (await program.manifest(image, digest)).status == 200


async def test_an_unripe_digest_is_refused_in_a_repository_that_is_known(registry, start):
    program = await start(min_age="3d")
    await program.pull(registry.add_image())
    fresh = registry.add_image(tag="other", layers=[b"fresh"])
    assert (await program.manifest(fresh, fresh.digest)).status == 403


async def except_image(program: Program, image: FakeImage, seconds: float) -> None:
    name = f"docker.io/{image.repository}@{image.digest}"
    document = {"image": name, "seconds": seconds, "reason": "a fix"}
    await call(program, "post", "/api/v1/policy/exceptions", document)


async def test_an_exception_ends_in_time_and_its_image_is_not_ripe_then(registry, start):
    program = await start(min_age="3d", first_seen="deny")
    image = registry.add_image(index=True)
    assert (await program.manifest(image)).status == 403
    await except_image(program, image, seconds=600)
    await program.pull(image)
    program.clock.advance(700)
    for reference in ("latest", image.digest, image.manifest):
        assert (await program.manifest(image, reference)).status == 403


async def test_a_refused_tag_is_served_as_soon_as_it_is_ripe(registry, start):
    program = await start(min_age="100s", first_seen="deny")
    image = registry.add_image()
    assert (await program.manifest(image)).status == 403
    program.clock.advance(101)
    assert (await program.manifest(image)).status == 200


async def test_audit_remembers_since_when_it_knows_a_digest(registry, start):
    program = await start(min_age="3d", first_seen="deny", mode="audit")
    image = registry.add_image()
    assert "1s old" in (await program.manifest(image, image.digest)).headers["Warning"]
    program.clock.advance(3600)
    await program.restart()
    assert "1h old" in (await program.manifest(image, image.digest)).headers["Warning"]


async def test_a_moved_tag_is_refused_with_its_date_if_its_earlier_content_is_gone(registry, start):
    program = await start(min_age="3d")
    old = registry.add_image()
    await program.manifest(old)
    await remove_images(program, "app:latest")
    del registry.repository(old.repository).manifests[old.digest]
    program.clock.advance(10 * DAY)
    answer = await program.manifest(registry.add_image(layers=[b"new"]))
    assert answer.status == 403
    assert "it is 1s old (first seen here)" in problem(answer)


# What is exempt.


def artifact(registry: FakeRegistry, tag: str, layer_type: str, **fields: Any) -> str:
    config = registry.add_blob(b"{}", "acme/app")
    layer = registry.add_blob(b"signature", "acme/app")
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": {"mediaType": OCI_CONFIG, "digest": config, "size": 2},
        "layers": [{"mediaType": layer_type, "digest": layer, "size": 9}],
        **fields,
    }
    return registry.add_manifest("acme/app", tag, json.dumps(document).encode(), OCI_MANIFEST)


@pytest.mark.parametrize(
    "layer_type",
    [
        "application/vnd.dev.cosign.simplesigning.v1+json",
        "application/vnd.dsse.envelope.v1+json",
        "application/vnd.in-toto+json",
        "application/vnd.dev.sigstore.bundle.v0.3+json",
    ],
)
async def test_signatures_and_attestations_of_a_refused_image_are_served(
    registry, start, layer_type
):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    tag = f"{image.digest.replace(':', '-')}.sig"
    artifact(registry, tag, layer_type)
    assert (await program.manifest(image, tag)).status == 200


async def test_an_artifact_that_refers_to_an_image_is_served(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    subject = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": 1}
    digest = artifact(registry, "sbom", "application/spdx+json", subject=subject)
    assert (await program.manifest(image, digest)).status == 200


@pytest.mark.parametrize("layer_type", [OCI_LAYER, "application/octet-stream"])
async def test_an_image_is_not_exempt_for_its_name_or_its_subject(registry, start, layer_type):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    subject = {"mediaType": OCI_MANIFEST, "digest": image.digest, "size": 1}
    tag = f"{image.digest.replace(':', '-')}.sig"
    digest = artifact(registry, tag, layer_type, subject=subject)
    assert (await program.manifest(image, tag)).status == 403
    assert (await program.manifest(image, digest)).status == 403


async def test_a_list_of_referrers_by_tag_is_served_and_what_it_lists_is_judged(registry, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("acme/app")
    entry = {
        "mediaType": OCI_MANIFEST,
        "digest": image.digest,
        "size": 1,
        "artifactType": "application/vnd.dev.sigstore.bundle.v0.3+json",
    }
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    tag = image.digest.replace(":", "-")
    registry.add_manifest("acme/app", tag, json.dumps(document).encode(), OCI_INDEX)
    assert (await program.manifest(image, tag)).status == 200
    assert (await program.manifest(image, image.digest)).status == 403


async def test_hits_of_allowed_images_ask_neither_the_hub_nor_the_registry(registry, hub, start):
    program = await start(trusted=TRUSTED, min_age="1d")
    image = registry.add_image("grafana/grafana")
    await program.pull(image)
    hub.log.requests.clear()
    registry.requests.clear()
    await asyncio.gather(*(program.manifest(image) for _ in range(50)))
    assert not registry.requests
    assert not hub.requests


# Facts.


async def test_a_public_repository_that_was_pulled_is_asked_about_once_a_day(
    registry, hub, make_program
):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "facts_url": hub.url}}
    )
    image = registry.add_image("grafana/grafana")
    for _ in range(3):
        await program.pull(image)
        program.clock.advance(3600)
    await hub.log.until(lambda: hub.log.count("search"))
    await program.pull(image)
    assert hub.log.count("search") == 1
    program.clock.advance(2 * DAY)
    await program.pull(image)
    await hub.log.until(lambda: hub.log.count("search") == 2)


async def test_without_facts_url_nothing_is_asked(registry, program):
    await program.pull(registry.add_image("grafana/grafana"))
    assert not registry.seen("api/search")


async def test_docker_hub_is_never_asked_while_offline(registry, hub, start):
    program = await start(trusted=TRUSTED)
    image = registry.add_image("grafana/grafana")
    await program.pull(image)
    hub.log.requests.clear()
    await program.restart(offline=True)
    program.clock.advance(9 * DAY)
    await program.pull(image)
    assert not hub.requests


async def test_decisions_that_are_written_twice_at_once_are_kept_once(registry, start):
    program = await start(deny_tags=["latest"])
    assert (await program.manifest(registry.add_image())).status == 403
    running = program.running
    await asyncio.gather(running.write_policy_decisions(), running.write_policy_decisions())
    api = AdminClient(program.root)
    found = await asyncio.to_thread(lambda: api.get("/api/v1/policy/decisions"))
    assert [one["decision"] for one in found] == ["deny"]
