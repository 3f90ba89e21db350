"""A short run of each fuzzer."""

import asyncio
from pathlib import Path

import pytest

from tests.fuzz.runs import fuzz_clients, fuzz_upstreams

pytestmark = pytest.mark.system


def test_random_requests_of_clients_cause_no_internal_error(tmp_path: Path):
    findings = asyncio.run(fuzz_clients(tmp_path, 1500, seed=1))
    assert findings.problems == []
    assert findings.statuses[200] > 100


def test_random_responses_of_an_upstream_cause_no_internal_error(tmp_path: Path):
    findings = asyncio.run(fuzz_upstreams(tmp_path, 200, seed=1))
    assert findings.problems == []
    assert findings.statuses[200] > 0
