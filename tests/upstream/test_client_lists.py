"""Redirects and pages: followed a few times, and never to where a stranger wants us."""

import pytest

from proxy.errors import UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.reference import Tag
from proxy.upstream.client import MAX_PAGES
from tests.fakes.faults import HTML, Fault

APP = "library/app"
LATEST = Tag("latest")


class TestRedirects:
    """Followed a few times, to http(s), without credentials for strangers."""

    @pytest.mark.parametrize(
        "location",
        ["", "file:///etc/passwd", "ftp://x/", "http://", "//", "http://[", "javascript:alert(1)"],
    )
    async def test_u25_to_what_is_no_web_address_is_refused(self, registry, upstream, location):
        registry.add_image()
        fault = Fault(status=307, body=b"", headers={"Location": location})
        registry.fail("/manifests/", fault, times=None)
        with pytest.raises(UpstreamError):
            await upstream.fetch_manifest(APP, LATEST)

    async def test_u25_a_loop_ends(self, registry, upstream):
        registry.add_image()
        fault = Fault(status=302, body=b"", headers={"Location": "/v2/library/app/manifests/x"})
        registry.fail("/manifests/", fault, times=None)
        with pytest.raises(UpstreamError, match="302"):
            await upstream.fetch_manifest(APP, LATEST)
        assert registry.count("/manifests/") < 10

    async def test_a_manifest_may_be_redirected_too(self, registry, upstream):
        image = registry.add_image()
        target = f"/v2/library/app/manifests/{image.digest}"
        registry.fail("/latest", Fault(status=301, body=b"", headers={"Location": target}), times=2)
        registry.auth = False
        assert str((await upstream.fetch_manifest(APP, LATEST)).digest) == image.digest


class TestLists:
    """Tags and referrers, of all pages."""

    async def test_tags_of_all_pages(self, registry, upstream):
        image = registry.add_image(tag="a")
        for tag in "bcdefg":
            registry.move_tag(APP, tag, image.digest)
        registry.tags_page = 2
        assert await upstream.fetch_tags(APP) == list("abcdefg")
        assert registry.count("/token") == 1

    async def test_m12_a_list_without_end_is_cut(self, registry, upstream):
        registry.add_image()
        link = {"Link": '</v2/library/app/tags/list?last=a&n=1>; rel="next"'}
        registry.fail("tags/list", Fault(headers=link), times=None)
        with pytest.raises(UpstreamError, match="more than"):
            await upstream.fetch_tags(APP)
        assert registry.count("tags/list") <= MAX_PAGES + 2

    async def test_m12_a_link_does_not_choose_whom_we_ask(self, registry, upstream):
        registry.add_image()
        link = {"Link": '<http://192.0.2.1/v2/other/tags/list?last=a>; rel="next"'}
        registry.fail("tags/list", Fault(headers=link))
        registry.fail("tags/list", Fault(headers=link))
        await upstream.fetch_tags(APP)
        assert {seen.target.partition("?")[0] for seen in registry.seen("tags/list")} == {
            "/v2/library/app/tags/list"
        }

    @pytest.mark.parametrize("said", [b"", b"[]", b'{"tags":[1]}', b'{"tags":"a"}', b"[" * 9999])
    async def test_what_is_no_list_of_tags_is_refused(self, registry, upstream, said):
        registry.add_image()
        registry.fail("tags/list", Fault(status=200, body=said), times=None)
        with pytest.raises(UpstreamError):
            await upstream.fetch_tags(APP)

    async def test_no_tags_may_be_null(self, registry, upstream):
        registry.add_image()
        registry.fail("tags/list", Fault(status=200, body=b'{"tags":null}'), times=None)
        assert await upstream.fetch_tags(APP) == []

    async def test_referrers_are_given_as_they_came(self, registry, upstream):
        image = registry.add_image()
        (page,) = await upstream.fetch_referrers(APP, Digest.parse(image.digest))
        assert b'"manifests": []' in page

    async def test_a_login_page_is_no_list(self, registry, upstream):
        registry.fail("tags/list", HTML, times=None)
        with pytest.raises(UpstreamError, match="no list of tags"):
            await upstream.fetch_tags(APP)
