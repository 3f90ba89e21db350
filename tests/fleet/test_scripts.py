"""The scripts in a real server, in random sequences, against a model: no cycle, no lost holder, one fetcher."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.fleet import scripts
from proxy.fleet.keys import FleetKeys
from proxy.oci.digest import Digest
from tests.support.fleet_model import BlobModel
from tests.support.redis_server import MISSING, PROGRAM, RedisServer

NODES = st.sampled_from([f"node-{number}" for number in range(10)])
SILENCE = 3_600_000
BLOB = Digest.from_content(b"blob")


class Scripts(RuleBasedStateMachine):
    """Nodes that download one blob, begin again, fail, fall silent and are told wrong things."""

    server: RedisServer
    client: Any

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.keys = FleetKeys("test").blob("docker.io", BLOB)
        self.children = 2
        self.model = BlobModel(self.children)
        # The places of the nodes that download, where each was sent, and those that fetch from upstream.
        self.places: dict[str, str] = {}
        self.parents: dict[str, str] = {}
        self.fetchers: set[str] = set()
        # Whether it can be that several nodes fetch from upstream.
        self.is_disturbed = False

    @rule(node=NODES, excluded=st.sets(NODES, max_size=3), offset=st.integers(0, 5))
    def locate(self, node: str, excluded: set[str], offset: int) -> None:
        # Mostly nothing has failed.
        excluded = excluded if len(excluded) == 3 else set()
        self.is_disturbed |= bool(excluded)
        place = self.places.get(node, "")
        answer = self.run(
            scripts.LOCATE, self.keys, node, place, self.children, SILENCE, offset, 0, *excluded
        )
        if not place:
            # The place is by the server's clock.
            assert node in self.model.places or all(
                int(float(answer[0])) > place for place, _ in self.model.order
            )
        expected = self.model.locate(
            node, 0, place=int(float(answer[0])), offset=offset, excluded=excluded
        )
        assert ("upstream", "whole", "growing")[answer[1]] == expected.source
        assert (answer[2] if len(answer) > 2 else "") == expected.node
        assert int(float(answer[0])) == expected.place
        self.places[node] = answer[0]
        self.parents.pop(node, None)
        self.fetchers.discard(node)
        if expected.source == "upstream":
            self.fetchers.add(node)
        if expected.source == "growing":
            self.parents[node] = expected.node

    @rule(node=NODES, is_stored=st.booleans())
    def finish(self, node: str, is_stored: bool) -> None:
        if node not in self.places:
            return
        self.run(scripts.FINISH, self.keys, node, SILENCE, int(is_stored))
        self.model.finish(node, is_stored=is_stored)
        del self.places[node]
        self.parents.pop(node, None)
        self.fetchers.discard(node)
        # Those that it has sent to ask again.
        for child in [child for child, parent in self.parents.items() if parent == node]:
            del self.parents[child]

    @rule(node=NODES)
    def renew(self, node: str) -> None:
        if node in self.places:
            self.run(scripts.RENEW, self.keys[1:], node, self.places[node], SILENCE)
            self.model.renew(node, int(float(self.places[node])))

    @rule(node=NODES)
    def fall_silent(self, node: str) -> None:
        if node in self.model.places:
            self.client.zadd(self.keys.seen, {node: 0})
            self.model.silence(node)
            self.is_disturbed = True

    @rule(node=NODES)
    def announce(self, node: str) -> None:
        self.run(scripts.ADD, self.keys[:1], node, SILENCE)
        self.model.holders.add(node)

    @rule(node=NODES)
    def evict(self, node: str) -> None:
        self.run(scripts.REMOVE, self.keys[:1], node)
        self.model.holders.discard(node)
        self.is_disturbed = True

    @rule()
    def restart_empty(self) -> None:
        self.client.flushall()
        self.model.lose_everything()
        self.is_disturbed = True

    @invariant()
    def no_nodes_wait_for_each_other(self) -> None:
        for node in self.parents:
            seen = {node}
            at = node
            while at := self.parents.get(at, ""):
                assert at not in seen
                seen.add(at)

    @invariant()
    def no_holder_is_lost(self) -> None:
        assert self.client.smembers(self.keys.holders) == self.model.holders

    @invariant()
    def one_node_fetches(self) -> None:
        if not self.is_disturbed:
            assert len(self.fetchers) <= 1

    def run(self, script: str, keys: tuple[str, ...], *arguments: str | int) -> Any:
        return self.client.eval(script, len(keys), *keys, *arguments)


@pytest.mark.skipif(PROGRAM is None, reason=MISSING)
class TestScripts(Scripts.TestCase):  # type: ignore[misc,valid-type]
    """Random sequences of what nodes do."""

    settings = settings(deadline=None, stateful_step_count=40)

    @classmethod
    def setUpClass(cls) -> None:
        cls.directory = tempfile.TemporaryDirectory()
        Scripts.server = RedisServer(Path(cls.directory.name))
        Scripts.server.start()
        Scripts.client = redis.Redis(
            unix_socket_path=str(Scripts.server.socket), decode_responses=True, protocol=2
        )

    @classmethod
    def tearDownClass(cls) -> None:
        Scripts.client.close()
        Scripts.server.close()
        cls.directory.cleanup()


@pytest.fixture
def client(tmp_path: Path):
    if PROGRAM is None:
        pytest.skip(MISSING)
    server = RedisServer(tmp_path)
    server.start()
    with redis.Redis(
        unix_socket_path=str(server.socket), decode_responses=True, protocol=2
    ) as client:
        yield client
    server.close()


def test_a_blob_has_a_bounded_number_of_holders_and_never_loses_all(client):
    keys = FleetKeys("test").blob("docker.io", BLOB)
    for number in range(200):
        client.eval(scripts.ADD, 1, keys.holders, f"node-{number}", SILENCE)
        assert client.sismember(keys.holders, f"node-{number}")
        assert client.scard(keys.holders) == min(number + 1, scripts.MAX_HOLDERS)


@pytest.mark.parametrize("children", [1, 4])
def test_a_thousand_nodes_form_a_tree_in_which_none_feeds_more_than_its_children(client, children):
    keys = FleetKeys("test").blob("docker.io", BLOB)
    fed: dict[str, int] = {}
    depths: dict[str, int] = {}
    for number in range(1000):
        answer = client.eval(
            scripts.LOCATE, 3, *keys, f"node-{number}", "", children, SILENCE, 0, 0
        )
        parent = answer[2] if len(answer) > 2 else ""
        assert bool(parent) == (number > 0)
        fed[parent] = fed.get(parent, 0) + 1
        depths[f"node-{number}"] = depths.get(parent, 0) + 1
    assert max(fed.values()) == children
    assert max(depths.values()) == (1000 if children == 1 else 6)
