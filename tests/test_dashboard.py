"""The dashboard for Grafana, as far as it can be judged without one; `tests/system` asks its queries."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.support.promql import labels_by_metric, mistakes

FILE = Path(__file__).parents[1] / "config" / "grafana" / "pullcache.json"
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Panel = dict[str, Any]


def queries() -> list[tuple[str, str]]:
    """Return each query of the dashboard after the title of its panel."""
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


def test_every_panel_asks_for_metrics_and_labels_that_there_are():
    known = labels_by_metric()
    assert queries()
    wrong = {(title, query): mistakes(query, known) for title, query in queries()}
    assert {place: what for place, what in wrong.items() if what} == {}


def test_every_metric_of_the_program_is_on_the_dashboard():
    shown = " ".join(query for _, query in queries())
    names = {name for name in labels_by_metric() if name.startswith("pullcache_")}
    missing = {
        name for name in names if not name.endswith(("_sum", "_count")) and name not in shown
    }
    # Reloads are told by how the last one went.
    assert missing == {
        "pullcache_config_reloads_total",
        "pullcache_config_last_reload_success_timestamp_seconds",
    }


def test_it_can_be_imported_wherever_there_is_a_prometheus():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "id" not in DASHBOARD
    used = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    used += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    assert [source for source in used if source != SOURCE] == []


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_shows_the_chosen_instances_in_a_unit(panel: Panel):
    if panel["type"] == "row":
        return
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert 'instance=~"$instance"' in target["expr"]


def test_no_two_panels_lie_upon_each_other():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert max(place["x"] + place["w"] for place in places) == 24
    assert [pair for pair in combinations(places, 2) if overlap(*pair)] == []
