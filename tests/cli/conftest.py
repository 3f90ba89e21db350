"""What the tests of commands share."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Undo what a command in this process made of the log: its stderr is gone with it."""
    yield
    structlog.reset_defaults()
