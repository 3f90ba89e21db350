"""Who may see and change what: logins, sessions, tokens of forms, hosts, other sites, roles."""

import asyncio
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import aiohttp
import pytest

from proxy.server.admin.actor import Actor
from proxy.server.pages.live import MAX_CLIENT_STREAMS
from proxy.server.pages.sessions import MAX_SESSIONS, SessionStore
from tests.fakes.clock import Clock
from tests.server.pages.conftest import READ_SECRET, SECRET
from tests.support.certificates import Authority
from tests.support.page_client import PageClient, make_link

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


async def test_pages_on_loopback_without_a_token_need_no_login(client):
    shown = await client.get("/")
    assert shown.status == 200
    assert "Overview" in shown.text
    assert "Log out" not in shown.text


async def test_every_response_has_the_headers_that_keep_other_sites_out(client):
    for path in ("/", "/nothing", "/login"):
        headers = (await client.get(path, follow=False)).headers
        assert headers["Content-Security-Policy"] == CSP
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Referrer-Policy"] == "same-origin"


async def test_static_files_are_kept_for_long_under_the_hash_of_their_content(client):
    page = (await client.get("/")).text
    path = page.split('rel="stylesheet" href="')[1].partition('"')[0]
    assert path.startswith("/static/style.")
    shown = await client.get(path)
    assert shown.status == 200
    assert shown.headers["Content-Type"] == "text/css; charset=utf-8"
    assert "immutable" in shown.headers["Cache-Control"]
    assert (await client.get("/static/style.css")).status == 404


async def test_the_session_cookie_is_for_this_host_and_no_script(client):
    cookie = (await client.get("/")).headers["Set-Cookie"]
    port = urlsplit(client.url).port
    assert cookie.startswith(f"pullcache-{port}=")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
    assert "Set-Cookie" not in (await client.get("/")).headers


async def test_with_tls_the_session_cookie_is_secure_and_of_this_host_alone(
    make_program, token_settings, tmp_path
):
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("cache", "IP:127.0.0.1")
    program = await make_program(
        trust=authority.trust(),
        server={
            **token_settings,
            "admin_listen": ["127.0.0.1:0", "0.0.0.0:0"],
            "tls_certificate": [certificate],
            "tls_key": [key],
        },
    )
    port = program.admin_addresses[1].rpartition(":")[2]
    url = f"https://127.0.0.1:{port}"
    jar = aiohttp.CookieJar(unsafe=True)
    connector = aiohttp.TCPConnector(ssl=authority.trust())
    async with aiohttp.ClientSession(cookie_jar=jar, connector=connector) as session:
        fields = {"secret": SECRET, "to": "/settings"}
        headers = {"Origin": url, "Accept": "text/html"}
        async with session.post(f"{url}/login", data=fields, headers=headers) as answer:
            assert answer.url.path == "/settings"
            assert "Log out" in await answer.text()
            (cookie,) = answer.history[0].headers.getall("Set-Cookie")
    name, _, attributes = cookie.partition("=")
    assert name == "__Host-pullcache"
    assert {*attributes.split("; ")[1:]} == {"Path=/", "HttpOnly", "SameSite=Strict", "Secure"}


async def test_a_page_is_not_served_under_the_name_of_another_site(client):
    shown = await client.get("/", Host="rebound.example")
    assert shown.status == 403
    assert "loopback" in shown.notice


async def test_with_a_token_a_page_is_served_under_the_names_of_admin_hosts_only(
    make_program, token_settings, make_client
):
    program = await make_program(server={**token_settings, "admin_hosts": ["cache.lan"]})
    client = await make_client(program)
    assert (await client.get("/login", Host="cache.lan")).status == 200
    assert (await client.get("/login", Host="10.1.2.3:5001")).status == 200
    shown = await client.get("/login", Host="rebound.example")
    assert shown.status == 403
    assert "server.admin_hosts" in shown.notice


async def test_a_login_is_asked_for_and_leads_back_to_the_page(closed_program, make_client):
    client = await make_client(closed_program)
    shown = await client.get("/?a=b")
    assert shown.path == "/login?to=/?a%3Db"
    shown = await client.post("/login", {"secret": SECRET, "to": "/?a=b"})
    assert (shown.status, shown.path) == (200, "/?a=b")
    assert "Log out" in shown.text
    shown = await client.post("/logout", {"token": shown.token})
    assert shown.path == "/login"
    assert (await client.get("/")).path.startswith("/login")


@pytest.mark.parametrize(
    ("referer", "target"),
    [("/images?q=app", "/images?q%3Dapp"), ("//other.example/", "/"), ("", "/")],
)
async def test_a_login_that_a_form_needs_leads_back_to_the_page_of_the_form(
    closed_program, make_client, referer, target
):
    client = await make_client(closed_program)
    shown = await client.post("/images/pin", {"image": "app"}, Referer=f"{client.url}{referer}")
    assert shown.path == f"/login?to={target}"


async def test_the_json_of_a_page_needs_the_login_too(closed_program, make_client):
    client = await make_client(closed_program)
    shown = await client.get("/", Accept="application/json")
    assert shown.status == 401
    await client.log_in(SECRET)
    shown = await client.get("/", Accept="application/json")
    assert shown.status == 200
    assert '"state":"serving"' in shown.text


async def test_a_login_leads_to_no_other_site(closed_program, make_client):
    client = await make_client(closed_program)
    for target in ("//evil.example/", "https://evil.example", "/\\evil.example", "javascript:x"):
        shown = await client.post("/login", {"secret": SECRET, "to": target}, follow=False)
        assert shown.headers["Location"] == "/"


async def test_five_wrong_logins_a_minute_are_the_most_of_an_address(closed_program, make_client):
    client = await make_client(closed_program)
    for _ in range(5):
        assert (await client.log_in("wrong")).status == 401
    shown = await client.log_in(SECRET)
    assert shown.status == 429
    assert shown.headers["Retry-After"] == "60"


def test_wrong_logins_are_forgotten_after_a_minute():
    clock = Clock()
    store = SessionStore(clock)
    for _ in range(5):
        store.count_wrong_login("10.0.0.1")
    with pytest.raises(Exception, match="wait a minute"):
        store.check_login_rate("10.0.0.1")
    store.check_login_rate("10.0.0.2")
    clock.advance(61)
    store.check_login_rate("10.0.0.1")


async def test_the_link_of_ui_logs_in_once(closed_program, make_client):
    link = urlsplit(await make_link(closed_program))
    path = f"{link.path}?{link.query}"
    first, second = await make_client(closed_program), await make_client(closed_program)
    assert "Log out" in (await first.get(path, Sec_Fetch_Site="none")).text
    shown = await second.get(path)
    assert shown.status == 401
    assert shown.notice == "The link was used already, or is older than a minute."
    assert shown.text.count("pullcache ui") == 1


def test_a_code_is_good_for_a_minute():
    clock = Clock()
    store = SessionStore(clock)
    late, soon = (store.make_code(Actor(origin="test")) for _ in range(2))
    clock.advance(59)
    assert store.take_code(soon)
    clock.advance(2)
    assert store.take_code(late) is None


async def test_ui_opens_a_port_on_loopback_if_there_is_none(program):
    first, second = await asyncio.gather(make_link(program), make_link(program))
    link = urlsplit(first)
    assert link.hostname == "127.0.0.1"
    assert link.netloc == urlsplit(second).netloc
    async with PageClient(link.netloc) as other, PageClient(link.netloc) as client:
        # Every user of the machine reaches the port.
        assert (await other.get("/")).path.startswith("/login")
        assert (await other.get("/api/v1/status")).status == 401
        assert (await other.get("/metrics")).path.startswith("/login")
        assert (await other.get("/healthz")).text == "ok\n"
        shown = await client.get(f"{link.path}?{link.query}")
        assert shown.status == 200
        assert "Overview" in shown.text


async def test_ui_needs_no_code_where_no_login_is_needed(open_program):
    assert await make_link(open_program) == f"http://{open_program.admin_addresses[0]}/"


async def test_pages_can_be_turned_off(make_program, make_client):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"], "pages": False})
    client = await make_client(program)
    shown = await client.get("/")
    assert shown.status == 404
    assert "openapi.json" in shown.text
    with pytest.raises(Exception, match=r"server\.pages is false"):
        await make_link(program)


async def test_a_reader_sees_pages_without_buttons_and_changes_nothing(closed_program, make_client):
    client = await make_client(closed_program)
    shown = await client.log_in(READ_SECRET)
    assert "Log out" in shown.text
    assert "Go offline" not in shown.text
    refused = await client.post("/jobs/cancel", {"token": shown.token, "id": "x"})
    assert refused.status == 403
    assert "may read only" in refused.notice


async def test_reading_may_be_free_of_a_login(make_program, token_settings, make_client):
    program = await make_program(server={**token_settings, "pages_anonymous_read": True})
    client = await make_client(program)
    shown = await client.get("/")
    assert shown.status == 200
    assert 'href="/login?to=/' in shown.text
    token = (await client.get("/login")).text
    assert "Log in" in token
    assert (await client.post("/jobs/cancel", {"id": "x"})).status == 403


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({"Sec_Fetch_Site": "same-origin"}, True),
        ({"Sec_Fetch_Site": "cross-site"}, False),
        ({"Sec_Fetch_Site": "same-site"}, False),
        ({"Sec_Fetch_Site": "none"}, False),
        ({"Sec_Fetch_Site": "", "Origin": "{url}"}, True),
        ({"Sec_Fetch_Site": "", "Origin": "http://evil.example"}, False),
        ({"Sec_Fetch_Site": "", "Origin": "null"}, False),
        ({"Sec_Fetch_Site": ""}, False),
    ],
)
async def test_a_change_must_come_from_a_page_of_ours(client, headers, is_allowed):
    token = await _token(client)
    sent = {name: value.format(url=client.url) for name, value in headers.items()}
    shown = await client.post("/jobs/cancel", {"token": token, "id": "x"}, **sent)
    assert shown.status == (404 if is_allowed else 403)


async def test_a_change_needs_the_token_of_its_session(client, make_client, open_program):
    other = await make_client(open_program)
    foreign = await _token(other)
    await client.get("/")
    for fields in ({}, {"token": ""}, {"token": "0" * 64}, {"token": foreign}):
        shown = await client.post("/jobs/cancel", {**fields, "id": "x"})
        assert shown.status == 403
        assert "reload the page" in shown.notice


@pytest.mark.parametrize(
    ("media_type", "body", "headers"),
    [
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X-A: b\r\n" * 1000, {}),
        ("multipart/form-data; boundary=b", b"--b\r\nno header\r\n\r\nx\r\n--b--\r\n", {}),
        ("multipart/form-data; boundary=b", b"--b\r\n: no name\r\n\r\nx\r\n--b--\r\n", {}),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="_charset_"\r\n\r\n' + b"x" * 99,
            {},
        ),
        ("multipart/form-data", b"x", {}),
        ("application/x-www-form-urlencoded", b"a=b&" * 2000, {}),
        ("application/x-www-form-urlencoded", b"no gzip", {"Content-Encoding": "gzip"}),
    ],
)
async def test_a_malformed_form_is_the_clients_fault(client, media_type, body, headers):
    sent = {**client.headers, "Content-Type": media_type, **headers}
    async with client.session.post(f"{client.url}/login", data=body, headers=sent) as response:
        assert response.status == 400
        assert "The form cannot be read" in await response.text()


async def test_pages_are_not_loaded_into_pages_of_other_sites(client):
    shown = await client.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors")
    assert shown.status == 403
    assert (
        await client.get("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")
    ).status == 200


def test_a_session_ends_after_an_hour_unused_and_after_twelve_in_any_case():
    clock = Clock()
    store = SessionStore(clock)
    actor = Actor(origin="test")
    idle, used = store.open(actor), store.open(actor)
    for _ in range(12):
        clock.advance(3500)
        assert store.find(used.id)
    assert store.find(idle.id) is None
    clock.advance(3500)
    assert store.find(used.id) is None


def test_the_session_that_was_not_used_for_longest_makes_room():
    store = SessionStore(Clock())
    actor = Actor(origin="test")
    first, second = store.open(actor), store.open(actor)
    store.find(first.id)
    for _ in range(MAX_SESSIONS - 1):
        store.open(actor)
    assert store.find(first.id)
    assert store.find(second.id) is None


async def _token(client: PageClient) -> str:
    """Return the token of the pages, which pages with a form show."""
    return (await client.get("/")).token


async def test_an_action_leads_back_to_its_page_with_its_result(client, open_program):
    shown = await client.submit("/", "/offline", offline="on")
    assert shown.status == 200
    assert shown.path.startswith("/?notice=")
    assert shown.notice == "Offline: no registry is asked."
    assert "Go online" in shown.text
    assert (await client.get(shown.path)).notice == ""


async def test_the_error_of_an_action_is_shown_on_the_page_it_came_from(client):
    shown = await client.submit("/", "/jobs/cancel", id="gone")
    assert shown.status == 200
    assert shown.path.startswith("/?notice=")
    assert "no such job" in shown.notice


async def test_an_unknown_page_says_where_to_start(client):
    shown = await client.get("/nothing/here")
    assert shown.status == 404
    assert "overview" in shown.text


async def test_a_page_is_json_for_a_program(client):
    for shown in (
        await client.get("/", Accept="application/json"),
        await client.get("/?format=json"),
    ):
        assert shown.headers["Content-Type"] == "application/json"
        assert '"state":"serving"' in shown.text
    assert '"code":"not_found"' in (await client.get("/nothing", Accept="application/json")).text


async def test_a_browser_at_the_registrys_address_is_told_where_the_pages_are(
    open_program, make_program, tmp_path
):
    answer = await open_program.ask("/", Accept="text/html,*/*")
    assert answer.status == 200
    assert open_program.admin_addresses[0] in answer.body.decode()
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    other = await make_program(tmp_path / "other")
    assert b"pullcache ui" in (await other.ask("/", Accept="text/html")).body
    assert (await other.ask("/")).status == 404


async def test_live_figures_are_sent_until_the_session_ends(closed_program, make_client):
    client = await make_client(closed_program)
    shown = await client.log_in(SECRET)
    async with client.session.get(f"{client.url}/live?page=/", headers=client.headers) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        first = await stream.content.readline()
        assert first.startswith(b"data: ")
        assert b"serving" in first
        await client.post("/logout", {"token": shown.token})
        assert b"event: end" in await stream.content.read()
    assert (await client.get("/live?page=/nothing")).path.startswith("/live")


async def test_one_session_does_not_take_the_live_figures_of_the_others(
    closed_program, make_client
):
    greedy, other = await make_client(closed_program), await make_client(closed_program)
    for client in (greedy, other):
        await client.log_in(SECRET)
    async with AsyncExitStack() as stack:

        async def open_stream(client: PageClient) -> int:
            opening = client.session.get(f"{client.url}/live?page=/", headers=client.headers)
            return (await stack.enter_async_context(opening)).status

        statuses = [await open_stream(greedy) for _ in range(MAX_CLIENT_STREAMS + 1)]
        assert statuses == [200] * MAX_CLIENT_STREAMS + [429]
        assert await open_stream(other) == 200


async def test_a_form_among_live_figures_leads_back_to_its_page(make_program, make_client):
    server = {"admin_listen": ["127.0.0.1:0"]}
    program = await make_program(server=server, preload=[{"images": ["app:v1"], "every": "6h"}])
    client = await make_client(program)
    url = f"{client.url}/live?page=/schedules"
    async with client.session.get(url, headers=client.headers) as stream:
        line = await stream.content.readline()
    assert b'name=\\"back\\" value=\\"/schedules\\"' in line


async def test_a_reader_who_would_remove_an_image_sees_what_is_needed(closed_program, make_client):
    client = await make_client(closed_program)
    await client.log_in(READ_SECRET)
    shown = await client.get("/remove?image=app:v1")
    assert shown.status == 403
    assert shown.notice == "Your login may read only; removing images needs the role operate."
    assert "log out, and log in" in shown.text
    shown = await client.submit("/settings", "/remove", image="app:v1")
    assert shown.status == 404
    assert shown.notice.startswith("No form is sent to this address")


async def test_a_removal_of_no_image_leads_to_the_list(client):
    shown = await client.get("/remove")
    assert shown.status == 400
    assert shown.notice == "Choose an image in the list, and Remove… beside it."
