"""The buffers of downloads, and the limits on their memory."""

import pytest

from proxy.config import FetchSettings
from proxy.config.values import Size
from proxy.download.buffers import BUFFER_SIZE, SMALL_BUFFER_SIZE, BufferPool

KIB, MIB = 1 << 10, 1 << 20


def pool(per_download: str, total: str = "128MiB") -> BufferPool:
    settings = FetchSettings(memory_per_download=Size.parse(per_download), memory=Size.parse(total))
    return BufferPool(settings)


@pytest.mark.parametrize(
    ("per_download", "total", "size"),
    [
        ("16MiB", "128MiB", 2 * MIB),
        ("8MiB", "128MiB", 2 * MIB),
        ("4MiB", "128MiB", MIB),
        ("16MiB", "4MiB", MIB),
        ("1000000B", "128MiB", 244 * KIB),
        ("256KiB", "128MiB", 64 * KIB),
    ],
)
def test_a_limit_on_memory_holds_at_least_four_buffers(per_download, total, size):
    buffers = pool(per_download, total)
    held = 0
    for _ in range(4):
        buffer = buffers.take(64 * MIB, held)
        assert buffer is not None
        assert len(buffer) == size
        held += len(buffer)
    assert buffers.bytes_in_use == 4 * size


def test_a_limit_that_is_reached_gives_no_buffer_until_one_is_given_back():
    buffers = pool("1MiB")
    held = [buffers.take(MIB, number * 256 * KIB) for number in range(4)]
    assert buffers.take(MIB, MIB) is None
    assert held[0] is not None
    buffers.give_back(held[0])
    assert buffers.take(MIB, MIB - 256 * KIB) is not None


def test_below_the_smallest_buffer_a_connection_still_gets_one():
    buffers = pool("1KiB")
    assert buffers.take(MIB, 0) is None
    assert len(buffers.take_small(MIB)) == SMALL_BUFFER_SIZE


def test_buffers_are_reused_until_a_reload_changes_their_size():
    buffers = pool("16MiB")
    first = buffers.take(MIB, 0)
    assert first is not None
    buffers.give_back(first)
    assert buffers.take(BUFFER_SIZE, 0) is first
    buffers.configure(FetchSettings(memory_per_download=Size.parse("1MiB")))
    buffers.give_back(first)
    again = buffers.take(MIB, 0)
    assert again is not None
    assert len(again) == 256 * KIB
    assert buffers.bytes_in_use == 256 * KIB
