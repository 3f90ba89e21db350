"""A small store that is replaced again and again: account and disk agree, and the cap holds."""

from pathlib import Path

import pytest

from tests.system.churn import Options, churn


@pytest.mark.parametrize("options", [Options(10), Options(10, mixed=True, faults=True, kill=True)])
def test_the_account_is_the_disk_and_the_cap_holds(directory: Path, options: Options):
    found = churn(directory, options)
    assert found.errors == []
    assert found.done["pulls"] > 10
