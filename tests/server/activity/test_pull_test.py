"""Test pulls: what they report, and what helps if they fail."""

from pathlib import Path
from typing import Any

import pytest

from tests.fakes.faults import Fault
from tests.support.admin_api import FOREIGN, NATIVE, call, stream
from tests.support.openapi import validate
from tests.support.program import Program

LAYER = b"x" * 50_000


async def run_test_pull(program: Program, image: str, **options: Any) -> tuple[list[Any], Any]:
    """Make a test pull; return its steps and its result."""
    body = {"image": image, **options}
    *steps, result = await stream(program, "POST", "/api/v1/pulls/test", body)
    for step in steps:
        validate(step, "PullTestStep")
    validate(result, "PullTestResult")
    return steps, result


async def test_a_test_pull_times_each_step_and_says_where_it_came_from(registry, program):
    image = registry.add_image(layers=[LAYER], index=True)
    for state in ("miss", "hit"):
        steps, result = await run_test_pull(program, "app")
        assert [one["kind"] for one in steps] == ["index", "manifest", "config", "layer"]
        assert {one["state"] for one in steps} == {state}
        assert (result["problem"], result["code"], result["advice"]) == ("", "", "")
        assert (result["image"], result["platform"]) == ("docker.io/library/app:latest", NATIVE)
        assert result["digest"] == image.digest
        assert result["bytes"] == sum(one["bytes"] for one in steps) > len(LAYER)
        await program.wait_for_downloads()
    assert await call(program, "get", "/api/v1/pulls") == []
    assert (await call(program, "get", "/api/v1/status"))["traffic"][0]["pulls"] == 0


async def test_only_the_manifests_may_be_pulled(registry, program):
    image = registry.add_image(layers=[LAYER])
    steps, result = await run_test_pull(program, "app:latest", layers=False)
    assert ([one["kind"] for one in steps], result["problem"]) == (["manifest"], "")
    assert registry.count(registry.body_of(image.layers[0])) == 0


@pytest.mark.parametrize(
    ("image", "code", "advice"),
    [
        ("me/unknown", "upstream_unauthorized", "login"),
        ("no such name", "invalid_name", "nginx:1.27"),
        ("evil.example/app", "denied", "allow"),
    ],
)
async def test_a_test_pull_that_fails_says_what_helps(program, image, code, advice):
    steps, result = await run_test_pull(program, image)
    assert (steps, result["code"]) == ([], code)
    assert result["problem"]
    assert advice in result["advice"]


async def test_an_upstream_that_is_down_is_named(registry, make_program):
    program = await make_program(fetch={"attempts": 1})
    async with registry.down():
        _, result = await run_test_pull(program, "app")
    assert "docker.io" in result["problem"]
    assert "Upstreams" in result["advice"]


async def test_a_layer_that_fails_ends_the_test_pull(registry, program):
    image = registry.add_image(layers=[LAYER])
    registry.fail(registry.body_of(image.layers[0]), Fault(status=500), times=None)
    steps, result = await run_test_pull(program, "app")
    assert [one["kind"] for one in steps] == ["manifest", "config"]
    assert "500" in result["problem"]


async def test_an_image_that_is_not_for_the_platform_is_named_with_those_that_it_is_for(
    registry, program
):
    registry.add_image(layers=[LAYER], index=True)
    _, result = await run_test_pull(program, "app", platform=FOREIGN)
    assert result["code"] == "invalid_reference"
    assert NATIVE in result["problem"]


async def test_a_damaged_blob_in_the_store_is_found(registry, program):
    image = registry.add_image(layers=[LAYER])
    await program.pull(image)
    await program.wait_for_downloads()
    path = program.root / "blobs" / "sha256" / image.layers[0].removeprefix("sha256:")
    _damage(path)
    _, result = await run_test_pull(program, "app")
    assert (result["code"], "damaged" in result["problem"]) == ("digest_mismatch", True)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
