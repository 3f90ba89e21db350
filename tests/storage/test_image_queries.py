"""Unique sizes and removals of images, against a model that computes them from the whole store."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings, strategies as st

from proxy.oci.digest import Digest
from proxy.oci.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import fallback_tag, subject_of_tag
from proxy.storage import image_queries
from proxy.storage.image_queries import ImageQueries, open_image_queries
from proxy.storage.index import Index
from tests.fakes.clock import Clock
from tests.support.examples import scaled

REPOSITORIES = [Repository("docker.io", "library/a"), Repository("ghcr.io", "me/b")]
TAGS = [Tag("v1"), Tag("v2")]
LAYERS = [Digest.from_content(bytes([number])) for number in range(5)]
# By number, so that each refers only to earlier ones, as hashes do.
MANIFESTS = [Digest.from_content(bytes([100 + number])) for number in range(6)]

Image = tuple[Repository, Reference]


def signature_tag(subject: Digest) -> Tag:
    return Tag(f"{fallback_tag(subject)}.sig")


def subject_of(reference: Reference) -> Digest | None:
    return subject_of_tag(reference) if isinstance(reference, Tag) else None


def size_of(digest: Digest) -> int:
    return 1 << [*LAYERS, *MANIFESTS].index(digest)


@dataclass
class Model:
    """A store as sets; every answer is computed from the whole store."""

    blobs: set[Digest] = field(default_factory=set)
    children: dict[Digest, set[Digest]] = field(default_factory=dict)
    subjects: dict[Digest, Digest] = field(default_factory=dict)
    links: set[tuple[Repository, Digest]] = field(default_factory=set)
    tags: dict[Image, Digest] = field(default_factory=dict)
    pins: dict[Image, Digest] = field(default_factory=dict)

    def reach(self, *tops: Digest) -> set[Digest]:
        reached = {*tops}
        while True:
            more = {child for one in reached for child in self.children.get(one, ())}
            more |= {one for one, subject in self.subjects.items() if subject in reached}
            more |= {one for (_, tag), one in self.tags.items() if subject_of(tag) in reached}
            if more <= reached:
                return reached
            reached |= more

    def images(self) -> dict[Image, Digest]:
        named = self.tags | self.pins
        found = {
            image: digest
            for image, digest in named.items()
            if image in self.pins or not self.is_of_subject(*image, digest)
        }
        for repository, digest in self.links:
            parents = [one for one, below in self.children.items() if digest in below]
            above = [*parents, *filter(None, [self.subjects.get(digest)])]
            if (
                digest in self.children
                and not any(one in self.blobs and (repository, one) in self.links for one in above)
                and not any(
                    who == repository and what == digest for (who, _), what in named.items()
                )
            ):
                found[repository, digest] = digest
        return found

    def is_of_subject(self, repository: Repository, reference: Reference, digest: Digest) -> bool:
        """Tell whether a tag is one for referrers of another manifest of its repository."""
        subject = subject_of(reference)
        return subject != digest and subject in self.blobs and (repository, subject) in self.links

    def freed(self, gone: Iterable[Image]) -> set[Digest]:
        images = self.images()
        removed = {images.pop(image) for image in gone}
        mine = {one for top in removed for one in self.reach(top)}
        theirs = {one for top in images.values() for one in self.reach(top)}
        return (mine - theirs) & self.blobs


@st.composite
def stores(draw):
    """Events that fill a store: manifests in repositories, stored layers, tags and pins."""
    events: list[Any] = []
    for number, digest in enumerate(MANIFESTS):
        if number and not draw(st.booleans()):
            continue
        before = [one for one in MANIFESTS[:number] if one in [event[1] for event in events]]
        is_index = draw(st.booleans()) and before
        below = draw(st.sets(st.sampled_from(before if is_index else LAYERS), min_size=1))
        # Nothing refers to what it contains: the manifest and its content would hide each other.
        inside = Model(children={event[1]: event[2] for event in events}).reach(digest, *below)
        outside = [one for one in before if one not in inside]
        subject = draw(st.sampled_from([None, None, *outside]))
        where = draw(st.sets(st.sampled_from(REPOSITORIES), min_size=1))
        names = [
            *TAGS,
            *(tag(one) for one in (digest, *outside) for tag in (fallback_tag, signature_tag)),
        ]
        tags = draw(
            st.lists(st.tuples(st.sampled_from(sorted(where, key=str)), st.sampled_from(names)))
        )
        events.append((bool(is_index), digest, below, subject, where, tags))
    return events, draw(st.sets(st.sampled_from(LAYERS))), draw(st.integers(0, 1 << 30))


async def build(index: Index, events, layers) -> Model:
    model = Model(blobs=set(layers))
    for is_index, digest, below, subject, where, tags in events:
        children = [
            Descriptor(one, size_of(one), "", None, is_foreign=False)
            for one in sorted(below, key=str)
        ]
        media_type = OCI_INDEX if is_index else OCI_MANIFEST
        manifest = Manifest(media_type, tuple(children), subject, "", {})
        for repository in where:
            await index.add_manifest(repository, digest, size_of(digest), manifest)
            model.links.add((repository, digest))
        model.blobs.add(digest)
        model.children[digest] = below
        if subject:
            model.subjects[digest] = subject
        for repository, tag in tags:
            await index.set_tag(repository, tag, digest)
            model.tags[repository, tag] = digest
    for layer in layers:
        await index.add_blob(None, layer, size_of(layer))
    return model


def read(path: Path, ask):
    with open_image_queries(path) as catalogue:
        return ask(catalogue)


@settings(max_examples=scaled(60), deadline=None)
@given(made=stores())
async def test_sizes_and_removals_equal_those_of_a_model(tmp_path_factory, made):
    events, layers, chosen = made
    path = tmp_path_factory.mktemp("index") / "index.sqlite"
    index = await asyncio.to_thread(Index, path, Clock())
    try:
        model = await build(index, events, layers)
        images = model.images()
        names = sorted(images, key=str)
        assume(names)
        pinned = names[chosen % len(names)]
        if isinstance(pinned[1], Tag) and chosen % 3:
            await index.pin([pinned])
            await index.delete_tag(*pinned)
            del model.tags[pinned[0], pinned[1]]
            model.pins[pinned] = images[pinned]
            images = model.images()
            names = sorted(images, key=str)

        roots = await asyncio.to_thread(read, path, lambda c: list(c.images()))
        assert {(root.repository, root.reference): root.digest for root in roots} == images
        assert {(r.repository, r.reference) for r in roots if r.is_pinned} == set(model.pins)

        for number, root in enumerate(roots):
            following = await asyncio.to_thread(
                read, path, lambda c, at=root: list(c.images("", (at.repository, at.reference)))
            )
            assert following == roots[number + 1 :]
        for compute in (lambda _: None, ImageQueries.compute_sizes):
            sizes = await asyncio.to_thread(
                read, path, lambda c, do=compute: (do(c), [c.image_sizes(root) for root in roots])
            )
            for root, size in zip(roots, sizes[1], strict=True):
                name = (root.repository, root.reference)
                held = sum(size_of(one) for one in model.reach(images[name]) & model.blobs)
                own = sum(size_of(one) for one in model.freed([name]))
                assert size == (held, own)

        gone = names[chosen % len(names) :][: 1 + chosen % 2]
        # A digest stands for all its names in the repository.
        gone = [one for one in gone if isinstance(one[1], Tag)] or gone[:1]
        expected = model.freed(gone)
        removal = await asyncio.to_thread(read, path, lambda c: c.plan_removal(gone))
        assert {digest for digest, _ in removal.blobs} == expected
        blobs = await index.delete_images(gone)
        assert dict(blobs) == {digest: size_of(digest) for digest in expected}
        await index.remove_blobs([digest for digest, _ in blobs], lambda _: None)
        left = await asyncio.to_thread(read, path, lambda c: list(c.images()))
        assert {(one.repository, one.reference) for one in left} == set(images) - set(gone)
        for name in set(images) - set(gone):
            for one in model.reach(images[name]) & model.blobs:
                assert index.blob(name[0], one)
    finally:
        await asyncio.to_thread(index.close)


async def test_a_shared_layer_belongs_to_every_image_that_names_it(index):
    layer = LAYERS[0]
    for number, repository in enumerate(REPOSITORIES):
        named = (Descriptor(layer, 7, "", None, is_foreign=False),)
        manifest = Manifest(OCI_MANIFEST, named, None, "", {})
        await index.add_manifest(repository, MANIFESTS[number], 3, manifest)
        await index.set_tag(repository, TAGS[number], MANIFESTS[number])
        await index.add_blob(repository, layer, 7)
    found = await asyncio.to_thread(read, index.path, lambda c: c.images_containing(layer, 10))
    assert set(found) == set(zip(REPOSITORIES, TAGS, strict=True))
    assert (
        len(await asyncio.to_thread(read, index.path, lambda c: c.images_containing(layer, 1))) == 1
    )

    blobs = [layer, LAYERS[1]]
    for where in (*REPOSITORIES, None):
        here = await asyncio.to_thread(
            read, index.path, lambda c, w=where: c.stored_sizes(blobs, w)
        )
        assert here == {layer: 7}
    nobody = Repository("docker.io", "library/none")
    assert await asyncio.to_thread(read, index.path, lambda c: c.stored_sizes(blobs, nobody)) == {}


async def test_an_edge_of_another_repository_does_not_keep_an_image(index):
    """An index of another repository that names and refers to these images is not theirs."""
    one, other, above = MANIFESTS[:3]
    named = (Descriptor(LAYERS[0], 7, "", None, is_foreign=False),)
    for digest in (one, other):
        await index.add_manifest(
            REPOSITORIES[0], digest, 3, Manifest(OCI_MANIFEST, named, None, "", {})
        )
    below = (Descriptor(one, 3, "", None, is_foreign=False),)
    await index.add_manifest(REPOSITORIES[1], above, 3, Manifest(OCI_INDEX, below, other, "", {}))
    assert await index.delete_images([(REPOSITORIES[0], one)]) == []
    left = await asyncio.to_thread(read, index.path, lambda c: list(c.images()))
    assert {(root.repository, root.reference) for root in left} == {
        (REPOSITORIES[0], other),
        (REPOSITORIES[1], above),
    }


@pytest.mark.parametrize("size", [2, 3, 500])
async def test_images_are_read_in_pages_of_any_size(index, monkeypatch, size):
    monkeypatch.setattr(image_queries, "_PAGE_SIZE", size)
    manifest = Manifest(OCI_MANIFEST, (), None, "", {})
    expected = []
    for number, digest in enumerate(MANIFESTS):
        repository = Repository("docker.io", f"team/app{number // 2}")
        await index.add_manifest(repository, digest, 3, manifest)
        if number % 2:
            names: list[Reference] = [digest]
        else:
            names = [Tag(f"v{tag}") for tag in range(number + 1)]
            for tag in names:
                await index.set_tag(repository, tag, digest)
        expected += [(repository, name) for name in names]
    await index.pin([(Repository("docker.io", "team/app1"), Tag("unseen"))])
    expected.append((Repository("docker.io", "team/app1"), Tag("unseen")))
    expected.sort(key=lambda one: (one[0].name, str(one[1])))
    for pattern in ("", "app", "*:v*", "team/*"):
        found = await asyncio.to_thread(
            read, index.path, lambda c, text=pattern: list(c.images(text))
        )
        assert [(one.repository, one.reference) for one in found] == expected


PATTERNS = {
    "nginx": "nginx",
    "*:1.2[0-9]": ":1.2",
    "[!a]bc*de": "bc",
    "[]a]xyz": "xyz",
    "ghcr.io/*": "ghcr.io/",
    "app:v1": "app",
    "?*": "",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_contains_literally_narrows_the_search(pattern):
    literal = image_queries._longest_literal(pattern)
    assert literal == PATTERNS[pattern].strip(":")
