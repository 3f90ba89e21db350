"""What refers to an image: each signature comes by itself, or the preload says that it did not."""

import json
from itertools import product

import pytest

from proxy.preload import referrers
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, descriptor, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.images import push_manifest
from tests.preload.images import push_app
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OWN, list_images, remove_images
from tests.support.preload_api import run_preload

UNKNOWN = (404, "MANIFEST_UNKNOWN")
REFERRERS = f"/v2/{APP}/referrers"


def fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def sign(registry, subject: str, content: bytes = b"signature", kind: str = "sig/x") -> str:
    """Push a referrer, by its subject only."""
    return push_manifest(registry, APP, [content], subject=subject, artifact_type=kind)


def push_fallback_index(registry, subject: str, *referrers: str) -> str:
    """Push the fallback index of a subject, with descriptors as oras writes them."""
    pushed = registry.repository(APP).manifests
    entries = [
        {**descriptor(pushed[one].content, OCI_MANIFEST), "artifactType": "sig/x"}
        for one in referrers
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    content = json.dumps(document).encode()
    digest: str = registry.add_manifest(APP, fallback_tag(subject), content, OCI_INDEX)
    return digest


def missing(run) -> set[str]:
    return {event["reference"] for event in run.events_of("referrer_missing")}


async def listed(program, subject: str) -> list[str]:
    answer = await program.ask(f"{REFERRERS}/{subject}")
    assert answer.status == 200
    return [item["digest"] for item in answer.json["manifests"]]


async def assert_served_offline(program, *references: str, blobs: tuple[bytes, ...] = ()) -> None:
    await program.restart(offline=True)
    for reference in references:
        assert (await program.manifest(APP, reference)).status == 200, reference
    for blob in blobs:
        assert (await program.blob(digest_of(blob))).body == blob


REFUSALS = {
    "404": Fault(status=404, body=b"404 page not found"),
    "406": Fault(status=406, body=b""),
    "403": Fault(status=403, body=b""),
    "501": Fault(status=501, body=b""),
    "page": HTML,
    "object": Fault(status=200, body=b"{}"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_where_the_api_is_refused_the_fallback_tag_and_cosigns_tags_bring_all(
    registry, program, refusal
):
    digests = push_app(registry)
    registry.fail("/referrers/", REFUSALS[refusal], times=None)
    signature = sign(registry, digests["index"])
    push_fallback_index(registry, digests["index"], signature)
    for suffix in (".sig", ".att", ".sbom"):
        tag = f"{fallback_tag(digests['index'])}{suffix}"
        push_manifest(registry, APP, [suffix.encode()], tag=tag)
    run = await run_preload(program, "app:v1")
    assert run.events_of("resolved")[0]["referrers"] == 5
    assert run.events[-1]["missing_referrers"] == 0
    await assert_served_offline(
        program,
        *(fallback_tag(digests["index"]) + suffix for suffix in ("", ".sig", ".att", ".sbom")),
        signature,
        blobs=(b"signature", b".sig", b".att", b".sbom"),
    )
    assert await listed(program, digests["index"]) == [signature]


async def test_signatures_of_the_manifests_of_platforms_come_too(registry, program):
    digests = push_app(registry)
    push_manifest(registry, APP, [b"native"], tag=f"{fallback_tag(digests[NATIVE])}.sig")
    push_manifest(registry, APP, [b"foreign"], tag=f"{fallback_tag(digests[FOREIGN])}.sig")
    await run_preload(program, "app:v1")
    assert digest_of(b"native") in program.stored()
    assert digest_of(b"foreign") not in program.stored()


async def test_what_refers_to_a_referrer_comes_too(registry, program):
    digests = push_app(registry)
    sbom = sign(registry, digests["index"], b"sbom", "sbom/y")
    signature = sign(registry, sbom, b"of the sbom")
    run = await run_preload(program, "app:v1")
    assert run.events_of("resolved")[0]["referrers"] == 2
    await assert_served_offline(program, signature, blobs=(b"of the sbom",))
    assert await listed(program, sbom) == [signature]
    assert await listed(program, signature) == []


def push_chain(registry, subject: str, length: int) -> list[str]:
    """Push a referrer of a manifest, one of that, and so on."""
    chain = [subject]
    for number in range(length):
        chain.append(sign(registry, chain[-1], b"referrer %d" % number))
    return chain[1:]


@pytest.mark.parametrize("has_api", [True, False])
async def test_the_deepest_referrers_are_known_to_have_none(registry, program, has_api):
    registry.referrers = has_api
    digests = push_app(registry)
    chain = push_chain(registry, digests["index"], 3)
    for subject, referrer in zip((digests["index"], *chain[:2]), chain, strict=True):
        push_fallback_index(registry, subject, referrer)
    run = await run_preload(program, "app:v1")
    assert run.events[-1]["missing_referrers"] == 0
    await assert_served_offline(program, *chain)
    assert await listed(program, chain[1]) == [chain[2]]
    assert await listed(program, chain[2]) == []


async def test_referrers_that_are_too_deep_are_reported(registry, program):
    digests = push_app(registry)
    chain = push_chain(registry, digests["index"], 4)
    run = await run_preload(program, "app:v1")
    (event,) = run.events_of("referrer_missing")
    assert (event["subject"], event["reference"]) == (chain[2], "")
    assert "3 levels" in event["reason"]
    assert chain[3] not in program.stored()


async def test_a_listed_referrer_that_upstream_lacks_has_no_referrers_itself(registry, program):
    """ORAS asks for them too, and gives up at a 404 after the list of the image."""
    digests = push_app(registry)
    gone, good = (sign(registry, digests["index"], one) for one in (b"gone", b"good"))
    registry.fail(f"/manifests/{gone}", Fault(status=404), times=None)
    await run_preload(program, "app:v1")
    await assert_served_offline(program, good)
    assert sorted(await listed(program, digests["index"])) == sorted([gone, good])
    for referrer in (gone, good):
        assert await listed(program, referrer) == []


async def test_a_signature_that_is_newer_than_a_clients_list_comes(registry, program):
    digests = push_app(registry)
    assert await listed(program, digests["index"]) == []
    signature = sign(registry, digests["index"])
    await run_preload(program, "app:v1")
    assert digest_of(b"signature") in program.stored()
    assert await listed(program, digests["index"]) == [signature]


async def test_referrers_that_upstream_lacks_or_that_are_unusual_do_not_keep_others_away(
    registry, program
):
    digests = push_app(registry)
    gone, incomplete, good = (sign(registry, digests["index"], one) for one in (b"g", b"i", b"ok"))
    artifact = {
        "mediaType": "application/vnd.oci.artifact.manifest.v1+json",
        "artifactType": "old/z",
        "blobs": [descriptor(b"old", "text/plain")],
        "subject": descriptor(b"", OCI_INDEX) | {"digest": digests["index"]},
    }
    registry.add_blob(b"old", APP)
    old = registry.add_manifest(
        APP, None, json.dumps(artifact).encode(), "application/vnd.oci.artifact.manifest.v1+json"
    )
    registry.fail(f"/manifests/{gone}", Fault(status=404), times=None)
    del registry.repository(APP).blobs[digest_of(b"i")]
    push_manifest(registry, APP, [b".sig"], tag=f"{fallback_tag(digests['index'])}.sig")
    run = await run_preload(program, "app:v1")
    assert (missing(run), run.events[-1]["missing_referrers"]) == (set(), 0)
    assert {incomplete, good, old, digest_of(b"ok"), digest_of(b".sig")} <= program.stored()
    assert digest_of(b"old") in program.stored()


FAILURES = {
    "429": Fault(status=429, body=b""),
    "500": Fault(status=500, body=b""),
    "503": Fault(status=503, body=b""),
    "520": Fault(status=520, body=b""),
    "hung up": Fault(hang_up=True),
}


@pytest.mark.parametrize(
    ("what", "failure"),
    [
        *product(("referrer", "tag", "list", "fallback"), FAILURES),
        # The others are not asked for by their digest.
        ("referrer", "wrong digest"),
    ],
)
async def test_what_exists_and_could_not_be_had_is_reported_and_the_rest_comes(
    registry, program, monkeypatch, what, failure
):
    monkeypatch.setattr(referrers, "MAX_REFERRER_PAUSE", 0.1)
    digests = push_app(registry)
    subject = digests["index"]
    tag = f"{fallback_tag(subject)}.sig"
    push_manifest(registry, APP, [b".sig"], tag=tag)
    push_manifest(registry, APP, [b".att"], tag=f"{fallback_tag(subject)}.att")
    signature, other = sign(registry, subject), sign(registry, subject, b"other")
    registry.referrers = what != "fallback"
    push_fallback_index(registry, subject, signature, other)
    match, name = {
        "referrer": (f"/manifests/{signature}", signature),
        "tag": (f"/manifests/{tag}", tag),
        "list": (f"/referrers/{subject}", ""),
        "fallback": (f"/manifests/{fallback_tag(subject)}$", fallback_tag(subject)),
    }[what]
    fault = FAILURES.get(failure, Fault(flip_at=30))
    if failure == "wrong digest":
        match = f"GET .*{match}"
    registry.fail(match, fault, times=None)
    run = await run_preload(program, "app:v1")
    assert [done["outcome"] for done in run.events_of("done")] == ["fetched"]
    assert name in missing(run)
    event = next(one for one in run.events_of("referrer_missing") if one["reference"] == name)
    assert (event["image"], event["subject"]) == ("app:v1", subject)
    assert event["reason"]
    if failure != "429":  # which pauses requests for other referrers, too
        assert missing(run) == {name}
        assert digest_of(b".att") in program.stored()
        # If the list failed, the fallback tag has brought what it lists.
        assert (digest_of(b"other") in program.stored()) is (what != "fallback")
        assert (digest_of(b".sig") in program.stored()) is (what != "tag")
    # Asked again, all is there.
    registry.heal()
    program.clock.advance(61)
    run = await run_preload(program, "app:v1")
    assert missing(run) == set()
    assert {digest_of(one) for one in (b"signature", b"other", b".sig")} <= program.stored()


@pytest.mark.parametrize("failure", ["429", "500"])
async def test_a_signatures_blob_that_could_not_be_had_is_reported(registry, program, failure):
    digests = push_app(registry)
    signature = sign(registry, digests["index"])
    registry.fail(f"/blobs/{digest_of(b'signature')}", FAILURES[failure], times=None)
    run = await run_preload(program, "app:v1")
    assert run.events_of("done")
    assert missing(run) == {signature}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 451, 501])
async def test_a_tag_that_is_refused_does_not_exist(registry, program, status):
    registry.referrers = False
    push_app(registry)
    await program.manifest(APP, "v1")
    registry.fail("/manifests/sha256-", Fault(status=status, body=b""), times=None)
    run = await run_preload(program, "app:v1")
    assert run.events_of("done")
    assert run.events[-1]["missing_referrers"] == 0


async def test_a_tag_that_exists_is_found_where_head_answers_404(registry, program):
    registry.referrers = False
    digests = push_app(registry)
    push_manifest(registry, APP, [b".sig"], tag=f"{fallback_tag(digests['index'])}.sig")
    push_fallback_index(registry, digests["index"], sign(registry, digests["index"]))
    registry.fail("^HEAD .*/manifests/", Fault(status=404, body=b""), times=None)
    run = await run_preload(program, "app:v1")
    assert run.events_of("resolved")[0]["referrers"] == 3
    assert {digest_of(b"signature"), digest_of(b".sig")} <= program.stored()


class TestFallbackTags:
    """A tag that looks like the fallback tag of a manifest may be something else."""

    async def test_the_subject_itself_is_no_list(self, registry, program):
        registry.referrers = False
        digests = push_app(registry)
        for digest in digests.values():
            registry.move_tag(APP, fallback_tag(digest), digest)
        run = await run_preload(program, "app:v1")
        assert run.events_of("resolved")[0]["referrers"] == 0
        assert digests[FOREIGN] not in program.stored()
        assert set(await list_images(program)) == {"app:v1"}
        await program.restart(offline=True)
        assert await listed(program, digests["index"]) == []

    async def test_an_index_with_the_subject_in_it_is_no_list(self, registry, program):
        registry.referrers = False
        digests = push_app(registry)
        registry.move_tag(APP, fallback_tag(digests[NATIVE]), digests["index"])
        run = await run_preload(program, "app:v1")
        assert run.events_of("resolved")[0]["referrers"] == 0
        assert set(await list_images(program)) == {"app:v1"}

    async def test_an_index_whose_children_do_not_name_the_subject_is_no_list(
        self, registry, program
    ):
        registry.referrers = False
        digests = push_app(registry)
        other = push_app(registry, "other", layer=b"other app")
        registry.move_tag(APP, fallback_tag(digests["index"]), other["index"])
        run = await run_preload(program, "app:v1")
        assert run.events_of("resolved")[0]["referrers"] == 0
        assert not program.stored() & {other["index"], other[NATIVE], digest_of(b"other app")}
        assert set(await list_images(program)) == {"app:v1"}

    async def test_an_empty_list_is_one(self, registry, program):
        registry.referrers = False
        digests = push_app(registry)
        push_fallback_index(registry, digests["index"])
        run = await run_preload(program, "app:v1")
        assert run.events[-1]["missing_referrers"] == 0
        await assert_served_offline(program, fallback_tag(digests["index"]))
        assert await listed(program, digests["index"]) == []


class TestAttestations:
    """BuildKit's attestations are children of the index that name the manifest they attest."""

    @pytest.fixture
    def attested(self, registry):
        """`app:v1` with an attestation for each platform; returns the digests."""
        manifests = {
            platform: push_manifest(registry, APP, [BASE, layer], platform=platform)
            for platform, layer in ((NATIVE, OWN), (FOREIGN, b"foreign"))
        }
        attestations = {
            platform: push_manifest(
                registry, APP, [f"provenance {platform}".encode()], platform="unknown/unknown"
            )
            for platform in manifests
        }
        pushed = registry.repository(APP).manifests
        entries = [
            {
                **descriptor(pushed[digest].content, OCI_MANIFEST),
                "platform": dict(zip(("os", "architecture"), platform.split("/"), strict=True)),
            }
            for platform, digest in manifests.items()
        ]
        entries += [
            {
                **descriptor(pushed[digest].content, OCI_MANIFEST),
                "platform": {"os": "unknown", "architecture": "unknown"},
                "annotations": {
                    "vnd.docker.reference.digest": manifests[platform],
                    "vnd.docker.reference.type": "attestation-manifest",
                },
            }
            for platform, digest in attestations.items()
        ]
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        index = registry.add_manifest(APP, "v1", json.dumps(document).encode(), OCI_INDEX)
        return {"index": index, "manifests": manifests, "attestations": attestations}

    @pytest.mark.parametrize("platforms", [[], [NATIVE]])
    async def test_those_of_the_chosen_platforms_come(self, registry, program, attested, platforms):
        run = await run_preload(program, {"image": "app:v1", "platforms": platforms})
        assert run.events_of("resolved")[0]["referrers"] == 1
        assert attested["attestations"][NATIVE] in program.stored()
        assert digest_of(f"provenance {NATIVE}".encode()) in program.stored()
        assert attested["attestations"][FOREIGN] not in program.stored()
        assert set(await list_images(program)) == {"app:v1"}

    async def test_all_come_with_all_platforms(self, registry, program, attested):
        await run_preload(program, {"image": "app:v1", "platforms": ["all"]})
        assert set(attested["attestations"].values()) <= program.stored()

    async def test_one_that_could_not_be_had_is_reported(self, registry, program, attested):
        digest = attested["attestations"][NATIVE]
        registry.fail(f"/manifests/{digest}", Fault(status=500), times=None)
        run = await run_preload(program, "app:v1")
        assert run.events_of("done")
        assert missing(run) == {digest}


class TestWithoutUpstreamAfterwards:
    """After a preload, the cache answers without upstream as upstream did."""

    async def test_what_did_not_exist_is_404_and_what_nobody_asked_for_503(self, registry, program):
        digests = push_app(registry)
        other = push_app(registry, "other", layer=b"other app")
        await run_preload(program, "app:v1")
        await program.manifest(APP, "other")
        await program.restart(offline=True)
        assert await listed(program, digests["index"]) == []
        for suffix in ("", ".sig", ".att", ".sbom"):
            answer = await program.manifest(APP, fallback_tag(digests["index"]) + suffix)
            assert (answer.status, answer.code) == UNKNOWN
            answer = await program.manifest(APP, fallback_tag(other["index"]) + suffix)
            assert answer.status == 503
        answer = await program.ask(f"{REFERRERS}/{other['index']}")
        assert (answer.status, answer.code) == UNKNOWN

    async def test_the_list_is_as_upstream_sent_it(self, registry, program):
        digests = push_app(registry)
        sign(registry, digests["index"])
        entry = {"mediaType": OCI_MANIFEST, "size": 1, "annotations": {"a": "b"}, "own": [1]}
        entry["digest"] = sign(registry, digests["index"])
        body = json.dumps({"manifests": [entry]}).encode()
        registry.fail(f"/referrers/{digests['index']}", Fault(status=200, body=body), times=None)
        await run_preload(program, "app:v1")
        async with registry.down():
            await program.restart()
            answer = await program.ask(f"{REFERRERS}/{digests['index']}")
            assert answer.json["manifests"] == [{**entry, "artifactType": "sig/x"}]

    async def test_a_signature_that_could_not_be_had_is_not_said_to_be_missing(
        self, registry, program
    ):
        digests = push_app(registry)
        tag = f"{fallback_tag(digests['index'])}.sig"
        push_manifest(registry, APP, [b".sig"], tag=tag)
        registry.fail(f"/manifests/{tag}", Fault(status=500), times=None)
        await run_preload(program, "app:v1")
        await program.restart(offline=True)
        assert (await program.manifest(APP, tag)).status == 503

    async def test_tags_that_upstream_lacked_when_it_was_asked_last_stay_404_while_it_is_down(
        self, registry, program
    ):
        registry.referrers = False
        digests = push_app(registry)
        await program.manifest(APP, "v1")
        tag = fallback_tag(digests["index"])
        assert (await program.manifest(APP, tag)).status == 404
        program.clock.advance(100_000)
        async with registry.down():
            assert (await program.manifest(APP, tag)).status == 404
            assert (await program.manifest(APP, "v2")).status == 503


async def test_tags_for_referrers_are_no_images_and_go_with_theirs(registry, program):
    registry.referrers = False
    digests = push_app(registry)
    push_manifest(registry, APP, [b".sig"], tag=f"{fallback_tag(digests['index'])}.sig")
    push_fallback_index(registry, digests["index"], sign(registry, digests["index"]))
    await run_preload(program, "app:v1", pin=True)
    images = await list_images(program)
    assert set(images) == {"app:v1"}
    assert len(program.stored()) > 6
    await remove_images(program, "app:v1", force=True)
    assert program.stored() == set()
    assert await list_images(program) == {}


async def test_more_referrers_than_the_limit_are_reported(registry, program, monkeypatch):
    monkeypatch.setattr(referrers, "MAX_REFERRERS", 3)
    digests = push_app(registry)
    for number in range(5):
        sign(registry, digests["index"], b"%d" % number)
    run = await run_preload(program, "app:v1")
    assert run.events_of("resolved")[0]["referrers"] == 3
    (event,) = run.events_of("referrer_missing")
    assert (event["reference"], event["subject"]) == ("", digests["index"])
    assert "of 5 only 3 are fetched" in event["reason"]


async def test_a_repeated_preload_costs_no_pull(registry, program):
    digests = push_app(registry)
    push_manifest(registry, APP, [b".sig"], tag=f"{fallback_tag(digests['index'])}.sig")
    sign(registry, digests["index"])
    await run_preload(program, "app:v1")
    pulls = registry.pulls
    await run_preload(program, "app:v1")
    assert registry.pulls == pulls
