"""A minimum age in random sequences of moves, roll-backs, pulls, outages and restarts, beside a model of it."""

import os
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from proxy.storage.records.tag_history import MAX_TAG_HISTORY
from tests.fakes.registry import FakeRegistry
from tests.support.preload_api import run_preload
from tests.support.program import Program

MIN_AGE = 100.0
RULE = {"images": ["*"], "mode": "enforce", "min_age": "100s"}
STEPS = int(os.environ.get("PULLCACHE_MODEL_STEPS", "60"))


@dataclass
class AgeModel:
    """What the cache has seen of one tag: since when, what was old enough, and what the tag meant in order."""

    unripe: str
    seen: dict[str, float] = field(default_factory=dict)
    ripe: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)

    def see(self, digest: str, now: float) -> None:
        """Record that upstream named the digest for the tag."""
        is_first = not self.order and digest not in self.seen
        self.seen.setdefault(digest, now)
        if digest in self.order:
            self.order.remove(digest)
        self.order.append(digest)
        if is_first:
            self.ripe.add(digest)

    def by_tag(self, now: float) -> str | None:
        """Return the digest that clients get for the tag; None if it is refused."""
        newest = self.order[-1]
        if self.is_old_enough(newest, now):
            self.ripe.add(newest)
            return newest
        if self.unripe == "deny":
            return None
        return next((one for one in self.order[-2::-1] if self.is_old_enough(one, now)), None)

    def by_digest(self, digest: str, now: float) -> bool:
        """Tell whether clients get a digest."""
        is_first = not self.seen
        self.seen.setdefault(digest, now)
        if is_first or self.is_old_enough(digest, now):
            self.ripe.add(digest)
        return digest in self.ripe

    def is_old_enough(self, digest: str, now: float) -> bool:
        return digest in self.ripe or now - self.seen[digest] >= MIN_AGE


class PolicyWorld:
    """A registry whose tag moves, the program, and the model."""

    def __init__(self, registry: FakeRegistry, program: Program, rng: random.Random, unripe: str):
        self.registry = registry
        self.program = program
        self.model = AgeModel(unripe)
        self.is_offline = False
        self._rng = rng
        self._images = [registry.add_image(layers=[b"0"])]
        self._current = self._images[0].digest

    async def move(self) -> None:
        if len(self._images) == MAX_TAG_HISTORY:
            await self.roll_back()
            return
        self._images.append(self.registry.add_image(layers=[self._rng.randbytes(8)]))
        self._current = self._images[-1].digest

    async def roll_back(self) -> None:
        self._current = self._rng.choice(self._images).digest
        self.registry.move_tag("library/app", "latest", self._current)

    async def wait(self) -> None:
        self.program.clock.advance(self._rng.choice([10.0, 50.0, 98.0, 101.0, 500.0]))

    async def restart(self) -> None:
        self.is_offline = self._rng.random() < 0.3
        settings: dict[str, Any] = {"offline": self.is_offline}
        await self.program.restart(**settings)

    async def preload(self) -> None:
        if not self.is_offline:
            self.model.see(self._current, self.program.clock())
            self.model.by_tag(self.program.clock())
            await run_preload(self.program, "app:latest")

    async def pull_tag(self) -> None:
        now = self.program.clock()
        if not self.is_offline:
            self.model.see(self._current, now)
        answer = await self.program.manifest("library/app")
        expected = self.model.by_tag(now) if self.model.order else None
        if expected is None:
            # Offline a tag that was refused is not known.
            assert answer.status == 403 or (self.is_offline and answer.status == 503)
            return
        assert (answer.status, answer.digest) == (200, expected)
        stands_in = expected != self.model.order[-1]
        assert ("has moved" in answer.headers.get("Warning", "")) == stands_in

    async def pull_digest(self) -> None:
        digest = self._rng.choice(self._images).digest
        if self.is_offline and digest not in self.model.seen:
            return
        is_allowed = self.model.by_digest(digest, self.program.clock())
        answer = await self.program.manifest("library/app", digest)
        statuses = {200 if is_allowed else 403, 503 if self.is_offline else 0}
        assert answer.status in statuses


@pytest.mark.parametrize("unripe", ["previous", "deny"])
@pytest.mark.parametrize("seed", range(4))
async def test_the_cache_serves_what_the_model_says(registry, make_program, seed, unripe):
    rng = random.Random(f"{seed} {unripe}")
    program = await make_program(
        policy=[{**RULE, "unripe": unripe}],
        manifests={"ttl": "0s", "tag_ttl": {}, "stale_if_error": "365d"},
    )
    world = PolicyWorld(registry, program, rng, unripe)
    steps = [world.pull_tag] * 3 + [world.pull_digest, world.move, world.roll_back]
    steps += [world.wait, world.restart, world.preload]
    taken: list[str] = []
    for _ in range(STEPS):
        step = rng.choice(steps)
        taken.append(step.__name__)
        # What a tag meant at the same moment has no order.
        program.clock.advance(1)
        try:
            await step()
        except AssertionError as error:
            error.add_note(" ".join(taken))
            raise
