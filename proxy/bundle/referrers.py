"""Find what refers to an image in the store: signatures, SBOMs and the like, to export with it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from proxy.images.store import ImageStore
from proxy.images.tree import ManifestNode, build_tree
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import ReferrerRecord, fallback_tag
from proxy.storage.image_queries import ImageQueries, StoredBlob

# Referrers of one image; a store may have any number.
MAX_EXPORTED_REFERRERS = 2000


@dataclass(frozen=True, slots=True)
class StoredReferrers:
    """What refers to an image, by tag or digest, and what the registry had of it, by subject."""

    trees: Mapping[Reference, ManifestNode]
    records: Mapping[Digest, ReferrerRecord]


def find_referrers(
    image_store: ImageStore, queries: ImageQueries, repository: Repository, image: ManifestNode
) -> StoredReferrers:
    """Return all that is stored completely of what refers to an image, and to that in turn. Blocks."""
    trees: dict[Reference, ManifestNode] = {}
    subjects = [node.digest for node in image.walk()]
    seen = set(subjects)
    for subject in subjects:  # grows during the iteration
        for reference, blob in _referring(queries, repository, subject):
            if len(trees) >= MAX_EXPORTED_REFERRERS:
                break
            is_new = isinstance(reference, Tag) or blob.digest not in seen
            tree = build_tree(image_store, queries, blob, repository) if is_new else None
            if tree is None or not _is_complete(tree):
                continue
            complete = [child for child in tree.children if child.is_complete]
            if tree.children and not complete:
                continue
            tree = replace(tree, children=complete)
            trees[reference] = tree
            added = [node.digest for node in tree.walk() if node.digest not in seen]
            subjects += added
            seen.update(added)
    records = {
        subject: record
        for subject in subjects
        if (record := queries.referrer_record(repository, subject))
    }
    return StoredReferrers(trees, records)


def _is_complete(tree: ManifestNode) -> bool:
    """Tell whether a referrer is stored; of an index, the manifests in it may be missing."""
    return tree.manifest is not None and not tree.missing and not tree.problem


def _referring(
    queries: ImageQueries, repository: Repository, subject: Digest
) -> Iterator[tuple[Reference, StoredBlob]]:
    """Yield what refers to a manifest directly, tags first."""
    stated = queries.referrers(repository, subject)
    digests = {blob.digest for blob in stated}
    for tag, blob in queries.tagged_referrers(repository, subject):
        # The fallback tag may name any image; then none of its children names the subject.
        children = queries.children(blob.digest) if tag == fallback_tag(subject) else set()
        if not children or children & digests:
            yield tag, blob
    for blob in stated:
        yield blob.digest, blob
