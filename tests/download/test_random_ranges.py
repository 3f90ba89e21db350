"""Thousands of random ranges of missing and growing blobs, while transfers break."""

import asyncio
import random

from tests.fakes.faults import Fault
from tests.support.examples import scaled

MIB = 1 << 20
BLOB_COUNT = 12
RANGE_COUNT = scaled(3000)
# Seconds; a busy machine completes fewer ranges in this time.
TIME_LIMIT = 12.0
CLIENTS = 24


def random_fault(dice: random.Random) -> Fault:
    cut = dice.randrange(1, 4 * MIB)
    return dice.choice(
        [
            Fault(cut_at=cut),
            Fault(cut_at=cut, reset=True),
            Fault(status=503, body=b""),
            Fault(ignore_range=True),
            Fault(rate=4 * MIB),
        ]
    )


async def test_random_ranges_of_growing_blobs_are_right_whatever_fails(registry, make_program):
    program = await make_program(
        fetch={"parallel_above": "2MB", "attempts": 10, "max_waiting_per_client": 1000}
    )
    dice = random.Random(11)
    blobs = [dice.randbytes(dice.randrange(1, 9 * MIB)) for _ in range(BLOB_COUNT)]
    digests = [registry.add_blob(content) for content in blobs]
    for digest in digests * 6:
        registry.fail(registry.body_of(digest), random_fault(dice))
    left = RANGE_COUNT
    checked = 0
    now = asyncio.get_running_loop().time
    began = now()

    async def client(number: int) -> None:
        nonlocal left, checked
        own = random.Random(number)
        while left > 0 and now() < began + TIME_LIMIT:
            left -= 1
            # New blobs are added all the time: later ranges choose among more blobs.
            known = 1 + (RANGE_COUNT - left) * BLOB_COUNT // (RANGE_COUNT + 1)
            index = max(own.randrange(known), own.randrange(known))
            content = blobs[index]
            start = own.randrange(len(content))
            stop = min(len(content), start + own.choice([1, 100, 70_000, MIB]))
            if own.random() < 0.02:
                # A client that disconnects in the middle.
                async with program.opened(f"/v2/library/app/blobs/{digests[index]}") as response:
                    await response.content.read(1000)
                    response.close()
                continue
            answer = await program.blob(digests[index], Range=f"bytes={start}-{stop - 1}")
            if answer.status == 200:
                assert answer.body == content[: len(answer.body)]
                continue
            assert (answer.status, answer.is_whole) == (206, True)
            assert answer.body == content[start:stop]
            checked += 1

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
    assert checked > (RANGE_COUNT - left) * 0.9
    for digest in digests:
        assert (await program.blob(digest)).digest == digest
    await program.wait_for_downloads()
    assert program.stored() == set(digests)
