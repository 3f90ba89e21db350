"""Rates of transfer, and which one applies at what time of day."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from proxy.config.values import Size

# A lower cap would leave many downloads at once less than upstreams take for a dead connection.
MIN_RATE = 125_000
_BIT_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BITS = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kKMGT]?)bit(?:/s)?")
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
_KEYS = {"from", "to", "rate"}


@dataclass(frozen=True, slots=True)
class _Period:
    start: int
    stop: int
    rate: int
    plain: dict[str, str]

    def contains(self, minute: int) -> bool:
        if self.start < self.stop:
            return self.start <= minute < self.stop
        return minute >= self.start or minute < self.stop  # it goes beyond midnight


class RateSchedule:
    """No cap, one rate, or rates by time of day, of which the first that applies counts.

    `plain` is the value as the file has it.
    """

    schema: ClassVar[dict[str, Any]] = {
        "oneOf": [
            {"type": "string", "examples": ["200Mbit"]},
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["from", "to", "rate"],
                    "additionalProperties": False,
                    "properties": {
                        "from": {"type": "string", "examples": ["08:00"]},
                        "to": {"type": "string", "examples": ["18:00"]},
                        "rate": {"type": "string", "examples": ["200Mbit"]},
                    },
                },
            },
        ]
    }

    def __init__(self, plain: Any, rate: int | None, periods: tuple[_Period, ...] = ()) -> None:
        self.plain = plain
        self._rate = rate
        self._periods = periods

    @classmethod
    def parse(cls, value: object) -> Self:
        """Return the schedule in "off", "200Mbit", "25MB" (a second) or a list of tables.

        Raises `ValueError`.
        """
        if isinstance(value, list):
            periods = tuple(map(_parse_period, value))
            return cls([one.plain for one in periods], None, periods)
        return cls("off", None) if value == "off" else cls(str(value), _parse_rate(value))

    def __bool__(self) -> bool:
        """Whether there is a cap at any time."""
        return self._rate is not None or bool(self._periods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RateSchedule) and self.plain == other.plain

    def __hash__(self) -> int:
        return hash(str(self.plain))

    def __repr__(self) -> str:
        return f"RateSchedule({self.plain!r})"

    def rate_at(self, minute: int) -> int | None:
        """Return the cap in bytes a second at a minute of the day, None if there is none."""
        periods = (one.rate for one in self._periods if one.contains(minute))
        return next(periods, self._rate)


def _parse_rate(value: object) -> int:
    match = _BITS.fullmatch(str(value).strip()) if isinstance(value, str) else None
    if match:
        rate = int(float(match[1]) * _BIT_UNITS[match[2].lower()] / 8)
    else:
        try:
            rate = int(
                Size.parse(str(value).removesuffix("/s") if isinstance(value, str) else value)
            )
        except ValueError as error:
            raise ValueError(f'{value!r} is not a rate (write "200Mbit" or "25MB")') from error
    if rate < MIN_RATE:
        raise ValueError(f'{value!r} is less than 1Mbit a second (write "200Mbit", or "off")')
    return rate


def _parse_period(table: object) -> _Period:
    if not isinstance(table, dict) or table.keys() != _KEYS:
        raise ValueError(
            f"{table!r} does not have from, to and rate (write "
            '{from = "08:00", to = "18:00", rate = "200Mbit"})'
        )
    start, stop = _parse_minute(table["from"]), _parse_minute(table["to"])
    if start == stop:
        raise ValueError(
            f"{table['from']} to {table['to']} is no time (for all day, write one rate)"
        )
    plain = {name: str(table[name]) for name in ("from", "to", "rate")}
    return _Period(start, stop, _parse_rate(table["rate"]), plain)


def _parse_minute(value: object) -> int:
    match = _TIME.fullmatch(str(value))
    if match is None and value != "24:00":
        raise ValueError(f'{value!r} is not a time of day (write "08:00")')
    return int(match[1]) * 60 + int(match[2]) if match else 0
