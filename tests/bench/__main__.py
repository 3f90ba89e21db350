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

from tests.bench.figures import LoadSize
from tests.bench.parts import LONG, PARTS, SHORT, Setup
from tests.bench.plots import draw
from tests.bench.report import Table, write_goals
from tests.bench.testbed import OTHER

RESULTS = Path(__file__).with_name("results")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="tests/bench/run",
        description="Measure pullcache and its peers alternately, all on loopback. Compare the "
        "ratios: the absolute figures depend on this machine and its load. Exits with 0 unless "
        "a measurement failed; missed goals are only reported.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"parts to run (default: all): {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--short", action="store_true", help="run a short form of each part, two minutes in all"
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="directory for the figures and their plots "
        "(default: tests/bench/results, or none with --short)",
    )
    parser.add_argument(
        "--other",
        type=Path,
        metavar="CHECKOUT",
        help="also measure the pullcache of this checkout",
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    # SystemExit runs the exits of the contexts, which stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    size = SHORT if options.short else LONG
    results = options.results or (None if options.short else RESULTS)
    measured = {}
    for name in options.parts or PARTS:
        measured[name] = _run(name, size, options.other and options.other.resolve())
        # After each part, so that an interrupted run keeps the finished parts.
        if results:
            _write(results, name, measured[name], is_short=options.short)
    write_goals(sys.stdout, measured)
    return int(any(part["failures"] for part in measured.values()))


def _run(name: str, size: LoadSize, other: Path | None) -> dict[str, Any]:
    """Run the measurements of one part. After a failed one the others still run."""
    part = PARTS[name]
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    sys.stdout.write(f"\n{name}\n")
    table = Table(sys.stdout, [*part.columns, *([OTHER] if other else [])])

    @contextmanager
    def reporting_errors(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (after any error the others run)
            table.add_failure(what, error)
            failures.append(f"{what}: {error}")

    with (
        reporting_errors(name),
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        part.open(Setup(size, Path(directory), other)) as measurements,
    ):
        for what, measurement in measurements.items():
            with reporting_errors(what):
                for row in measurement():
                    table.add(row)
                    rows.append(row.as_json)
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    return {"rows": rows, "failures": failures}


def _write(results: Path, name: str, part: dict[str, Any], *, is_short: bool) -> None:
    results.mkdir(parents=True, exist_ok=True)
    context = {"short": is_short, "cores": os.cpu_count(), "kernel": platform.release()}
    (results / f"{name}.json").write_text(json.dumps({**context, **part}, indent=1) + "\n")
    draw(name, part["rows"], results / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
