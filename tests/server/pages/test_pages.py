"""What the pages show of a store, and what their forms do."""

import asyncio
import re

import pytest

from proxy.cli.api_client import AdminClient
from tests.support.admin_api import NATIVE, stream
from tests.support.page_client import PageClient
from tests.support.program import Program

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
PATHS = ("/", "/images", "/images/app:latest", "/remove?image=app:latest", "/connect", "/settings")


@pytest.fixture
async def filled(registry, open_program: Program) -> Program:
    """A program that has pulled an image."""
    await open_program.pull(registry.add_image("library/app", layers=[b"a" * 5000]))
    await open_program.wait_for_downloads()
    return open_program


@pytest.fixture
async def client(filled: Program, make_client) -> PageClient:
    return await make_client(filled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", PATHS)
async def test_every_page_is_shown_and_has_its_json(client, path):
    shown = await client.get(path)
    assert shown.status == 200, shown.text
    shown = await client.get(path, Accept="application/json")
    assert shown.status == 200
    assert shown.headers["Content-Type"] == "application/json"


async def test_the_empty_overview_leads_to_the_first_pull(open_program, make_client):
    client = await make_client(open_program)
    shown = await client.get("/")
    address = open_program.addresses[0]
    assert "Nothing is cached yet" in shown.text
    assert f"docker pull {address}/library/alpine:latest" in shown.text


async def test_the_empty_overview_of_an_offline_cache_leads_to_the_upload_of_a_bundle(
    make_program, make_client
):
    server = {"admin_listen": ["127.0.0.1:0"]}
    client = await make_client(await make_program(server=server, offline=True))
    shown = await client.get("/")
    assert '<a href="/unplug">Upload a bundle</a>' in shown.text
    assert "docker pull" not in shown.text


async def test_after_a_preload_the_overview_says_why_less_than_nothing_is_saved(
    registry, open_program, make_client
):
    registry.add_image(layers=[b"x" * 40_000], platforms=(NATIVE,))
    client = await make_client(open_program)
    shown = await client.get("/")
    assert "Less than nothing is saved" not in shown.text
    await stream(open_program, "POST", "/api/v1/preload", {"images": [{"image": "app"}]})
    shown = await client.get("/")
    assert re.search("\N{MINUS SIGN}4[0-9.]+ kB", shown.text)
    assert "Less than nothing is saved" in shown.text


async def test_the_overview_says_why_pulls_fail(registry, filled, client):
    await registry.stop()
    for number in range(5):
        await filled.manifest(f"me/other{number}")
    text = (await client.get("/")).text
    assert "Degraded: docker.io cannot be reached" in text
    assert "docker.io is down" in text
    assert "failed in the last hour" in text
    assert ". <em>Next attempt" in text


async def test_the_overview_does_not_say_that_all_is_well_after_the_first_failed_pull(
    registry, filled, client
):
    assert "Serving, and nothing is wrong." in (await client.get("/")).text
    await registry.stop()
    await filled.manifest("me/other")
    text = (await client.get("/")).text
    assert "Serving, but one pull of 1 image failed in the last hour." in text


async def test_the_chart_of_days_says_its_maximum_and_its_days(client):
    text = (await client.get("/")).text
    chart = text[text.index('aria-label="Bytes to clients by day') :].partition("</svg>")[0]
    highest = re.search(r"at most ([0-9.]+ \w+)", chart)
    assert highest
    assert f">{highest[1]}</text>" in chart
    assert len(re.findall(r">\d{4}-\d\d-\d\d</text>", chart)) == 2


async def test_the_images_are_listed_with_what_they_are(client):
    text = (await client.get("/images")).text
    assert 'href="/images/app%3Alatest"' in text or 'href="/images/app:latest"' in text
    for word in ("complete", "official", "amd64"):
        assert word in text


@pytest.mark.parametrize(
    ("query", "is_found"),
    [
        ("q=ap", True),
        ("q=zz", False),
        ("badge=official", True),
        ("state=partial", False),
        ("pinned=yes", False),
        ("pulled=yes", True),
        ("platform=linux/amd64", True),
        ("order=size&upstream=docker.io", True),
    ],
)
async def test_images_are_searched(client, query, is_found):
    text = (await client.get(f"/images?{query}")).text
    assert ("app:latest</a>" in text) == is_found
    assert ("No image fits" in text) != is_found


async def test_a_wrong_query_is_an_error_page(client):
    shown = await client.get("/images?order=nothing")
    assert shown.status == 400
    assert "Invalid enum value" in shown.notice or "nvalid" in shown.notice


async def test_an_image_is_pinned_and_unpinned(client):
    shown = await client.submit("/images", "/images/pin", image="app:latest")
    assert "is pinned" in shown.notice
    assert ">Unpin</button>" in shown.text
    shown = await client.submit("/images", "/images/unpin", image="app:latest")
    assert "not pinned any more" in shown.notice


async def test_the_error_of_a_form_is_shown_on_its_page(client):
    shown = await client.submit("/images", "/images/pin", image="NOT A NAME")
    assert shown.path.startswith("/images?notice=")
    assert "NOT A NAME" in shown.notice


async def test_removing_an_image_is_confirmed_with_what_it_frees(client, filled):
    shown = await client.get("/remove?image=app:latest")
    assert "This frees" in shown.text
    done = await client.post(
        "/images/remove", {"token": shown.token, "back": "/images", "image": "app:latest"}
    )
    assert "was removed" in done.notice
    assert "Nothing is cached yet" in done.text
    assert filled.stored() == set()


async def test_a_pinned_image_is_removed_only_if_that_is_said(client):
    await client.submit("/images", "/images/pin", image="app:latest")
    page = "/remove?image=app:latest"
    shown = await client.submit(page, "/images/remove", image="app:latest")
    assert "is pinned" in shown.notice
    shown = await client.submit(page, "/images/remove", image="app:latest", force="yes")
    assert "was removed" in shown.notice


async def test_a_refresh_is_a_job_with_its_result(client):
    shown = await client.submit("/images", "/images/refresh", image="app:latest")
    assert shown.path.startswith("/jobs/")
    async with asyncio.timeout(10):
        while "running</span>" in shown.text:
            shown = await client.get(shown.path)
    assert "app:latest: " in shown.text


async def test_a_job_leads_back_to_a_page_of_ours(client):
    token = (await client.get("/images")).token
    for target in ("javascript:alert(1)", "//evil.example"):
        fields = {"token": token, "image": "app:latest", "back": target}
        shown = await client.post("/images/refresh", fields)
        assert '<a href="/">Back</a>' in shown.text


async def test_an_image_that_is_not_here_is_an_error_page_that_leads_on(client):
    shown = await client.get("/images/gone:1")
    assert shown.status == 404
    assert "gone:1 is not in the store" in shown.notice
    assert "All images" in shown.text


async def test_hostile_texts_are_shown_as_text(registry, filled, client):
    image = registry.add_image(
        "library/bad",
        layers=[b"x" * 100],
        details={
            "config": {"Labels": {HOSTILE: HOSTILE}, "Env": [HOSTILE], "Cmd": [HOSTILE]},
            "history": [{"created_by": HOSTILE}],
            "created": HOSTILE,
        },
    )
    await filled.pull(image)
    await filled.wait_for_downloads()
    shown = await client.get("/images/bad:latest")
    assert shown.status == 200
    assert "&lt;script&gt;alert(1)" in shown.text
    for path in (
        f"/images?q={HOSTILE}",
        f"/remove?image={HOSTILE}",
        f"/settings?q={HOSTILE}",
        f"/connect?address={HOSTILE}",
        f"/nothing/{HOSTILE}",
        f"/images/{HOSTILE}",
        f"/login?to={HOSTILE}",
        f"/images?upstream={HOSTILE}&order=size",
    ):
        shown_text = (await client.get(path.replace(" ", "%20").replace("#", "%23"))).text
        assert "<script>alert" not in shown_text
        assert "<img src=x" not in shown_text


async def test_the_pull_lines_have_the_address_of_the_page(client, filled):
    text = (await client.get("/images/app:latest")).text
    address = filled.addresses[0]
    assert f"docker pull {address}/library/app:latest" in text
    assert f"podman pull --tls-verify=false {address}/library/app:latest" in text
    assert f"ctr images pull --plain-http {address}/library/app:latest" in text


async def test_connect_has_the_files_with_the_address_filled_in(client, filled):
    for name in ("docker", "docker-mirror", "containerd", "podman", "buildkit", "k3s", "crio"):
        shown = await client.get(f"/connect?client={name}")
        assert f"http://{filled.addresses[0]}" in shown.text or filled.addresses[0] in shown.text
    shown = await client.get("/connect?client=podman&address=https://cache.lan")
    assert "cache.lan" in shown.text


async def test_settings_tell_where_values_come_from_and_no_secret(
    make_program, tmp_path, make_client, monkeypatch
):
    monkeypatch.setenv("PULLCACHE_LOG_LEVEL", "info")
    program = await make_program(
        server={"admin_listen": ["127.0.0.1:0"]},
        upstreams={"ghcr.io": {"username": "me", "password": "hunter2"}},
    )
    client = await make_client(program)
    text = (await client.get("/settings")).text
    assert "PULLCACHE_LOG_LEVEL" in text
    assert "***" in text
    assert "hunter2" not in text
    changed = (await client.get("/settings?changed=yes&q=listen")).text
    assert "admin_listen" in changed
    assert "max_connections" not in changed


async def test_pages_of_many_images_have_a_next_page(filled, client, monkeypatch):
    api = AdminClient(filled.root)
    names = [f"me/app{number:03}:1" for number in range(150)]
    await asyncio.to_thread(api.post, "/api/v1/images/pin", {"images": names})
    first = (await client.get("/images")).text
    assert "The first 100 images" in first
    path = first.split('class="button" href="')[1].partition('"')[0].replace("&amp;", "&")
    second = (await client.get(path)).text
    assert "me/app149:1" in second
    assert "Next page" not in second
    ordered = (await client.get("/images?order=pulls")).text
    assert "Next page" in ordered
