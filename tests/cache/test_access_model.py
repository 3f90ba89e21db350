"""Random sequences of what clients, upstreams, mirrors and the store do, against a model of access.

`tests/support/access_world.py` is the model. `access_mutations.py` takes each rule of access out of the
program; the model has to notice. The unit tests run some hundred random steps. By hand, all of it:

    PULLCACHE_MODEL_STEPS=10000 pytest -o timeout=0 tests/cache/test_access_model.py
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.support import access_mutations as mutations
from tests.support.access_world import (
    HUB,
    IMAGES,
    LAYERS,
    MANIFESTS,
    PLACES,
    THINGS,
    UNTYPED,
    Mode,
    Place,
    World,
)
from tests.support.examples import scaled

STEPS = 40
BY_HAND = int(os.environ.get("PULLCACHE_MODEL_STEPS", "0"))

A, B, C = PLACES
LAYER, IMAGE, OTHER_IMAGE = LAYERS[0], *IMAGES[:2]
Scenario = Callable[[World], Awaitable[None]]
Mutation = Callable[[pytest.MonkeyPatch], None]

places = st.sampled_from(PLACES)
things = st.sampled_from([*THINGS.values()])
layers = st.sampled_from(LAYERS)
manifests = st.sampled_from(MANIFESTS)
methods = st.sampled_from(["GET", "GET", "HEAD"])
modes = st.sampled_from(["honest", "honest", "portal", "json", "redirect", "echo"])


class AccessAgainstModel(RuleBasedStateMachine):
    """The steps; `World` has the checks."""

    @initialize(place=places, method=methods)
    def start(self, place, method):
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.world = World()
        self.run_(self.world.start())
        for thing in THINGS.values():
            self.world.push(place, thing)
            self.run_(self.world.pull(place, thing, method, is_ranged=False))

    def run_(self, work: Coroutine[Any, Any, None]) -> None:
        self.runner.run(work)

    # Upstream.

    @rule(place=places, thing=things, to_mirror=st.booleans())
    def push(self, place, thing, to_mirror):
        self.world.push(place, thing, to_mirror=to_mirror)

    @rule(place=places, thing=manifests, to_mirror=st.booleans())
    def push_tag(self, place, thing, to_mirror):
        self.world.push_tag(place, thing, to_mirror=to_mirror)

    @rule(place=places)
    def withdraw_all(self, place):
        for thing in THINGS.values():
            self.world.withdraw(place, thing)

    @rule(place=places, mode=modes)
    def lie(self, place, mode):
        self.world.registries[place.upstream].mode = self._mode(place, mode)

    def _mode(self, place: Place, mode: Mode) -> Mode:
        # Where two repositories are, a registry that repeats digests opens what it has sent itself.
        return "honest" if mode == "echo" and place.upstream == HUB else mode

    # Clients.

    @rule(place=places, thing=things, method=methods, is_ranged=st.booleans())
    def pull(self, place, thing, method, is_ranged):
        self.run_(self.world.pull(place, thing, method, is_ranged=is_ranged))

    @rule(thing=things, method=methods, mode=modes)
    def pull_everywhere(self, thing, method, mode):
        for place in PLACES:
            mode_here = self._mode(place, mode)
            self.run_(self.world.pull_from_liar(place, thing, method, mode_here))

    @rule(place=places, method=methods, takes_indexes=st.booleans())
    def pull_tag(self, place, method, takes_indexes):
        self.run_(self.world.pull_tag(place, method, takes_indexes=takes_indexes))

    @rule(place=places, first=manifests, second=manifests)
    def pull_tag_of_liar(self, place, first, second):
        self.run_(self.world.pull_tag_of_liar(place, first, second))

    @rule(first=places, second=places, layer=layers, method=methods, mode=modes)
    def overlap(self, first, second, layer, method, mode):
        mode = self._mode(second, mode)
        self.run_(self.world.overlap(first, second, layer, method, mode))

    @rule(first=places, second=places, thing=things, method=methods, mode=modes)
    def come_and_go(self, first, second, thing, method, mode):
        mode = self._mode(first, mode)
        self.run_(self.world.come_and_go(first, second, thing, method, mode))

    # The program.

    @rule(place=places, layer=layers)
    def interrupt(self, place, layer):
        self.run_(self.world.interrupt(place, layer))

    @rule(idle=st.sampled_from([0.5, 2.0]))
    def evict(self, idle):
        self.run_(self.world.evict(idle))

    @rule()
    def restart(self):
        self.run_(self.world.restart())

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.run_(self.world.stop())
            self.runner.close()


def run_model(steps: int, **options: Any) -> None:
    run_state_machine_as_test(
        AccessAgainstModel,
        settings=settings(
            max_examples=max(1, steps // STEPS),
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[*HealthCheck],
            **options,
        ),
    )


@pytest.fixture(autouse=True)
def _no_memory_of_failures(monkeypatch):
    """Registries change their minds within a step."""
    monkeypatch.setattr("proxy.download.manager.ABSENT_TTL", 0.0)
    monkeypatch.setattr("proxy.download.manager.MISMATCH_BACKOFF", 0.0)


@pytest.mark.timeout(300)
def test_the_cache_serves_what_upstream_would_and_nothing_else():
    run_model(BY_HAND or scaled(4) * STEPS)


# The rules, taken out one at a time.


async def apart(world: World) -> None:
    await world.pull(B, LAYER, "GET", is_ranged=False)


def liar(place: Place, mode: Mode) -> Scenario:
    return lambda world: world.pull_from_liar(place, LAYER, "GET", mode)


async def claim(world: World) -> None:
    world.push_tag(B, IMAGE)
    await world.pull_tag(B, "GET", takes_indexes=True)
    await world.pull(B, LAYER, "GET", is_ranged=False)


async def mirror(world: World) -> None:
    await world.pull_tag_of_liar(B, OTHER_IMAGE, IMAGE)


async def arrive(world: World) -> None:
    await world.evict(0.5)
    await world.overlap(A, B, LAYER, "GET", "redirect")


async def leave_partial(world: World) -> None:
    await world.evict(0.5)
    await world.interrupt(A, LAYER)
    await world.pull(B, LAYER, "GET", is_ranged=False)


def move(first: Place, second: Place, mode: Mode) -> Scenario:
    return lambda world: world.come_and_go(first, second, LAYER, "GET", mode)


async def types(world: World) -> None:
    await world.evict(0.5)
    await world.restart()  # it has them in memory, too
    for place in (C, A, A):
        world.push(place, UNTYPED)
        await world.pull(place, UNTYPED, "GET", is_ranged=False)


async def withdraw(world: World) -> None:
    world.withdraw(A, LAYER)
    await world.pull(A, LAYER, "GET", is_ranged=False)


# For each rule, steps at the end of which its absence shows.
SCENARIOS: dict[Mutation, Scenario] = {
    mutations.a_digest_is_enough: apart,
    mutations.any_answer_is_a_proof: liar(B, "json"),
    mutations.a_redirect_is_a_proof: liar(B, "redirect"),
    mutations.a_web_page_is_a_proof: liar(B, "portal"),
    mutations.upstreams_prove_what_others_have_sent: liar(C, "echo"),
    mutations.a_manifest_links_what_it_names: claim,
    mutations.a_mirrors_head_links_what_it_names: mirror,
    mutations.a_running_download_is_joined_freely: arrive,
    mutations.a_running_download_links_who_joins_it: arrive,
    mutations.partial_bytes_are_for_everybody: leave_partial,
    mutations.links_survive_an_eviction: move(A, B, "honest"),
    mutations.senders_survive_an_eviction: move(C, A, "echo"),
    mutations.media_types_are_the_first_speakers: types,
    mutations.nothing_is_ever_linked: withdraw,
}
each_mutation = pytest.mark.parametrize("mutation", SCENARIOS, ids=lambda one: one.__name__)


@each_mutation
async def test_the_model_notices_that_a_rule_is_missing(monkeypatch, mutation):
    await play(SCENARIOS[mutation])
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        await play(SCENARIOS[mutation])


async def play(scenario: Scenario) -> None:
    """Play a scenario in a new world, in which one place has everything and the cache too."""
    world = World()
    await world.start()
    try:
        for thing in THINGS.values():
            world.push(A, thing)
            await world.pull(A, thing, "GET", is_ranged=False)
        await scenario(world)
    finally:
        await world.stop()


@pytest.mark.skipif(
    not BY_HAND,
    reason="takes minutes: set PULLCACHE_MODEL_STEPS; test_the_model_notices_that_a_rule_is_missing always runs",
)
@each_mutation
def test_random_steps_notice_that_a_rule_is_missing(monkeypatch, mutation):
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        run_model(BY_HAND, phases=[Phase.generate], database=None)
