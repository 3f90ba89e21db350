"""The simulated roll-out, short: what the real directory makes of many nodes that begin at once."""

import pytest

from tests.bench.fleet_rollout import SIZES, RolloutWorld, simulate
from tests.support.redis_server import MISSING, PROGRAM


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
@pytest.mark.timeout(60)
async def test_two_hundred_nodes_cost_upstream_one_transfer(tmp_path):
    world = RolloutWorld(nodes=200, zones=2, central=3)
    result = await simulate(world, tmp_path)
    blobs = len(SIZES)
    assert (result.from_upstream, result.upstream_bytes) == (blobs, sum(SIZES))
    # Each zone asks the central nodes once for each blob, and for the tag.
    assert (result.from_central, result.tag_leaders) == (2 * blobs, 2)
    assert result.from_central + result.from_peers == 200 * blobs
    # A tree and no chain: in a zone of 100 nodes with 4 children each, 4 levels are enough if nobody finishes.
    assert result.deepest <= 12
    assert result.most_children <= world.children
    # One node alone would need 200 times the image over its link.
    assert result.last_seconds < 200 * sum(SIZES) / world.link / 10
    assert result.questions < 200 * blobs * 2.2
