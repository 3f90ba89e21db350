"""How many other nodes this one sends each blob to at a time. Pure."""

from collections import Counter

from proxy.oci.digest import Digest


class PeerTransfers:
    """The transfers to other nodes that run, by blob; `children` are the most of one blob."""

    def __init__(self, children: int) -> None:
        self._children = children
        self._running: Counter[Digest] = Counter()

    def is_full(self, digest: Digest) -> bool:
        """Tell whether no more nodes should be sent a blob now."""
        return self._running[digest] >= self._children

    def begin(self, digest: Digest) -> None:
        """Count a transfer."""
        self._running[digest] += 1

    def end(self, digest: Digest) -> None:
        """No longer count a transfer."""
        self._running[digest] -= 1
        if not self._running[digest]:
            del self._running[digest]
