"""Read registries' responses: bodies up to a limit, headers only if they are valid."""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from aiohttp import ClientResponse, hdrs

from proxy.errors import InvalidDigestError, UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.json_object import decode_object
from proxy.oci.manifest import MAX_MANIFEST_SIZE, OCI_INDEX
from proxy.oci.referrers import EncodedReferrers
from proxy.oci.tags import EncodedTags, encode_tags
from proxy.upstream.encoding import gunzip, is_gzip_encoded
from proxy.upstream.link_header import find_link

MAX_LIST_SIZE = 8 << 20
MAX_SEARCH_SIZE = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a response states about the content that was requested; None where it states nothing."""

    size: int | None
    digest: Digest | None
    is_html: bool


def is_proof(evidence: Evidence, digest: Digest, size: int | None) -> bool:
    """Tell whether the registry could not have responded so without having the content.

    `size` is that of the content, None if it is unknown.
    """
    if evidence.is_html:  # a login page that answers every request
        return False
    if evidence.digest is not None and evidence.digest != digest:
        return False
    if evidence.size is not None and size is not None:
        return evidence.size == size
    return evidence.digest == digest


class _TagsPage(msgspec.Struct):
    tags: msgspec.Raw = msgspec.Raw(b"null")


class _ReferrersPage(msgspec.Struct):
    manifests: list[msgspec.Raw] | None
    media_type: str | None = msgspec.field(name="mediaType", default=None)


async def read_bounded(response: ClientResponse, limit: int) -> bytes:
    """Return the whole body, decoded if it is gzip-encoded.

    The bytes are counted as they arrive, because `Content-Length` may be wrong. Raises
    `UpstreamError` if there are more than `limit`, as sent or decoded.
    """
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            response.close()
            raise UpstreamError(f"upstream sent more than the allowed {limit} bytes")
    body = bytes(content)
    if is_gzip_encoded(response.headers):
        return await asyncio.to_thread(gunzip, body, limit)
    return body


async def read_digest(response: ClientResponse) -> Digest | None:
    """Return the digest in `Docker-Content-Digest`, or None if it is missing or malformed."""
    try:
        return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
    except InvalidDigestError:
        return None


async def read_manifest(response: ClientResponse) -> tuple[bytes, str]:
    """Return the bytes of a manifest and the `Content-Type`."""
    content = await read_bounded(response, MAX_MANIFEST_SIZE)
    return content, response.headers.get(hdrs.CONTENT_TYPE, "")


async def read_blob_size(response: ClientResponse) -> tuple[int, int | None]:
    """Return the status, and the size of the whole blob or None if upstream does not send it."""
    if is_gzip_encoded(response.headers):
        return response.status, None  # it may be the size of the encoded blob
    if response.status == 206:
        return 206, parse_content_range(response)[1]
    return response.status, response.content_length


async def read_evidence(response: ClientResponse) -> Evidence:
    """Return what the response to a GET of a blob's first byte states about the blob."""
    size = response.content_length
    if response.status == 206:
        size = parse_content_range(response)[1]
        await response.content.read(1)  # with its body read, the connection can be used again
    is_html = response.content_type == "text/html"
    return Evidence(size, await read_digest(response), is_html)


class ListPage(NamedTuple):
    """One page of a list; `next_query` is the query of the next page, None after the last one."""

    content: bytes
    content_type: str
    next_query: str | None


async def read_list_page(response: ClientResponse) -> ListPage:
    """Return one page of a list.

    Only the query is taken from the link, so that upstream cannot direct us to another host or
    path (CVE-2026-85732).
    """
    content = await read_bounded(response, MAX_LIST_SIZE)
    link = find_link(response.headers.getall(hdrs.LINK, ()), "next")
    next_query = None if link is None else link.partition("#")[0].partition("?")[2]
    return ListPage(content, response.headers.get(hdrs.CONTENT_TYPE, ""), next_query)


async def read_search_page(response: ClientResponse) -> bytes:
    """Return the body of a search."""
    return await read_bounded(response, MAX_SEARCH_SIZE)


def parse_tags(pages: Sequence[bytes]) -> EncodedTags:
    """Return the tags of all pages (distribution-spec, "Listing Tags"). Raises `UpstreamError`.

    A list that is absent or null is empty, and what cannot be a tag is left out.
    """
    return encode_tags(map(_tag_array, pages))


def _tag_array(content: bytes) -> bytes:
    """Return the JSON array of tags in one page, decoded only if it must be."""
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        page = msgspec.json.decode(content, type=_TagsPage)
        if bytes(page.tags).startswith(b"["):
            return bytes(page.tags)
    try:
        tags = decode_object(content).get("tags")
    except ValueError as error:
        raise UpstreamError("upstream sent an invalid tag list") from error
    if not isinstance(tags, list | None):
        raise UpstreamError("upstream sent an invalid tag list")
    return msgspec.json.encode([tag for tag in tags or () if isinstance(tag, str)])


def parse_referrers(page: ListPage) -> EncodedReferrers | None:
    """Return the descriptors of one page of referrers; None if it is not an image index.

    Clients believe the media type in the header; some believe the one in the document, too.
    """
    is_index = page.content_type.partition(";")[0].strip().lower() == OCI_INDEX
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        document = msgspec.json.decode(page.content, type=_ReferrersPage)
        if is_index or document.media_type == OCI_INDEX:
            return EncodedReferrers.from_items(document.manifests or ())
    return _parse_odd_referrers(page.content, is_index=is_index)


def _parse_odd_referrers(content: bytes, *, is_index: bool) -> EncodedReferrers | None:
    """Return the descriptors of a page that only a lenient decoder reads."""
    try:
        fields = decode_object(content)
    except ValueError:
        return None
    manifests = fields.get("manifests", ())
    if not isinstance(manifests, list | None):  # an absent list is no list
        return None
    if not is_index and fields.get("mediatype") != OCI_INDEX:
        return None
    descriptors = (item for item in manifests or () if isinstance(item, dict))
    return EncodedReferrers.from_descriptors(descriptors)


def parse_content_range(response: ClientResponse) -> tuple[int, int | None]:
    """Return the first offset of a 206 response, and the size of the whole blob, None for `*`."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get(hdrs.CONTENT_RANGE, ""))
    if match is None:
        raise UpstreamError("upstream sent a 206 response without a valid Content-Range")
    return int(match[1]), None if match[3] == "*" else int(match[3])
