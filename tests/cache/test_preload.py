"""Preload: what was asked for is here afterwards, and cost no more than it had to."""

from tests.fakes.content import digest_of
from tests.fakes.gallery import push_index, push_manifest
from tests.preloading import preload
from tests.server.asking import APP, BASE, FOREIGN, NATIVE, OTHER, OWN, checks


def push(registry, tag: str = "v1", *, repository: str = APP) -> dict[str, str]:
    """Push an index for this machine's platform and another."""
    made = {
        NATIVE: push_manifest(registry, repository, [BASE, OWN], platform=NATIVE),
        FOREIGN: push_manifest(registry, repository, [BASE, OTHER], platform=FOREIGN),
    }
    return made | {"index": push_index(registry, repository, tag, made)}


async def test_what_was_preloaded_is_pulled_without_upstream(registry, program):
    made = push(registry)
    run = await preload(program, "app:v1")
    (done,) = run.of("done")
    assert (done["image"], done["digest"], done["outcome"]) == ("app:v1", made["index"], "fetched")
    (check,) = await checks(program, "app:v1")
    assert check["state"] == "complete"
    async with registry.down():
        for reference in ("v1", made[NATIVE]):
            assert (await program.manifest(APP, reference)).status == 200
        for layer in (BASE, OWN):
            assert (await program.blob(digest_of(layer))).body == layer
    assert digest_of(OTHER) not in program.stored()
