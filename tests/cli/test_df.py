"""`pullcache df`: what takes the space of the store, and what goes next."""

import asyncio
import json
import re
from typing import Any

from proxy.cli.api_client import AdminClient
from tests.fakes.images import push_manifest
from tests.support.admin_api import pull_parts
from tests.support.commands import run_on, run_on_terminal
from tests.support.openapi import validate

SHARED, OWN, OTHER = b"shared" * 1000, b"own" * 1000, b"other" * 1000


async def pull(registry, program, name: str, *layers: bytes) -> None:
    push_manifest(registry, name, [*layers], tag="v1")
    blobs = [digest for digest in registry.repository(name).blobs if digest.startswith("sha")]
    await pull_parts(program, name, "v1", *blobs)


async def usage(program) -> dict[str, Any]:
    document = await asyncio.to_thread(AdminClient(program.root).get, "/api/v1/usage")
    validate(document, "StoreUsage")
    return dict(document)


async def test_content_counts_for_each_repository_and_unique_is_what_no_other_has(
    registry, program
):
    await pull(registry, program, "me/app", SHARED, OWN)
    await pull(registry, program, "me/other", SHARED, OTHER)
    found = await usage(program)
    rows = {one["name"]: one for one in found["repositories"]}
    assert rows.keys() == {"me/app", "me/other"}
    shared = rows["me/app"]["size"] - rows["me/app"]["unique"]
    assert shared == rows["me/other"]["size"] - rows["me/other"]["unique"]
    # The layer, and a configuration.
    assert len(SHARED) < shared < len(SHARED) + 200
    assert rows["me/app"]["unique"] == rows["me/app"]["reclaimable"] > len(OWN)
    (upstream,) = found["upstreams"]
    assert upstream["name"] == "docker.io"
    assert upstream["unique"] == upstream["size"]
    assert upstream["size"] == rows["me/app"]["unique"] + rows["me/other"]["unique"] + shared


async def test_what_is_pinned_cannot_be_reclaimed_and_does_not_go_next(registry, program):
    await pull(registry, program, "me/app", OWN)
    await pull(registry, program, "me/other", OTHER)
    assert {one["repository"] for one in (await usage(program))["next"]} == {"me/app", "me/other"}
    await run_on(program, "pin", "me/app:v1")
    found = await usage(program)
    (row,) = [one for one in found["repositories"] if one["name"] == "me/app"]
    assert (row["pinned"], row["reclaimable"]) == (row["size"], 0)
    assert {one["repository"] for one in found["next"]} == {"me/other"}


async def test_the_least_recently_used_goes_first_and_when_follows_from_the_last_day(
    registry, make_program
):
    program = await make_program()
    await pull(registry, program, "me/old", OWN)
    program.clock.advance(3600)
    await pull(registry, program, "me/new", OTHER)
    found = await usage(program)
    first, second = found["next"]
    assert (first["repository"], second["repository"]) == ("me/old", "me/new")
    assert found["stored_last_day"] > len(OWN) + len(OTHER)
    rate = found["stored_last_day"] / 86_400
    assert first["at"] - program.clock() - found["free"] / rate < 2
    assert first["last_used"] < second["last_used"]
    assert 0 < second["at"] - first["at"] <= first["size"] / rate + 2


async def test_idle_content_goes_after_max_idle(registry, make_program):
    program = await make_program(store={"max_idle": "10d"})
    await pull(registry, program, "me/app", OWN)
    (only,) = (await usage(program))["next"]
    assert abs(only["at"] - only["last_used"] - 864_000) < 2


async def test_content_with_a_short_idle_time_goes_before_content_that_was_used_earlier(
    registry, make_program
):
    program = await make_program(rules=[{"images": ["docker.io/me/new"], "max_idle": "2h"}])
    await pull(registry, program, "me/old", OWN)
    program.clock.advance(600)
    await pull(registry, program, "me/new", OTHER)
    first, second = (await usage(program))["next"]
    assert (first["repository"], second["repository"]) == ("me/new", "me/old")
    assert first["at"] < second["at"]


async def test_an_empty_store_has_nothing_to_go(program):
    done = await run_on(program, "df")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "0 B stored in the last day" in done.stdout
    assert "GOES NEXT" not in done.stdout


async def test_the_command_prints_tables_and_a_forecast(registry, program):
    await pull(registry, program, "me/app", OWN)
    await pull(registry, program, "me/other", OTHER)
    text = (await run_on(program, "df")).stdout
    assert re.search(r"^REPOSITORY +SIZE +UNIQUE +PINNED +RECLAIMABLE$", text, re.MULTILINE)
    assert re.search(r"^docker.io +[\d.]+ kB ", text, re.MULTILINE)
    assert re.search(r" stored in the last day; full in about \d+ d", text)
    assert re.search(r"^me/app +[\d.]+ kB +\d+ d .*\d+ d \d+ h *$", text, re.MULTILINE)
    limited = (await run_on(program, "df", "--limit", "1")).stdout
    assert "1 more repositories; --limit 0 shows all" in limited
    one = json.loads((await run_on(program, "df", "--limit", "1", "--json")).stdout)
    assert len(one["repositories"]) == 1


async def test_it_fits_into_60_columns(registry, program):
    await pull(registry, program, "me/app", OWN)
    lines = (await run_on_terminal(program, "df", columns=60)).splitlines()
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in lines]
    assert max(map(len, plain)) <= 60


async def test_shares_of_rules_are_shown_and_what_is_over_goes_next(registry, make_program):
    program = await make_program(
        store={"max_size": "1.2MB"}, rules=[{"images": ["docker.io/ci/*"], "max_share": "1%"}]
    )
    await pull(registry, program, "me/app", OWN)
    await pull(registry, program, "ci/build", OTHER * 4)
    found = await usage(program)
    (share,) = found["shares"]
    assert (share["rule"], share["images"], share["limit"]) == (1, ["docker.io/ci/*"], 12_000)
    assert share["used"] > 20_000
    assert [one["repository"] for one in found["next"]] == ["ci/build", "me/app"]
    text = (await run_on(program, "df")).stdout
    assert re.search(r"^rules\[1\] +\d.* kB +12 kB +docker\.io/ci/\*", text, re.MULTILINE)
