"""Debian's Prometheus, as it runs with the configuration and the rules that we give away."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.system.processes import Process
from tests.system.wire import answers, ask

CONFIG = Path(__file__).parents[2] / "config" / "prometheus"


class Prometheus:
    """A Prometheus that scrapes the daemon at `target` each second, on a port of its own."""

    def __init__(self, directory: Path, target: str) -> None:
        directory.mkdir(parents=True)
        example = (CONFIG / "prometheus.yml").read_text()
        # All that is changed in the example.
        assert '"127.0.0.1:5000"' in example
        hurried = example.replace("127.0.0.1:5000", target).replace("15s", "1s")
        config = directory / "prometheus.yml"
        config.write_text(hurried)
        rules = (CONFIG / "pullcache.rules.yml").read_text()
        (directory / "pullcache.rules.yml").write_text(rules)
        argv = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        self.process = process = Process(directory, "prometheus", argv)

        def bound() -> str:
            found = re.search(r'msg="Listening on" address=(\S+)', process.err.read_text())
            return found[1] if found else ""

        self.url = f"http://{process.wait_until(bound, 'its address')}"
        process.wait_until(lambda: answers(self.url, "/-/ready"), "readiness", deadline=60)

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API; an error fails the test with its text."""
        answer = ask(self.url, f"/api/v1/{path}?{urlencode(parameters)}")
        document = json.loads(answer.body)
        assert document["status"] == "success", (parameters, document)
        return document["data"]

    def query(self, query: str) -> list[Any]:
        """Return the series that a query has now, each with `metric` and `value`."""
        found: list[Any] = self.get("query", query=query)["result"]
        return found

    def number(self, query: str) -> float:
        """Return the value of a query of one series, 0 if it has none yet."""
        found = self.query(query)
        return float(found[0]["value"][1]) if found else 0.0

    def stop(self) -> None:
        self.process.stop()
