"""Thousands of requests to pullcache and to nginx: they are treated alike, or the difference is listed."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.system.http_differential import ANSWERED_HERE, make_requests, running_servers

COUNT = 3000


@pytest.mark.timeout(180)
def test_each_request_is_accepted_by_both_or_refused_by_both_or_the_difference_is_listed(
    directory: Path,
):
    requests = make_requests(random.Random(9112), COUNT)
    with running_servers(directory) as servers:
        counts = asyncio.run(servers.compare_all(requests))
    assert not [reason for reason in counts if reason.startswith("UNLISTED")]
    assert counts[""] > COUNT // 2
    assert sum(counts[one.why] for one in ANSWERED_HERE) < COUNT // 50
