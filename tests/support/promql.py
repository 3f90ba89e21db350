"""Checks that the metrics and labels in a PromQL query exist in the program."""

import re
from collections import defaultdict
from typing import get_args

from prometheus_client.parser import text_string_to_metric_families

from proxy import metrics as ours
from proxy.metrics import Metrics
from proxy.traffic import PullResult, Purpose
from tests.test_metrics import set_all_metrics

# Labels that Prometheus itself adds.
ADDED = {"job", "instance", "le"}
BOUNDED = {
    "kind": {*get_args(ours.RequestKind), "token"},
    "cache": {*get_args(ours.CacheState)},
    "reason": {*get_args(ours.EvictionReason), *get_args(ours.UncachedReason)},
    "purpose": {*get_args(Purpose)},
    "result": {
        *get_args(ours.DownloadResult),
        *get_args(PullResult),
        *get_args(ours.NotificationResult),
        "complete",
        "success",
        "failure",
    },
}
_SELECTOR = re.compile(r"\b((?:pullcache|process|python)_\w+|up)\b(?:\{([^}]*)\})?")
_RECORDED = re.compile(r"\b(\w+):\w+:\w+")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def labels_by_metric() -> dict[str, set[str]]:
    """Return the labels of each metric of the program."""
    metrics = Metrics(["docker.io"], "1.0")
    set_all_metrics(metrics)
    found: dict[str, set[str]] = defaultdict(set, up=set())
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return found


def unknown_names(query: str, known: dict[str, set[str]]) -> list[str]:
    """Return the metrics, labels and label values in the query that do not exist."""
    unknown = []
    grouped = {label.strip() for one in _GROUPING.findall(query) for label in one.split(",")}
    plain = _GROUPING.sub("", query)
    # The labels of a recording rule are in its name.
    grouped -= {label for labels in _RECORDED.findall(plain) for label in labels.split("_")}
    for name, matchers in _SELECTOR.findall(_RECORDED.sub("", plain)):
        if name not in known:
            unknown.append(name)
            continue
        grouped -= known[name]
        for label, value in _MATCHER.findall(matchers):
            if label not in known[name] | ADDED:
                unknown.append(f"{name}{{{label}}}")
            # Other labels have no fixed set of values: variables of the dashboard, statuses.
            elif label in BOUNDED and not set(value.split("|")) <= BOUNDED[label]:
                unknown.append(f"{name}{{{label}={value}}}")
    return unknown + [f"by {label}" for label in grouped - ADDED]
