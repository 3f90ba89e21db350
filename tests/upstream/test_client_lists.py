"""Redirects and lists with several pages, which upstream controls only within limits."""

import json

import pytest

from proxy.errors import UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from tests.fakes.content import OCI_INDEX
from tests.fakes.faults import HTML, Fault

APP = "library/app"
INDEX = {"Content-Type": OCI_INDEX}
LATEST = Tag("latest")
NEXT = "/v2/library/app/tags/list?last=a,b&n=1"
NEXT_LINKS = [
    f'<{NEXT}>; rel="next"',
    f"<{NEXT}>;rel=next",
    f'<{NEXT}> ; REL = "NEXT"',
    f'<{NEXT}>; Rel="prev Next last"',
    f'<{NEXT}>; title="a, b; <c>"; rel="next"',
    f'</first>; rel="first", <{NEXT}>; rel="next", </last>; rel=last',
    f'<{NEXT}>; rel="next"; rel="prev"',
    f'</x>; rel="prev"; rel="next", <{NEXT}>; rel="next"',
    f'<https://registry.example{NEXT}#fragment>; rel="next"',
    '<?last=a,b&n=1>; rel="next"',
    f", ,<{NEXT}>; rel*=x; rel=next,",
]


class TestRedirects:
    """They are followed a few times, only to http(s), and without credentials to other hosts."""

    @pytest.mark.parametrize(
        "location",
        ["", "file:///etc/passwd", "ftp://x/", "http://", "//", "http://[", "javascript:alert(1)"],
    )
    async def test_u25_a_target_that_is_not_http_is_rejected(self, registry, upstream, location):
        registry.add_image()
        fault = Fault(status=307, body=b"", headers={"Location": location})
        registry.fail("/manifests/", fault, times=None)
        with pytest.raises(UpstreamError):
            await upstream.fetch_manifest(APP, LATEST)

    async def test_u25_a_redirect_loop_ends(self, registry, upstream):
        registry.add_image()
        fault = Fault(status=302, body=b"", headers={"Location": "/v2/library/app/manifests/x"})
        registry.fail("/manifests/", fault, times=None)
        with pytest.raises(UpstreamError, match="302"):
            await upstream.fetch_manifest(APP, LATEST)
        assert registry.count("/manifests/") == 10

    @pytest.mark.parametrize(("count", "is_followed"), [(9, True), (10, False)])
    async def test_as_many_redirects_are_followed_as_by_clients(
        self, registry, upstream, count, is_followed
    ):
        image = registry.add_image()
        registry.auth = False
        manifests = "/v2/library/app/manifests"
        for number in range(count):
            target = f"hop{number + 1}" if number < count - 1 else image.digest
            fault = Fault(status=302, body=b"", headers={"Location": f"{manifests}/{target}"})
            registry.fail(f"/manifests/{f'hop{number}' if number else 'latest'}$", fault)
        if is_followed:
            assert str((await upstream.fetch_manifest(APP, LATEST)).digest) == image.digest
        else:
            with pytest.raises(UpstreamError, match="302"):
                await upstream.fetch_manifest(APP, LATEST)

    async def test_a_manifest_may_be_redirected(self, registry, upstream):
        image = registry.add_image()
        target = f"/v2/library/app/manifests/{image.digest}"
        registry.fail("/latest", Fault(status=301, body=b"", headers={"Location": target}), times=2)
        registry.auth = False
        assert str((await upstream.fetch_manifest(APP, LATEST)).digest) == image.digest


class TestLists:
    """Tags and referrers are fetched from all pages."""

    async def test_tags_are_collected_from_all_pages(self, registry, upstream):
        image = registry.add_image(tag="a")
        for tag in "bcdefg":
            registry.move_tag(APP, tag, image.digest)
        registry.tags_page = 2
        assert list(await upstream.fetch_tags(APP)) == list("abcdefg")
        assert registry.count("/token") == 1

    async def test_m12_an_endless_list_is_an_error(self, registry, upstream):
        registry.add_image()
        link = {"Link": '</v2/library/app/tags/list?last=a&n=1>; rel="next"'}
        registry.fail("tags/list", Fault(headers=link), times=None)
        with pytest.raises(UpstreamError, match="do not lead to an end"):
            await upstream.fetch_tags(APP)
        assert registry.count("tags/list") <= 3

    async def test_m12_a_link_does_not_choose_host_or_path(self, registry, upstream):
        registry.add_image()
        link = {"Link": '<http://192.0.2.1/v2/other/tags/list?last=a>; rel="next"'}
        registry.fail("tags/list", Fault(headers=link))
        registry.fail("tags/list", Fault(headers=link))
        await upstream.fetch_tags(APP)
        assert {seen.target.partition("?")[0] for seen in registry.seen("tags/list")} == {
            "/v2/library/app/tags/list"
        }

    @pytest.mark.parametrize("body", [b"", b"[]", b'{"tags":5}', b'{"tags":"a"}', b"[" * 9999])
    async def test_an_invalid_tag_list_is_an_error(self, registry, upstream, body):
        registry.add_image()
        registry.fail("tags/list", Fault(status=200, body=body), times=None)
        with pytest.raises(UpstreamError):
            await upstream.fetch_tags(APP)

    @pytest.mark.parametrize(
        ("body", "tags"),
        [
            (b"null", []),
            (b"{}", []),
            (b'{"name":null}', []),
            (b'{"name":5,"tags":null}', []),
            (b'{"tags":[]}', []),
            (b'{"tags":[null,"a",1]}', ["a"]),
            (b'{"Tags":["a"]}', ["a"]),
            (b'{"tags":["a","\xff"]}', ["a"]),  # a tag has only ASCII characters
            (b'{"tags":["a"]}\n<!-- page -->', ["a"]),
        ],
    )
    async def test_a_list_may_have_any_form_that_clients_read(self, registry, upstream, body, tags):
        registry.add_image()
        registry.fail("tags/list", Fault(status=200, body=body), times=None)
        assert list(await upstream.fetch_tags(APP)) == tags

    async def test_a_list_of_more_than_a_hundred_pages_is_complete(self, registry, upstream):
        image = registry.add_image()
        tags = sorted(["latest", *(f"v{number}" for number in range(250))])
        for tag in tags:
            registry.move_tag(APP, tag, image.digest)
        registry.tags_page = 2
        assert list(await upstream.fetch_tags(APP)) == tags

    @pytest.mark.parametrize("link", NEXT_LINKS)
    async def test_the_next_page_is_found_in_any_link_of_rfc_8288(self, registry, upstream, link):
        registry.add_image()
        page = Fault(status=200, body=b'{"tags":["a"]}', headers={"Link": link})
        registry.fail(r"tags/list\?n=1000", page, times=None)
        last = Fault(status=200, body=b'{"tags":["b"]}')
        registry.fail(r"tags/list\?last=a,b&n=1$", last, times=None)
        assert list(await upstream.fetch_tags(APP)) == ["a", "b"]

    async def test_referrers_are_returned_unchanged(self, registry, upstream):
        image = registry.add_image()
        entry = {"digest": "sha256:x", "mediaType": None, "unknown": [{"a": 1}]}
        body = json.dumps({"manifests": [entry]}).encode()
        registry.fail("/referrers/", Fault(status=200, body=body, headers=INDEX), times=None)
        referrers = await upstream.fetch_referrers(APP, Digest.parse(image.digest))
        assert referrers.decode() == [entry]

    async def test_a_login_page_is_an_invalid_tag_list(self, registry, upstream):
        registry.fail("tags/list", HTML, times=None)
        with pytest.raises(UpstreamError, match="invalid tag list"):
            await upstream.fetch_tags(APP)
