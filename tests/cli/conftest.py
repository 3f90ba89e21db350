"""Fixtures for tests of commands."""

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Keep the daemon's log out of the output of commands in the same process.

    A command that embeds a daemon configures the log for its own stderr, which ends with it.
    """
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.configure(**before)
