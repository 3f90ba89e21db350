"""The index against a model of dictionaries, in any order of events, restarts included."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_MANIFEST, Manifest
from proxy.oci.reference import Repository, Tag
from proxy.storage.blobs import allocated_size
from proxy.storage.index import Index
from proxy.storage.list_queries import list_tags
from tests.fakes.clock import Clock
from tests.support.examples import scaled

DIGESTS = [Digest.from_content(bytes([number])) for number in range(6)]
REPOSITORIES = [Repository("docker.io", "a/b"), Repository("docker.io", "c"), Repository("x", "c")]
TAGS = [Tag("latest"), Tag("v1")]

digests = st.sampled_from(DIGESTS)
repositories = st.sampled_from(REPOSITORIES)
tags = st.sampled_from(TAGS)


class IndexAgainstModel(RuleBasedStateMachine):
    """Blobs by digest, links and tags as sets and dicts, uses as an ordered list."""

    blobs = Bundle("blobs")

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.clock = Clock()
        self.index = Index(self.folder / "index.sqlite", self.clock)
        self.sizes: dict[Digest, int] = {}
        self.links: set[tuple[Repository, Digest]] = set()
        self.tags: dict[tuple[Repository, Tag], Digest] = {}
        self.once_tagged: set[Repository] = set()
        self.uses: list[Digest] = []

    def run_(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def senders(self) -> set[tuple[str, Digest]]:
        return {(repository.upstream, digest) for repository, digest in self.links}

    def _use(self, digest: Digest) -> None:
        if digest in self.uses:
            self.uses.remove(digest)
        self.uses.append(digest)

    @rule(repository=repositories, digest=digests, size=st.integers(0, 1 << 40))
    def add(self, repository: Repository, digest: Digest, size: int) -> None:
        self.run_(self.index.add_blob(repository, digest, size))
        self.sizes[digest] = size
        self.links.add((repository, digest))
        self._use(digest)

    @rule(repository=repositories, digest=digests)
    def add_manifest(self, repository: Repository, digest: Digest) -> None:
        manifest = Manifest(OCI_MANIFEST, (), None, "", {})
        self.run_(self.index.add_manifest(repository, digest, 7, manifest))
        self.sizes[digest] = 7
        self.links.add((repository, digest))
        self._use(digest)

    @rule(repository=repositories, digest=digests)
    def link(self, repository: Repository, digest: Digest) -> None:
        self.run_(self.index.link(repository, digest))
        if (repository.upstream, digest) in self.senders():
            self.links.add((repository, digest))

    @rule(digest=digests)
    def touch(self, digest: Digest) -> None:
        self.index.touch(digest)
        if digest in self.sizes:
            self._use(digest)

    @rule(repository=repositories, tag=tags, digest=digests)
    def set_tag(self, repository: Repository, tag: Tag, digest: Digest) -> None:
        self.run_(self.index.set_tag(repository, tag, digest))
        self.tags[repository, tag] = digest
        self.once_tagged.add(repository)

    @rule(repository=repositories, tag=tags)
    def drop_tag(self, repository: Repository, tag: Tag) -> None:
        self.run_(self.index.delete_tag(repository, tag))
        self.tags.pop((repository, tag), None)

    @rule(gone=st.lists(digests, max_size=3, unique=True))
    def remove(self, gone: list[Digest]) -> None:
        deleted: list[Digest] = []
        self.run_(self.index.remove_blobs(gone, deleted.append))
        assert deleted == gone
        for digest in gone:
            self.sizes.pop(digest, None)
            if digest in self.uses:
                self.uses.remove(digest)
        self.links = {pair for pair in self.links if pair[1] not in gone}
        self.tags = {key: named for key, named in self.tags.items() if named not in gone}

    @rule(seconds=st.floats(-1e6, 1e6))
    def turn_the_clock(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def flush(self) -> None:
        self.run_(self.index.flush())

    @rule()
    def restart(self) -> None:
        self.index.close()
        self.index = Index(self.folder / "index.sqlite", self.clock)

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        if not hasattr(self, "index"):
            return
        for repository in REPOSITORIES:
            for digest in DIGESTS:
                self._check(repository, digest)
            held = {tag for (owner, tag) in self.tags if owner == repository}
            assert list_tags(self.index._reader, repository, 100) == sorted(held)
        rows = self.index._writer.execute(
            "SELECT upstream, name, manifests, (SELECT count(*) FROM links JOIN blobs USING (digest)"
            " WHERE repository = id AND blobs.media_type IS NOT NULL) FROM repositories"
        ).fetchall()
        assert all(kept == counted for _, _, kept, counted in rows)
        # A tag leaves its history behind.
        in_use = {repository for repository, _ in self.links} | self.once_tagged
        assert {Repository(*row[:2]) for row in rows} == in_use
        stored = sum(map(allocated_size, self.sizes.values()))
        assert self.index.totals == (len(self.sizes), stored, 0)

    def _check(self, repository: Repository, digest: Digest) -> None:
        row = self.index.blob(repository, digest)
        linked = (repository, digest) in self.links
        sent = (repository.upstream, digest) in self.senders()
        assert self.index.has_sent(repository.upstream, digest) is sent
        if digest in self.sizes:
            assert row is not None
            assert (row.size, row.is_linked) == (self.sizes[digest], linked)
        else:
            assert row is None

    @rule()
    def the_order_is_the_order_of_uses(self) -> None:
        rows = self.run_(self.index.least_recently_used(100))
        assert [digest for digest, _, _ in rows] == self.uses

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            self.runner.close()
            shutil.rmtree(self.folder)


IndexAgainstModel.TestCase.settings = settings(
    max_examples=scaled(40), stateful_step_count=25, deadline=None
)
TestIndexAgainstModel = IndexAgainstModel.TestCase
