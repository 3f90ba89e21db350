"""The alert rules, checked against the metrics, their promtool tests and their runbook."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.promql import labels_by_metric, unknown_names

DIRECTORY = Path(__file__).parents[1] / "config" / "prometheus"
RUNBOOK = (DIRECTORY / "README.md").read_text(encoding="utf-8")


def read(name: str) -> Any:
    return yaml.safe_load((DIRECTORY / name).read_text(encoding="utf-8"))


RULES = [rule for group in read("pullcache.rules.yml")["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    return labels_by_metric()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_rule_uses_existing_metrics_and_labels(rule, known):
    assert unknown_names(rule["expr"], known) == []


@pytest.mark.parametrize(
    ("query", "unknown"),
    [
        ("rate(pullcache_nothing_total[5m])", ["pullcache_nothing_total"]),
        ('pullcache_store_bytes{reason="size"} > 0', ["pullcache_store_bytes{reason}"]),
        ('pullcache_uncached_total{reason="ful"}', ["pullcache_uncached_total{reason=ful}"]),
        ("sum by (job, colour) (pullcache_store_bytes)", ["by colour"]),
        ("sum by (instance, reason) (pullcache_uncached_total)", []),
        ('histogram_quantile(0.5, sum by (le) (up{job="a"}))', []),
    ],
)
def test_an_unknown_metric_or_label_is_found(query, unknown, known):
    assert unknown_names(query, known) == unknown


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_and_a_runbook(alert):
    assert alert["labels"]["severity"] in ("critical", "warning")
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert "{{ $labels.instance }}" in annotations["summary"]
    assert annotations["runbook_url"] == f"config/prometheus/README.md#{alert['alert'].lower()}"


def test_the_runbook_has_exactly_one_section_per_alert():
    sections = re.findall(r"^## (\w+)\n\n((?:.+\n)+)", RUNBOOK, re.MULTILINE)
    assert [name for name, _ in sections] == [alert["alert"] for alert in ALERTS]
    for name, text in sections:
        assert re.findall(r"^- \*(.+):\*", text, re.MULTILINE) == ["Means", "Look at", "Helps"], (
            name
        )


def test_the_metrics_page_lists_the_alerts_by_severity():
    text = (DIRECTORY.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Alerts\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    now, today = section.split("- Today", 1)
    for severity, part in (("critical", now), ("warning", today)):
        wanted = {one["alert"] for one in ALERTS if one["labels"]["severity"] == severity}
        assert {*re.findall(r"`(Pullcache\w+)`", part)} == wanted


def test_every_alert_fires_in_a_promtool_test():
    expected = [
        sample["labels"]
        for test in read("pullcache.test.yml")["tests"]
        for check in test.get("promql_expr_test", ())
        for sample in check.get("exp_samples", ())
    ]
    fired = {name for labels in expected for name in re.findall(r'alertname="(\w+)"', labels)}
    assert fired == {alert["alert"] for alert in ALERTS}


def test_the_example_configuration_has_the_job_that_the_rules_use():
    example = read("prometheus.yml")
    assert example["rule_files"] == ["pullcache.rules.yml"]
    (job,) = example["scrape_configs"]
    assert set(re.findall(r'job="(\w+)"', str(RULES))) == {job["job_name"]}
