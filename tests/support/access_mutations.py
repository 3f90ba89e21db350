"""The program without one rule of access each: what the random test of access has to notice."""

from dataclasses import replace
from typing import Any

import pytest

from proxy.cache import access, manifest_store
from proxy.cache.access import Decision, RepositoryAccess
from proxy.cache.manifests import ManifestCache
from proxy.storage import index_writes
from proxy.storage.index import Index
from proxy.storage.ingest import Ingest
from proxy.upstream import responses
from proxy.upstream.client import Upstream
from proxy.upstream.network.redirects import REDIRECT_STATUSES
from proxy.upstream.registry_client import ApiRequest
from proxy.upstream.responses import Evidence

Patch = pytest.MonkeyPatch
_decide = access.decide


def a_digest_is_enough(patch: Patch) -> None:
    """What is stored is served under every name."""
    patch.setattr(access, "decide", lambda **_: Decision.SERVE)


def any_answer_is_a_proof(patch: Patch) -> None:
    """A registry that answers every request, or redirects it, proves everything."""
    patch.setattr(access, "is_proof", lambda *_: True)


def a_redirect_is_a_proof(patch: Patch) -> None:
    """As in 0.1.0: the target of a redirect is not asked."""

    async def probe(upstream: Upstream, repository: str, digest: Any) -> Evidence:
        head = ApiRequest("HEAD", repository, f"blobs/{digest}", "blob", follow_redirects=False)
        status, size = await upstream._registry.request(head, responses.read_blob_size)
        named = digest if status in REDIRECT_STATUSES else None
        return Evidence(None if named else size, named, is_html=False)

    patch.setattr(Upstream, "probe_blob", probe)


def a_web_page_is_a_proof(patch: Patch) -> None:
    """What a response does not state does not count against it."""
    patch.setattr(
        access,
        "is_proof",
        lambda evidence, digest, size: evidence.is_html or evidence.size in (None, size),
    )


def upstreams_prove_what_others_have_sent(patch: Patch) -> None:
    """A registry that repeats digest and size is believed about everything."""
    patch.setattr(Index, "has_sent", lambda *_: True)


def a_manifest_links_what_it_names(patch: Patch) -> None:
    """As in 0.1.0."""
    add_manifest = index_writes.add_manifest

    def add_and_link(connection: Any, repository: Any, digest: Any, *rest: Any) -> bool:
        is_new = add_manifest(connection, repository, digest, *rest)
        index_writes.add_links(connection, repository, [one.digest for one in rest[1].children])
        return is_new

    patch.setattr(index_writes, "add_manifest", add_and_link)


def a_mirrors_head_links_what_it_names(patch: Patch) -> None:
    """What is named for a tag needs no right, as in 0.1.0."""
    revalidate, load = ManifestCache._revalidate, ManifestCache._load_permitted
    running: list[None] = []

    async def revalidate_freely(self: Any, *args: Any) -> Any:
        running.append(None)
        try:
            return await revalidate(self, *args)
        finally:
            running.pop()

    async def load_freely(self: Any, repository: Any, digest: Any, deadline: float) -> Any:
        if running and (row := self._index.blob(repository, digest)):
            return await self._store.load(digest, row.media_type)
        return await load(self, repository, digest, deadline)

    patch.setattr(ManifestCache, "_revalidate", revalidate_freely)
    patch.setattr(ManifestCache, "_load_permitted", load_freely)


def a_running_download_is_joined_freely(patch: Patch) -> None:
    """Who knows the digest gets the bytes as they arrive."""

    async def may_join(*_: Any) -> bool:
        return True

    patch.setattr(RepositoryAccess, "may_join", may_join)


def a_running_download_links_who_joins_it(patch: Patch) -> None:
    """The proof is not asked for."""

    async def may_join(_: Any, repository: Any, download: Any, __: float) -> bool:
        download.shared_with.add(repository)
        return True

    patch.setattr(RepositoryAccess, "may_join", may_join)


def partial_bytes_are_for_everybody(patch: Patch) -> None:
    """A download is resumed whichever repository it was for."""
    resume = Ingest.resume

    def resume_any(ingest: Ingest) -> None:
        origins = _origins
        ingest.origin = origins.setdefault(ingest.digest, ingest.origin)
        resume(ingest)

    _origins: dict[Any, str] = {}
    save_state = Ingest.save_state

    def note_origin(ingest: Ingest) -> None:
        _origins[ingest.digest] = ingest.origin
        save_state(ingest)

    patch.setattr(Ingest, "resume", resume_any)
    patch.setattr(Ingest, "save_state", note_origin)


def links_survive_an_eviction(patch: Patch) -> None:
    """Who was linked to content that is gone is linked when it comes back."""
    _keep_rows(patch, "links")


def senders_survive_an_eviction(patch: Patch) -> None:
    """Who has sent content that is gone counts as the sender of what another sends later."""
    _keep_rows(patch, "senders")


def _keep_rows(patch: Patch, table: str) -> None:
    delete = index_writes._delete_row

    def delete_but_keep(connection: Any, digest: Any) -> int | None:
        query = f"SELECT * FROM {table} WHERE digest = ?"
        rows = connection.execute(query, (str(digest),)).fetchall()
        size = delete(connection, digest)
        for row in rows:
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
        return size

    patch.setattr(index_writes, "_delete_row", delete_but_keep)


def media_types_are_the_first_speakers(patch: Patch) -> None:
    """The header of one upstream is told to the clients of another."""
    patch.setattr(manifest_store, "_with_type", lambda manifest, _: manifest)


def nothing_is_ever_linked(patch: Patch) -> None:
    """The other direction: what upstream has once sent is not served when it fails."""
    blob = Index.blob

    def unlinked(index: Index, *args: Any) -> Any:
        row = blob(index, *args)
        return row and replace(row, is_linked=False)

    patch.setattr(Index, "blob", unlinked)
