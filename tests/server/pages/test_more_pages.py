"""The pages Search, Unplug, Activity, Upstreams, Storage, Policy and Schedules."""

import asyncio
import re
from html import unescape
from urllib.parse import quote

import aiohttp
import pytest

from tests.fakes.hub import FakeHub, HubRepository
from tests.fakes.images import push_manifest
from tests.server.pages.conftest import READ_SECRET
from tests.support.admin_api import APP, NATIVE, call, check_images
from tests.support.page_client import PageClient, Shown

ADMIN = {"admin_listen": ["127.0.0.1:0"]}
PATHS = ("/search", "/unplug", "/activity", "/upstreams", "/storage", "/policy", "/schedules")
HOSTILE = "<script>alert(1)</script>"


async def wait_for_job(client: PageClient, shown: Shown) -> Shown:
    """Look at the page of a job until it has ended."""
    assert shown.path.startswith("/jobs/"), (shown.path, shown.notice)
    async with asyncio.timeout(20):
        while "running</span>" in (page := await client.get(shown.path)).text:
            pass
    return page


async def download(client: PageClient, path: str, fields: dict[str, str]) -> bytes:
    """Post a form whose answer is a file."""
    async with client.session.post(client.url + path, data=fields, headers=client.headers) as got:
        assert got.status == 200
        assert got.headers["Content-Disposition"].endswith('.tar.zst"')
        return await got.read()


async def upload(client: PageClient, token: str, content: bytes) -> Shown:
    """Upload a bundle as a browser does."""
    form = aiohttp.FormData()
    form.add_field("token", token)
    form.add_field("back", "/unplug")
    form.add_field("bundle", content, filename="bundle.tar.zst")
    url = f"{client.url}/unplug/import"
    async with client.session.post(url, data=form, headers=client.headers) as got:
        return Shown(got.status, got.headers, await got.text(), got.url.raw_path_qs)


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_without_content_says_what_to_do_and_has_a_json_twin(client, path):
    shown = await client.get(path)
    assert shown.status == 200
    assert 'class="empty"' in shown.text or path in ("/unplug", "/upstreams")
    twin = await client.get(f"{path}?format=json")
    assert twin.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize(
    "path", [*PATHS, "/search?q=nginx", "/unplug?list=nginx", "/storage?glob=*"]
)
async def test_a_reader_sees_no_form_that_changes_anything(closed_program, make_client, path):
    client = await make_client(closed_program)
    await client.post("/login", {"secret": READ_SECRET, "to": "/"})
    shown = await client.get(path)
    assert shown.status == 200
    actions = set(re.findall(r'<form method="post" action="([^"]+)"', shown.text))
    assert actions <= {"/logout", "/unplug", "/upstreams/check"}


@pytest.mark.parametrize(
    "path",
    [
        f"/search?q={quote(HOSTILE)}",
        f"/unplug?list={quote(HOSTILE)}",
        f"/activity?image={quote(HOSTILE)}&client={quote(HOSTILE)}",
        f"/storage?glob={quote(HOSTILE)}",
        f"/policy?image={quote(HOSTILE)}&decision={quote(HOSTILE)}",
    ],
)
async def test_what_strangers_write_is_escaped(registry, make_program, make_client, path):
    program = await make_program(server=ADMIN)
    await program.ask(f"/v2/{quote(HOSTILE)}/manifests/latest", User_Agent=HOSTILE)
    client = await make_client(program)
    for each in (path, "/activity"):
        shown = await client.get(each)
        assert shown.status in (200, 400)
        assert "<script>alert" not in shown.text


async def test_a_search_shows_badges_and_what_is_here_and_pulls_an_image(
    registry, make_program, make_client
):
    hub = FakeHub()
    await hub.start()
    hub.repositories = [
        HubRepository("nginx", "official", description="A server"),
        HubRepository("evil/nginx", None, HOSTILE, HOSTILE),
    ]
    try:
        upstream = {"url": registry.url, "facts_url": hub.url}
        program = await make_program(server=ADMIN, upstreams={"docker.io": upstream})
        push_manifest(registry, "library/nginx", [b"layer"], tag="1.27", platform=NATIVE)
        client = await make_client(program)
        shown = await client.get("/search?q=nginx")
        assert "official</span>" in shown.text
        assert "<script>alert" not in shown.text
        fields = {"token": shown.token, "back": "/search", "image": "nginx", "tag": "1.27"}
        page = await wait_for_job(
            client, await client.post("/search/pull", {**fields, "pin": "yes", "q": "nginx"})
        )
        assert '<a href="/images/nginx%3A1.27">nginx:1.27</a> is here' in page.text
        assert "done</span>" in page.text
        missing = {**fields, "tag": "none"}
        page = await wait_for_job(client, await client.post("/search/pull", missing))
        assert "ended with failures</span>" in page.text
        (image,) = await check_images(program, "nginx:1.27")
        assert image["state"] == "complete"
        assert "1 tag</a>" in (await client.get("/search?q=nginx")).text
        shown = await client.post("/search/pull", {**fields, "image": ""})
        assert "name of the image" in shown.notice
        shown = await client.get("/search?q=ghcr.io/owner/app")
        assert "may not pull from ghcr.io, only from: docker.io" in shown.text
        assert "by its name" not in shown.text
        shown = await client.get("/search?q=index.docker.io/me/none")
        assert "Pull index.docker.io/me/none by its name" in shown.text
    finally:
        await hub.stop()


async def test_a_list_is_checked_the_rest_preloaded_and_the_bundle_carried(
    registry, make_program, make_client, tmp_path
):
    program = await make_program(server=ADMIN)
    push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    push_manifest(registry, "me/other", [b"other"], tag="v1", platform=NATIVE)
    client = await make_client(program)
    shown = await client.get("/unplug")
    compose = "services:\n  a:\n    image: app:v1\n  b:\n    image: me/other:v1\n"
    fields = {"token": shown.token, "back": "/unplug"}
    shown = await client.post("/unplug", {**fields, "text": compose, "platform": ""})
    assert "Not yet: 2 of 2 are missing" in shown.text
    assert "docker compose" in shown.text
    listed = {**fields, "text": compose, "platform": "", "back": shown.path}
    page = await wait_for_job(
        client, await client.post("/unplug/preload", {**listed, "pin": "yes"})
    )
    assert "2 of 2 images are here" in page.text
    back = unescape(re.findall(r'href="(/unplug\?[^"]+)">Back', page.text)[0])
    assert "Yes: all of it is here" in (await client.get(back)).text
    assert "Nothing is missing." in (await client.post("/unplug/preload", listed)).notice
    bundle = await download(client, "/unplug/bundle", listed)
    other = await make_program(tmp_path / "other", server=ADMIN)
    second = await make_client(other)
    token = (await second.get("/unplug")).token
    shown = await upload(second, token, bundle)
    assert "2 of 2 images are here now" in shown.notice
    assert shown.path.startswith("/images")
    shown = await upload(second, token, b"no tar")
    assert shown.notice


async def test_a_list_that_is_none_and_a_long_one_are_answered(client):
    token = (await client.get("/unplug")).token
    fields = {"token": token, "back": "/unplug"}
    assert "Paste a list" in (await client.post("/unplug", {**fields, "text": " "})).notice
    text = "\n".join(f"me/app{number}:v1" for number in range(1000))
    shown = await client.post("/unplug", {**fields, "text": text})
    assert "Not yet: 1000 of 1000 are missing" in shown.text
    assert shown.text.count('<th scope="row">') == 100
    shown = await client.get(f"/unplug?list={quote('ok:1' + chr(10) + 'NOT ONE IMAGE')}")
    assert "Line 2" in shown.text


async def test_a_failing_pull_is_explained_at_once(registry, make_program, make_client):
    program = await make_program(server=ADMIN, fetch={"attempts": 1})
    client = await make_client(program)
    async with registry.down(), asyncio.timeout(20):
        while (await call(program, "get", "/api/v1/upstreams"))[0]["up"]:
            await program.manifest("me/app")
        activity = (await client.get("/activity")).text
        assert "<strong>docker.io</strong> is down" in activity
        assert "failed</span>" in activity
        assert "docker.io/me/app:latest" in activity
        upstreams = (await client.get("/upstreams")).text
        assert "down</span>" in upstreams
        assert "Asked again" in upstreams
        token = (await client.get("/upstreams")).token
        shown = await client.post("/upstreams/check", {"token": token, "back": "/upstreams"})
        assert "docker.io" in shown.notice


async def test_a_test_pull_is_a_job_that_says_what_helps(registry, make_program, make_client):
    program = await make_program(server=ADMIN)
    push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    client = await make_client(program)
    fields = {"token": (await client.get("/activity")).token, "layers": "yes"}
    for image, text in (("app:v1", "It works"), ("me/none:1", "What helps")):
        shown = await client.post("/activity/test-pull", {**fields, "image": image})
        assert text in (await wait_for_job(client, shown)).text


async def test_images_are_removed_by_a_glob_after_their_preview(
    registry, make_program, make_client
):
    program = await make_program(server=ADMIN)
    for name in ("me/one", "me/two"):
        await program.pull(registry.add_image(name, layers=[name.encode() * 1000]))
    await program.wait_for_downloads()
    client = await make_client(program)
    shown = await client.get("/storage?glob=me/*")
    assert "2 images would go" in shown.text
    assert "By repository" in shown.text
    await call(program, "post", "/api/v1/images/pin", {"images": ["me/one"]})
    notice = (await client.get("/storage?glob=me/*")).notice
    assert notice == "me/one:latest is pinned; unpin it first, or select Pinned ones too"
    assert "2 images would go" in (await client.get("/storage?glob=me/*&pinned=yes")).text
    await call(program, "post", "/api/v1/images/unpin", {"images": ["me/one"]})
    shown = await client.post("/storage/remove", {"token": shown.token, "glob": "me/*"})
    assert "2 images removed" in shown.notice
    assert "not in the store" in (await client.get("/storage?glob=me/*")).notice


async def test_an_exception_is_made_and_ended_and_decisions_are_shown(
    registry, make_program, make_client
):
    rule = {"images": ["*"], "mode": "enforce", "deny_tags": ["v1"], "min_age": "1d"}
    program = await make_program(server=ADMIN, policy=[rule])
    digest = push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    assert (await program.manifest(APP, "v1")).status == 403
    client = await make_client(program)
    shown = await client.get("/policy?image=app:v1")
    assert "Tags that match v1 are refused." in shown.text
    assert "refused</span>" in shown.text
    fields = {"token": shown.token, "back": "/policy", "image": f"app@{digest}"}
    shown = await client.post("/policy/exceptions/add", {**fields, "days": "x", "reason": "r"})
    assert "how many days" in shown.notice
    shown = await client.post("/policy/exceptions/add", {**fields, "days": "7", "reason": "test"})
    assert "allowed for 7 days" in shown.notice
    image = f"docker.io/{APP}@{digest}"
    assert image[:40] in shown.text
    shown = await client.post("/policy/exceptions/remove", {**fields, "image": image})
    assert "has ended" in shown.notice


async def test_a_schedule_is_shown_and_run(registry, make_program, make_client):
    push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    preload = [{"images": ["app:v1", "me/unknown:1"], "every": "6h"}]
    program = await make_program(server=ADMIN, preload=preload)
    client = await make_client(program)
    async with asyncio.timeout(20):
        while "1 of 2 images complete" not in (shown := await client.get("/schedules")).text:
            pass
    assert "me/unknown:1" in shown.text
    fields = {"token": shown.token, "back": "/schedules", "name": "preload[1]"}
    assert "preload[1] runs now" in (await client.post("/schedules/run", fields)).notice
    shown = await client.post("/schedules/run", {**fields, "name": "preload[9]"})
    assert "no schedule" in shown.notice
