"""Plots of the figures, one per part, made from its rows in JSON."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.report import with_names
from tests.bench.testbed import CACHE, MIRROR, NGINX, OTHER, PULLCACHE, UPSTREAM

mpl.use("Agg")

_Row = dict[str, Any]

_NAMES = {
    NGINX: "nginx, static files",
    CACHE: "nginx, proxy_cache",
    MIRROR: "docker-registry, proxy",
    UPSTREAM: "upstream itself",
    OTHER: "other checkout",
}
_COLOURS = dict(zip(_NAMES, ("#0072b2", "#e69f00", "#009e73", "#8c8c8c", "#cc79a7"), strict=True))
_OURS, _LINE, _GOAL = "#d55e00", "#444444", "#b00020"
_DPI = 90


def draw(part: str, rows: Sequence[_Row], file: Path) -> bool:
    """Write the plot of a part; return whether it has one for these rows."""
    figure = _DRAWERS[part](rows) if rows and part in _DRAWERS else None
    if figure is None:
        return False
    figure.savefig(file, dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return True


def _hits(rows: Sequence[_Row]) -> Figure:
    speeds = {work: row for work, what, row in with_names(rows) if not what}
    spent = {work: row for work, what, row in with_names(rows) if what == "server's CPU"}
    return _compare([*speeds], {"throughput": speeds, "CPU time of the server": spent})


def _misses(rows: Sequence[_Row]) -> Figure:
    compared = {
        f"{work}: {what or row['unit']}": row
        for work, what, row in with_names(rows)
        if row["ratio"]
    }
    return _compare([*compared], {"": compared})


def _compare(labels: Sequence[str], panels: dict[str, dict[str, _Row]]) -> Figure:
    """Plot, in a line for each label, how many times better pullcache is than each peer."""
    width, height = 6 + 4 * (len(panels) - 1), 1 + 0.23 * len(labels)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(width, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for name, long_name in _NAMES.items():
            points = [
                (ratio if row["better"] == "more" else 1 / ratio, position)
                for position, label in enumerate(labels)
                if (row := rows.get(label)) and (ratio := row["ratio"].get(name))
            ]
            if points:
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, color=_COLOURS[name], s=26, label=long_name)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.axvline(1, color=_LINE, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("times better than the peer (right of 1: pullcache is better)", fontsize=8)
        _tidy(axis)
        axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _growth(rows: Sequence[_Row]) -> Figure | None:
    titles = {
        "start to first hit": "start to the first hit, s",
        "idle memory": "idle memory, MiB",
        "one eviction": "one eviction, ms of blocked loop",
        "images": "pullcache images, s",
    }
    series: dict[str, list[tuple[int, _Row]]] = {}
    for row in rows:
        if match := re.fullmatch(r"([\d,]+) blobs: (.*)", row["work"]):
            series.setdefault(match[2], []).append((int(match[1].replace(",", "")), row))
    shown = [name for name in titles if name in series]
    if not shown:
        return None
    figure, axes = plt.subplots(1, len(shown), figsize=(3 * len(shown), 2.8), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        blobs = [number for number, _ in series[name]]
        values = [row["median"][PULLCACHE] for _, row in series[name]]
        axis.plot(blobs, values, "o-", color=_OURS)
        axis.set_xscale("log")
        goals = [row["goal"]["bound"] for _, row in series[name] if "goal" in row]
        if goals:
            axis.axhline(goals[0], color=_GOAL, linestyle="--", linewidth=1)
            axis.annotate("goal", (blobs[0], goals[0]), color=_GOAL, fontsize=8, va="bottom")
        axis.set_ylim(0, 1.15 * max(values + goals))
        axis.set_title(titles[name], fontsize=10)
        axis.set_xlabel("blobs in the store", fontsize=8)
        _tidy(axis)
    figure.tight_layout()
    return figure


def _fleet(rows: Sequence[_Row]) -> Figure:
    """Plot the byte hit ratio of each policy, the best last."""
    first = rows[0]["median"]
    ratios = {
        f"{PULLCACHE}, no prefetch": first[PULLCACHE],
        "Belady (knows the future)": first["Belady"],
    }
    for row in rows:
        if "policy" in row["median"]:
            ratios[row["work"].removeprefix("  against ")] = row["median"]["policy"]
    ordered = sorted(ratios, key=lambda name: ratios[name])
    figure, axis = plt.subplots(figsize=(6.5, 3))
    colours = [_OURS if name.startswith(PULLCACHE) else "#9db8cc" for name in ordered]
    bars = axis.barh(ordered, [ratios[name] for name in ordered], color=colours)
    axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_title("A day of 500 nodes, with a store for a tenth of its content", fontsize=10)
    axis.set_xlabel("share of the bytes that were served from the store", fontsize=8)
    _tidy(axis)
    figure.tight_layout()
    return figure


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


_DRAWERS: dict[str, Callable[[Sequence[_Row]], Figure | None]] = {
    "hits": _hits,
    "misses": _misses,
    "growth": _growth,
    "fleet": _fleet,
}
