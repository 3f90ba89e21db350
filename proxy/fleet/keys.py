"""The names of the directory's keys in the server. Pure.

Each begins with the name of the fleet and the version of the protocol, so that fleets and versions do not touch each
other's keys. All keys that one script uses have the same part in braces, which decides on their place in a cluster.
"""

import base64
import hashlib
from typing import NamedTuple

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag

# The version of the protocol: of the keys, and of what the scripts do with them. Nodes of another version have other
# keys, so that in an upgrade the old and the new nodes are two fleets.
PROTOCOL = 1

# Characters of a node's id: 48 bits, so that two of 2,000 nodes have the same in one fleet of 140 million.
ID_LENGTH = 8


def node_id(address: str) -> str:
    """Return the id of the node with this address, as it is in the sets of holders."""
    return base64.urlsafe_b64encode(hashlib.sha256(address.encode()).digest())[:ID_LENGTH].decode()


class BlobKeys(NamedTuple):
    """The keys of a blob: its holders, and for one upstream who downloads it, in order and when seen last."""

    holders: str
    order: str
    seen: str


class TagKeys(NamedTuple):
    """The keys of a tag: what is known of it, and which node asks upstream."""

    tag: str
    lease: str


class FleetKeys:
    """The keys of one fleet."""

    def __init__(self, name: str, protocol: int = PROTOCOL) -> None:
        self.protocol = protocol
        self._prefix = f"{name}:{protocol}"
        # By address, when seen last, and what all nodes must have the same of.
        self.rows = f"{{{self._prefix}}}:rows"
        self.beats = f"{{{self._prefix}}}:beats"
        self.state = f"{{{self._prefix}}}:state"
        # Of all versions of the protocol.
        self.protocols = f"{name}:protocols"

    def blob(self, upstream: str, digest: Digest) -> BlobKeys:
        """Return the keys of a blob."""
        holders = self.holders(digest)
        base = f"{self._prefix}:{{{digest}}}"
        return BlobKeys(holders, f"{base}:order:{upstream}", f"{base}:seen:{upstream}")

    def holders(self, digest: Digest) -> str:
        """Return the key of the holders of a blob."""
        return f"{self._prefix}:{{{digest}}}:holders"

    def tag(self, repository: Repository, tag: Tag) -> TagKeys:
        """Return the keys of a tag."""
        base = f"{self._prefix}:{{{repository.upstream}/{repository.name}:{tag}}}"
        return TagKeys(f"{base}:tag", f"{base}:lease")

    def limit(self, upstream: str, scope: str) -> str:
        """Return the key of a limit of an upstream."""
        return f"{self._prefix}:limit:{upstream}:{scope}"

    def job(self, job: str) -> str:
        """Return the key of the lease of a job."""
        return f"{self._prefix}:job:{job}"
