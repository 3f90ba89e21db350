"""The packages of an image on its page, what a scanner found, and the images that have a package."""

import asyncio

import pytest

from tests.support.admin_api import APP
from tests.support.layers import make_layer
from tests.support.page_client import PageClient
from tests.support.program import Program
from tests.support.sboms import DEBIAN, PYTHON, pull_whole
from tests.support.scanners import GRYPE, make_scanner

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
async def client(registry, open_program: Program, make_client, tmp_path) -> PageClient:
    """A browser at the pages of a cache that has `app:latest` and a scanner."""
    await pull_whole(open_program, registry.add_image(APP, layers=[DEBIAN, PYTHON]))
    scanner = make_scanner(tmp_path, GRYPE)
    assert await open_program.reload(contents={"scanner": scanner})
    return await make_client(open_program)  # type: ignore[no-any-return]


async def run_job(client: PageClient, action: str, **fields: str) -> str:
    """Post a form that starts a job; return the page of the job once it has ended."""
    shown = await client.submit("/images", action, **fields)
    while ">running<" in shown.text:
        await asyncio.sleep(0.02)
        shown = await client.get(shown.path)
    return shown.text


async def test_packages_are_read_by_a_button_and_filtered(client):
    shown = await client.get("/images/app:latest")
    assert "They were not read yet." in shown.text
    text = await run_job(client, "/packages/read", image="app:latest", platform="")
    assert "app:latest: 4 packages" in text
    text = (await client.get("/images/app:latest")).text
    for word in ("its layers", "Debian GNU/Linux 12", "libssl3", "3.0.14-1~deb12u2", "flask"):
        assert word in text
    assert "Go, Rust and Java programs" in text
    text = (await client.get("/packages?image=app:latest&q=ssl")).text
    assert "libssl3" in text
    assert "flask" not in text
    text = (await client.get("/packages?image=app:latest&q=zzz")).text
    assert "No package has" in text


async def test_findings_are_shown_with_fixed_version_and_date_and_as_csv(client):
    await run_job(client, "/packages/read", image="app:latest", platform="")
    text = await run_job(client, "/packages/scan", image="app:latest", platform="")
    assert "1 critical" in text
    text = (await client.get("/images/app:latest")).text
    for word in ("CVE-2024-5535", "3.0.15-1~deb12u1", "grype 0.85.0", "2026-11-29", "Scan again"):
        assert word in text
    done = await client.submit("/images", "/packages/findings.csv", image="app:latest", platform="")
    assert done.headers["Content-Type"].startswith("text/csv")
    assert done.text.splitlines()[0] == "id,severity,package,installed,fixed,title"


async def test_without_a_report_there_is_no_csv(client):
    done = await client.submit("/images", "/packages/findings.csv", image="app:latest", platform="")
    assert "This image was not scanned" in done.text


async def test_images_are_found_by_a_package(registry, open_program, client):
    await pull_whole(open_program, registry.add_image("me/other", layers=[PYTHON]))
    text = (await client.get("/images?package=openssl%3C3.0.15")).text
    assert "2 not read" in text
    assert "No image that was read has it" in text
    text = await run_job(client, "/packages/read-all")
    assert "4 packages" in text
    text = (await client.get("/images?package=openssl%3C3.0.15")).text
    assert 'title="app:latest"' in text
    assert "me/other" not in text
    assert "2 images read" in text
    text = (await client.get("/images?package=openssl%3C")).text
    assert "is no question about a package" in text


async def test_hostile_names_of_packages_are_escaped(registry, open_program, client):
    status = f"Package: {HOSTILE}\nVersion: {HOSTILE}\n".encode()
    layer = make_layer({"var/lib/dpkg/status": status})
    await pull_whole(open_program, registry.add_image("me/hostile", layers=[layer]))
    await run_job(client, "/packages/read", image="me/hostile:latest", platform="")
    for path in ("/images/me/hostile:latest", f"/images?package={HOSTILE[1:7]}"):
        assert HOSTILE not in (await client.get(path)).text
    assert "&lt;script&gt;" in (await client.get("/images/me/hostile:latest")).text


async def test_an_image_that_is_gone_has_no_packages(client):
    text = (await client.get("/packages?image=gone:1")).text
    assert "is not in the store" in text
