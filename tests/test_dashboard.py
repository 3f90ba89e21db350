"""The Grafana dashboard, checked without Grafana; `tests/system` runs its queries."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.promql import labels_by_metric, unknown_names

FILE = Path(__file__).parents[1] / "config" / "grafana" / "pullcache.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
RULES = FILE.parents[1] / "prometheus" / "pullcache.rules.yml"
LABELS = labels_by_metric()
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = dict[str, Any]


def queries() -> list[tuple[str, str]]:
    """Return the title of the panel and the query, for each query of the dashboard."""
    return [
        (panel["title"], target["expr"]) for panel in PANELS for target in panel.get("targets", ())
    ]


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_every_panel_uses_existing_metrics_and_labels():
    known = labels_by_metric()
    assert queries()
    unknown = {(title, query): unknown_names(query, known) for title, query in queries()}
    assert {query: names for query, names in unknown.items() if names} == {}


def test_every_metric_is_on_the_dashboard():
    shown = " ".join(query for _, query in queries())
    names = {name for name in labels_by_metric() if name.startswith("pullcache_")}
    missing = {
        name for name in names if not name.endswith(("_sum", "_count")) and name not in shown
    }
    # Of reloads the dashboard shows whether the last one succeeded.
    assert missing == {
        "pullcache_config_reloads_total",
        "pullcache_config_last_reload_success_timestamp_seconds",
    }


def test_the_dashboard_works_with_any_prometheus_datasource():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert [*variables] == ["datasource", "job", "instance", "upstream"]
    assert "id" not in DASHBOARD
    used = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    used += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    assert [source for source in used if source != SOURCE] == []


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_has_a_unit_and_filters_by_what_the_variables_select(panel: Panel):
    if panel["type"] == "row":
        return
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert 'job=~"$job"' in target["expr"]
        assert 'instance=~"$instance"' in target["expr"]
        for name in re.findall(r"pullcache_\w+", target["expr"]):
            if "upstream" in LABELS.get(name, ()):
                assert 'upstream=~"$upstream"' in target["expr"]


def test_the_dashboard_uses_every_recording_rule():
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    recorded = [rule["record"] for group in rules for rule in group["rules"] if "record" in rule]
    shown = " ".join(query for _, query in queries())
    assert recorded
    assert [name for name in recorded if name not in shown] == []


def test_the_dashboard_shows_the_alerts_that_fire():
    assert any(query.startswith('ALERTS{alertstate="firing"') for _, query in queries())


def test_no_two_panels_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    positions = [panel["gridPos"] for panel in PANELS]
    assert max(position["x"] + position["w"] for position in positions) == 24
    assert [pair for pair in combinations(positions, 2) if overlap(*pair)] == []
