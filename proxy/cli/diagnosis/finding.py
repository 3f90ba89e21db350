"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found. `advice` says what to do, empty if nothing must be done."""

    check: str
    state: State
    text: str
    advice: str = ""
