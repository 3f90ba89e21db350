"""The command line of the fuzzers; see `tests/fuzz/__init__.py`."""

import argparse
import asyncio
import secrets
import sys
import tempfile
from pathlib import Path

from tests.fuzz.runs import fuzz_clients, fuzz_upstreams


def main() -> None:
    """Run one fuzzer, print what it has seen, and exit 1 if that is a problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("what", choices=["clients", "upstreams"])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    arguments = parser.parse_args()
    run = fuzz_clients if arguments.what == "clients" else fuzz_upstreams
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    findings = asyncio.run(run(directory, arguments.count, arguments.seed))
    lines = [str(findings), *(f"  {problem}" for problem in findings.problems[:20])]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(findings.problems))


if __name__ == "__main__":
    main()
