"""`pullcache inspect --packages`, `sbom` and `images --package`."""

import json

import pytest

from tests.support.admin_api import APP
from tests.support.commands import run, run_on
from tests.support.layers import make_layer
from tests.support.preload_api import run_preload
from tests.support.sboms import (
    CYCLONEDX_TYPE,
    DEBIAN,
    PYTHON,
    make_cyclonedx,
    pull_whole,
    push_artifact,
)


@pytest.fixture
async def app(registry, program):
    """`app:latest` with packages of Debian and Python, of which nothing was read."""
    image = registry.add_image(APP, layers=[DEBIAN, PYTHON])
    await pull_whole(program, image)
    return image


async def test_packages_are_a_table_below_what_was_read(program, app):
    done = await run_on(program, "inspect", "app", "--packages")
    assert (done.exit_code, done.stderr) == (0, "")
    head, table = done.stdout.split("\n\n")
    assert "from" in head
    assert "its layers" in head
    assert "Debian GNU/Linux 12 (bookworm)" in head
    assert "Go, Rust and Java programs, and files that were copied, are not read" in head
    lines = table.splitlines()
    assert lines[0].split() == ["PACKAGE", "VERSION", "KIND", "SOURCE", "FILE"]
    assert lines[2].split() == [
        "libssl3",
        "3.0.14-1~deb12u2",
        "deb",
        "openssl",
        "var/lib/dpkg/status",
    ]
    assert len(lines) == 5


async def test_packages_are_printed_as_json(program, app):
    done = await run_on(program, "inspect", "app", "--packages", "--json")
    assert len(json.loads(done.stdout)["contents"]["packages"]) == 4


async def test_an_attached_sbom_is_named(registry, program, app):
    sbom = make_cyclonedx(("django", "5.0"))
    push_artifact(registry, APP, sbom, CYCLONEDX_TYPE, subject=app.digest)
    await run_preload(program, "app:latest")
    done = await run_on(program, "inspect", "app", "--packages")
    assert "the attached SBOM sha256:" in done.stdout
    assert "CycloneDX-1.6" in done.stdout


async def test_what_has_no_packages_is_said(registry, program):
    await pull_whole(program, registry.add_image(APP, layers=[make_layer({"bin/app": b"x"})]))
    done = await run_on(program, "inspect", "app", "--packages")
    assert "PACKAGE" not in done.stdout
    digest = push_artifact(registry, APP, b"x", "application/x")
    registry.move_tag(APP, "chart", digest)
    await run_preload(program, "app:chart")
    done = await run_on(program, "inspect", "app:chart", "--packages")
    assert "nothing: it has no file system" in done.stdout


async def test_an_sbom_is_printed(program, app):
    done = await run_on(program, "sbom", "app")
    document = json.loads(done.stdout)
    assert document["bomFormat"] == "CycloneDX"
    assert len(document["components"]) == 5
    done = await run_on(program, "sbom", "app", "--format", "spdx")
    assert json.loads(done.stdout)["spdxVersion"] == "SPDX-2.3"


async def test_images_with_a_package_are_listed(registry, program, app):
    await pull_whole(program, registry.add_image("me/other", "v2", layers=[PYTHON]))
    done = await run_on(program, "images", "--package", "openssl<3.0.15")
    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
    assert done.stderr == "0 stored images read; 2 not read: --scan reads them first\n"
    done = await run_on(program, "images", "--package", "openssl<3.0.15", "--scan")
    assert "read app:latest (linux/amd64): 4 packages" in done.stderr
    assert done.stderr.endswith("2 stored images read\n")
    _, first, second = (line.split() for line in done.stdout.splitlines())
    assert first[:4] == ["app:latest", "linux/amd64", "openssl", "3.0.14-1~deb12u2"]
    assert second[2:] == ["libssl3", "3.0.14-1~deb12u2", "deb", "openssl"]
    done = await run_on(program, "images", "me/*", "--package", "flask", "--json")
    (match,) = json.loads(done.stdout)["matches"]
    assert match["images"] == ["me/other:v2"]


async def test_images_that_cannot_be_read_are_a_partial_success(registry, program):
    image = registry.add_image(APP, layers=[DEBIAN])
    await program.manifest(APP, "latest")
    done = await run_on(program, "images", "--package", "openssl", "--scan")
    assert done.exit_code == 4
    assert "did not read app:latest" in done.stderr
    assert image


@pytest.mark.parametrize(
    "arguments",
    [
        ("images", "--scan"),
        ("images", "--package", "x", "--never-pulled"),
        ("inspect", "app", "--platform", "linux/arm64"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, arguments):
    assert run(*arguments, "--store", tmp_path).exit_code == 2


async def test_an_sbom_that_could_not_be_fetched_has_a_line_of_its_own(registry, program, app):
    async with registry.down():
        done = await run_on(program, "inspect", "app", "--packages")
    (line,) = [line for line in done.stdout.splitlines() if "not fetched" in line]
    assert line.startswith("SBOMs      not fetched: docker.io")
