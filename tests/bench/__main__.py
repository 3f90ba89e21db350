"""The command line of the benchmark."""

import argparse
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.figures import Size
from tests.bench.parts import LONG, PARTS, SHORT, Setting
from tests.bench.plots import draw
from tests.bench.report import Table, tell_goals
from tests.bench.stage import OTHER

RESULTS = Path(__file__).with_name("results")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/bench/run",
        description="Measure pullcache beside its peers, all on loopback, each pair alternately. "
        "Ratios count, absolute figures are of this machine at this time. "
        "Fails only if something did not work.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; else all")
    parser.add_argument("--short", action="store_true", help="little of everything: two minutes")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="where every figure is written, and plots of them; without --short, tests/bench/results",
    )
    parser.add_argument(
        "--other", type=Path, metavar="CHECKOUT", help="measure that pullcache too, in this run"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    size = SHORT if options.short else LONG
    results = options.results or (None if options.short else RESULTS)
    found = {}
    for name in options.parts or PARTS:
        found[name] = _run(name, size, options.other and options.other.resolve())
        # At once: whoever ends the rest keeps this.
        if results:
            _write(results, name, found[name], is_short=options.short)
    tell_goals(sys.stdout, found)
    return int(any(part["failures"] for part in found.values()))


def _run(name: str, size: Size, other: Path | None) -> dict[str, Any]:
    """Take the measures of one part; one that fails does not keep the others from being taken."""
    part = PARTS[name]
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    sys.stdout.write(f"\n{name}\n")
    table = Table(sys.stdout, [*part.columns, *([OTHER] if other else [])])

    @contextmanager
    def whatever_happens(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever it is, the others go on)
            table.fail(what, error)
            failures.append(f"{what}: {error}")

    with (
        whatever_happens(name),
        tempfile.TemporaryDirectory(prefix="bench-") as place,
        part.open(Setting(size, Path(place), other)) as measures,
    ):
        for what, measure in measures.items():
            with whatever_happens(what):
                for row in measure():
                    table.add(row)
                    rows.append(row.as_json)
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")
    return {"rows": rows, "failures": failures}


def _write(results: Path, name: str, part: dict[str, Any], *, is_short: bool) -> None:
    results.mkdir(parents=True, exist_ok=True)
    about = {"short": is_short, "cores": os.cpu_count(), "kernel": platform.release()}
    (results / f"{name}.json").write_text(json.dumps({**about, **part}, indent=1) + "\n")
    draw(name, part["rows"], results / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
