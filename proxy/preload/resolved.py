"""What was found of an image upstream: the digests and sizes of all that a preload fetches for it."""

from dataclasses import dataclass, field

from proxy.errors import PolicyDeniedError
from proxy.lru import CachedManifest
from proxy.names import full_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import Descriptor, Manifest
from proxy.oci.reference import Reference, Repository
from proxy.oci.referrers import ReferrerRecord
from proxy.preload.request import RequestedImage

UNKNOWN_SIZE = -1


@dataclass(frozen=True, slots=True)
class MissingReferrer:
    """A referrer that could not be fetched, by digest or tag; "" stands for the list of them."""

    subject: Digest
    reference: str
    reason: str


@dataclass(slots=True)
class ImageReferrers:
    """What refers to the manifests of an image, as far as it was found.

    `origins` has the subject and the reference of the referrer that a blob belongs to. `records` are
    what upstream has, by subject, where it could be asked for all.
    """

    manifests: dict[Digest, int] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    origins: dict[Digest, tuple[Digest, str]] = field(default_factory=dict)
    records: dict[Digest, ReferrerRecord] = field(default_factory=dict)
    missing: list[MissingReferrer] = field(default_factory=list)

    def add(
        self, subject: Digest, reference: str, cached: CachedManifest, blobs: dict[Digest, int]
    ) -> None:
        """Add a referrer and its blobs."""
        self.manifests[cached.digest] = len(cached.content)
        self.blobs |= blobs
        self.origins |= dict.fromkeys(blobs, (subject, reference))


@dataclass(slots=True)
class ResolvedImage:
    """An image with the digests and sizes of everything to fetch for it.

    `platforms` are those chosen from an image index, or "all"; `missing_platforms_error` names
    those that the index lacks. `attestations` are the children of the index that attest the chosen
    manifests. `is_changed` says that the store had another digest under this name. `ripening` is what the
    tag will mean once it is old enough for the policies; `refusal` is set if clients do not get the image
    before it is.
    """

    requested: RequestedImage
    digest: Digest
    platforms: list[str] = field(default_factory=list)
    manifests: dict[Digest, int] = field(default_factory=dict)
    blobs: dict[Digest, int] = field(default_factory=dict)
    attestations: list[Descriptor] = field(default_factory=list)
    referrers: ImageReferrers = field(default_factory=ImageReferrers)
    missing_platforms_error: str = ""
    is_changed: bool = False
    ripening: "ResolvedImage | None" = None
    refusal: PolicyDeniedError | None = None

    @property
    def repository(self) -> Repository:
        """The repository."""
        return self.requested.repository

    @property
    def reference(self) -> Reference:
        """The tag or digest."""
        return self.requested.reference

    @property
    def name(self) -> str:
        """The display name."""
        return self.requested.name

    @property
    def full_name(self) -> str:
        """The name with registry and namespace, for a lock file."""
        return full_name(self.repository, self.reference)

    @property
    def size(self) -> int:
        """Bytes of the image, without its referrers."""
        return sum(self.manifests.values()) + sum(self.blobs.values())

    def all_content(self) -> dict[Digest, int]:
        """Return digests and sizes of the image and its referrers, in the order of fetching."""
        referrers = self.referrers
        content = self.manifests | referrers.manifests | self.blobs | referrers.blobs
        return content | self.ripening.all_content() if self.ripening else content

    def all_blobs(self) -> dict[Digest, int]:
        """Return digests and sizes of the blobs, those of `ripening` included."""
        return self.blobs | self.ripening.blobs if self.ripening else self.blobs

    def add_manifest(self, cached: CachedManifest, manifest: Manifest) -> None:
        """Add a manifest and its blobs."""
        self.manifests[cached.digest] = len(cached.content)
        self.blobs |= registry_blobs(manifest)


def registry_blobs(manifest: Manifest) -> dict[Digest, int]:
    """Return the blobs that a registry serves, with their sizes; foreign layers are elsewhere."""
    return {
        blob.digest: UNKNOWN_SIZE if blob.size is None else blob.size
        for blob in manifest.blobs
        if not blob.is_foreign
    }
