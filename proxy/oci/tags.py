"""Lists of tags, kept as the text of a JSON array: a million tags as objects would take 80 MB. Pure."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice, pairwise
from operator import itemgetter

import msgspec

_SEPARATOR = b",\n"
# Sorted and joined at a time: other threads run between two calls, not during one.
_BATCH = 4096
# Tags of each batch by which the bounds of the merged batches are chosen.
_SAMPLES = 64
# The tags in the text of an array. Other values are left out: they cannot be pulled.
_TAG = re.compile(rb'"([A-Za-z0-9_][A-Za-z0-9._-]{0,127})"(?=\s*[,\]])')


class EncodedTags:
    """A list of tags in ASCII order, each once. `size` is the memory that it takes, in bytes."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._document = (b"", b"")

    @property
    def size(self) -> int:
        """The memory that it takes at most."""
        return 2 * len(self._content)

    def __bool__(self) -> bool:
        return bool(self._content)

    def __iter__(self) -> Iterator[str]:
        return (one[1:-1].decode() for one in self._content.split(_SEPARATOR) if one)

    def document(self, name: str) -> bytes:
        """Return the whole list as the document of the distribution specification.

        Clients that name the repository alike share one copy.
        """
        encoded = msgspec.json.encode(name)
        if self._document[0] != encoded:
            self._document = (encoded, _document(encoded, self._content))
        return self._document[1]

    def page(self, name: str, last: str, limit: int) -> tuple[bytes, str]:
        """Return the document with up to `limit` tags after `last`, and the last of them.

        The latter is empty if no tags follow.
        """
        content = self._content
        start = end = self._find_after(last.encode("utf-8", "replace"))
        for _ in range(limit):
            end = content.find(b"\n", end) + 1
            if not end:
                return _document(msgspec.json.encode(name), content[start:]), ""
        page = content[start:end].removesuffix(_SEPARATOR)
        return _document(msgspec.json.encode(name), page), page.rpartition(b"\n")[2][1:-1].decode()

    def _find_after(self, last: bytes) -> int:
        """Return the offset of the first tag that follows `last`, or the end."""
        content = self._content
        low, high = 0, len(content)
        while low < high:
            start = content.rfind(b"\n", low, (low + high) // 2) + 1 or low
            end = content.find(b"\n", start, high) + 1 or high
            if content[start + 1 : content.index(b'"', start + 1)] > last:
                high = start
            else:
                low = end
        return low


def encode_tags(arrays: Iterable[bytes]) -> EncodedTags:
    """Return the tags in the texts of JSON arrays."""
    names = chain.from_iterable(_TAG.finditer(array) for array in arrays)
    found = map(itemgetter(1), names)
    batches = list(iter(lambda: sorted(set(islice(found, _BATCH))), []))
    if not all(one[-1] < following[0] for one, following in pairwise(batches)):
        batches = list(_merge(batches))
    content = b'",\n"'.join(b'",\n"'.join(batch) for batch in batches)
    return EncodedTags(b'"%s"' % content if content else b"")


def _merge(batches: Sequence[Sequence[bytes]]) -> Iterator[list[bytes]]:
    """Yield the tags of all sorted batches in order, each once, in lists of about one batch.

    `heapq.merge` takes three times as long.
    """
    samples = sorted(
        chain.from_iterable(batch[:: max(1, len(batch) // _SAMPLES)] for batch in batches)
    )
    starts = [0] * len(batches)
    for bound in [*samples[_SAMPLES::_SAMPLES], None]:
        merged: set[bytes] = set()
        for number, batch in enumerate(batches):
            stop = len(batch) if bound is None else bisect_left(batch, bound, starts[number])
            merged.update(batch[starts[number] : stop])
            starts[number] = stop
        if merged:
            yield sorted(merged)


def _document(name: bytes, tags: bytes) -> bytes:
    return b'{"name":%s,"tags":[%s]}' % (name, tags)
