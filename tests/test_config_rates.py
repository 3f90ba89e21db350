"""`fetch.max_rate`: rates, and times of day."""

import pytest

from proxy.config import dump, load, to_toml
from proxy.config.rates import RateSchedule
from proxy.errors import ConfigError
from tests.test_config import load_text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("200Mbit", 25_000_000),
        ("1.5 Gbit/s", 187_500_000),
        ("1000kbit", 125_000),
        ("25MB", 25_000_000),
        ("25MB/s", 25_000_000),
        ("1MiB", 1 << 20),
        (1_000_000, 1_000_000),
    ],
)
def test_a_rate_is_in_bits_or_bytes_a_second(text, rate):
    schedule = RateSchedule.parse(text)
    assert schedule
    assert {schedule.rate_at(minute) for minute in (0, 720, 1439)} == {rate}


def test_off_is_no_cap():
    assert not RateSchedule.parse("off")
    assert RateSchedule.parse("off").rate_at(0) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("fast", "not a rate"),
        ("-1Mbit", "not a rate"),
        (True, "not a rate"),
        ("0", "less than 1Mbit"),
        ("999kbit", "less than 1Mbit"),
        (10, "less than 1Mbit"),
        ([{"from": "08:00", "to": "18:00"}], "from, to and rate"),
        (["200Mbit"], "from, to and rate"),
        ([{"from": "8:00", "to": "18:00", "rate": "1Mbit"}], "not a time of day"),
        ([{"from": "08:00", "to": "25:00", "rate": "1Mbit"}], "not a time of day"),
        ([{"from": "08:00", "to": "08:00", "rate": "1Mbit"}], "is no time"),
    ],
)
def test_an_invalid_cap_says_what_to_write(value, reason):
    with pytest.raises(ValueError, match=reason):
        RateSchedule.parse(value)


DAY = """
    [fetch]
    max_rate = [
      {from = "08:00", to = "18:00", rate = "200Mbit"},
      {from = "07:00", to = "20:00", rate = "400Mbit"},
      {from = "23:00", to = "24:00", rate = "100Mbit"},
      {from = "22:30", to = "01:00", rate = "800Mbit"},
    ]
"""


def test_the_first_period_that_applies_counts_and_outside_there_is_no_cap(tmp_path):
    schedule = load_text(DAY, tmp_path).fetch.max_rate
    rates = {
        f"{minute // 60:02}:{minute % 60:02}": schedule.rate_at(minute)
        for minute in (59, 60, 419, 420, 480, 1079, 1080, 1199, 1200, 1350, 1380, 1439, 0)
    }
    assert rates == {
        "00:59": 100_000_000,
        "01:00": None,
        "06:59": None,
        "07:00": 50_000_000,
        "08:00": 25_000_000,
        "17:59": 25_000_000,
        "18:00": 50_000_000,
        "19:59": 50_000_000,
        "20:00": None,
        "22:30": 100_000_000,
        "23:00": 12_500_000,
        "23:59": 12_500_000,
        "00:00": 100_000_000,
    }


def test_the_configuration_that_is_shown_has_the_same_meaning(tmp_path):
    config = load_text(DAY, tmp_path)
    assert load_text(to_toml(config), tmp_path) == config
    assert dump(config)["fetch"]["max_rate"][0] == {
        "from": "08:00",
        "to": "18:00",
        "rate": "200Mbit",
    }
    environ = {"PULLCACHE_FETCH_MAX_RATE": "200Mbit"}
    assert load(None, environ, {}, is_root=True).fetch.max_rate.rate_at(0) == 25_000_000
    with pytest.raises(ConfigError, match=r"fetch.max_rate: 'x' is not a rate"):
        load_text("fetch.max_rate = 'x'", tmp_path)
