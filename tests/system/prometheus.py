"""Debian's Prometheus with the example configuration and the rules of config/prometheus."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.system.http_client import has_status, send_request
from tests.system.processes import Process

CONFIG = Path(__file__).parents[2] / "config" / "prometheus"


class Prometheus:
    """A Prometheus that scrapes the daemon at `target` every second."""

    def __init__(self, directory: Path, target: str) -> None:
        directory.mkdir(parents=True)
        example = (CONFIG / "prometheus.yml").read_text()
        # Only the address and the interval of the example are changed.
        assert '"127.0.0.1:5000"' in example
        config = directory / "prometheus.yml"
        config.write_text(example.replace("127.0.0.1:5000", target).replace("15s", "1s"))
        rules = (CONFIG / "pullcache.rules.yml").read_text()
        (directory / "pullcache.rules.yml").write_text(rules)
        argv = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        self.process = process = Process(directory, "prometheus", argv)

        def find_address() -> str:
            match = re.search(r'msg="Listening on" address=(\S+)', process.stderr_log.read_text())
            return match[1] if match else ""

        self.url = f"http://{process.wait_until(find_address, 'its address')}"
        process.wait_until(lambda: has_status(self.url, "/-/ready"), "readiness", timeout=60)

    def get(self, path: str, **parameters: str) -> Any:
        """Return the `data` of a response of its API; fail on an error."""
        response = send_request(self.url, f"/api/v1/{path}?{urlencode(parameters)}")
        document = json.loads(response.body)
        assert document["status"] == "success", (parameters, document)
        return document["data"]

    def query(self, query: str) -> list[Any]:
        """Return the series of a query at this time, each with `metric` and `value`."""
        series: list[Any] = self.get("query", query=query)["result"]
        return series

    def value(self, query: str) -> float:
        """Return the value of a query with one series, or 0 if it has none yet."""
        series = self.query(query)
        return float(series[0]["value"][1]) if series else 0.0

    def stop(self) -> None:
        self.process.stop()
