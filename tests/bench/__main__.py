"""The command line of the benchmark."""

import argparse
import json
import os
import signal
import sys
import tempfile
from itertools import chain
from pathlib import Path

from tests.bench import bundles, links, measures, report
from tests.bench.content import Content
from tests.bench.stage import Stage


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="tests/bench/run",
        description="Measure pullcache beside its peers, all on loopback, each pair alternately. "
        "Ratios count, absolute figures are of this machine at this time. "
        "Fails only if something did not work.",
    )
    parser.add_argument("--short", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument(
        "--other", type=Path, metavar="CHECKOUT", help="measure that pullcache too, in this run"
    )
    options = parser.parse_args()
    size = measures.SHORT if options.short else measures.LONG
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        content = Content(
            Path(place) / "files", hits=measures.HITS, cold=size.cold, crowd=size.crowd
        )
        other = options.other and options.other.resolve()
        with Stage(Path(place), content, other) as stage:
            table = report.Table(sys.stdout, list(stage.servers))
            figures = chain(
                measures.measure(stage, size),
                links.measure(stage, size, Path(place) / "linked"),
                bundles.measure(size, Path(place) / "bundles"),
            )
            for row in figures:
                table.add(row)
                rows.append(row)
    if options.json:
        document = {
            "short": options.short,
            "cores": os.cpu_count(),
            "rows": [row.as_json for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
