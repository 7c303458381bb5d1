"""Figures of a study: KL divergence against what was searched, on each text, and inside against outside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sqjax.drawing import INK, LINES, MUTED, PURE, label_points, styled
from sqjax.study_results import Record, dominates, short_names, shown

_MEANINGS = {
    "gamma_in": "gamma_in, shaping strength of input Grams",
    "gamma_out": "gamma_out, shaping strength of output Grams",
}
_MARKERS = "osD^vP"
_COLUMNS = 3
_MOST_LABELS = 12
# A range whose ends are farther apart is shown by its logarithm.
_WIDE = 30


def numbers_searched(rows: Sequence[Record]) -> list[str]:
    """Returns the searched numbers with more than one value; shaping strengths first, the input's before all others."""
    values: dict[str, set] = {}
    for row in rows:
        for name, value in row["settings"].items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    names = [name for name, found in values.items() if len(found) > 1]
    return sorted(names, key=lambda name: ("gamma" not in name, "gamma_in" not in name))


@styled
def strength(records: Sequence[Record], rows: Sequence[Record], sides: Mapping[str, Sequence[str]]) -> Figure | None:
    """KL over that of plain rounding on each text against one searched number, a line for each value of another.

    Points are means over seeds, and what else was searched; a band is their range. With more values than colours there
    is one line, the best of them all.

    Args:
      records: of all trials.
      rows: what `study_results.ranking` made of them, the winner first.
      sides: names of the texts `inside` and `outside`.
    """
    searched = numbers_searched(rows)
    if not searched:
        return None
    complete, winner, texts = [r for r in records if r["state"] == "complete"], rows[0], list(rows[0]["ratio"])
    name, other = searched[0], searched[1] if len(searched) > 1 else None
    values = sorted({record["settings"][other] for record in complete}) if other else [None]
    is_split = len(values) <= len(LINES)
    columns = min(_COLUMNS, len(texts))
    figure = Figure(figsize=(11.5, 0.6 + 3.0 * -(-len(texts) // columns)))
    grid = figure.subplots(-(-len(texts) // columns), columns, squeeze=False, sharex=True).ravel()
    for axes, text in zip(grid, texts):
        for number, value in enumerate(values if is_split else [None]):
            chosen = [r for r in complete if value is None or r["settings"][other] == value]
            label = None if value is None else f"{other.split('.')[-1]} {value:g}"
            _line(axes, chosen, name, text, number, label, np.mean if is_split else np.min)
        axes.plot(winner["settings"][name], winner["ratio"][text], "o", markersize=11, color=INK, fillstyle="none")
        side = next((side for side, names in sides.items() if text in names), "for pruning alone")
        axes.set_title(f"{text} ({side})")
        axes.tick_params(labelbottom=True)
        found = [record["settings"][name] for record in complete]
        if min(found) > 0 and max(found) / min(found) > _WIDE:
            axes.set_xscale("log")
    for axes in grid[len(texts) :]:
        axes.set_visible(False)
    if is_split and other:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(values), frameon=False)
    figure.supxlabel(f"{_MEANINGS.get(name.split('.')[-1], name)} (ring: the winner)", fontsize=9)
    figure.supylabel("KL over plain rounding's", fontsize=9)
    return figure


def _line(
    axes: Axes, records: Sequence[Record], name: str, text: str, number: int, label: str | None, of_many: Any
) -> None:
    points: dict[float, list[float]] = {}
    for record in records:
        points.setdefault(record["settings"][name], []).append(record["ratio"][text])
    x = sorted(points)
    look = {"color": LINES[number], "marker": _MARKERS[number], "markersize": 4, "linewidth": 1.3}
    axes.plot(x, [float(of_many(points[value])) for value in x], label=label, **look)
    axes.fill_between(
        x, [min(points[v]) for v in x], [max(points[v]) for v in x], color=LINES[number], alpha=0.13, linewidth=0
    )


@styled
def front(rows: Sequence[Record], sides: Mapping[str, Sequence[str]]) -> Figure | None:
    """Mean KL over that of plain rounding inside against outside: a point for each setting, and the Pareto front.

    Settings that were not tried with all seeds are shown and are not on the front.

    Args:
      rows: what `study_results.ranking` returned, the winner first.
      sides: names of the texts `inside` and `outside`.
    """
    if not sides["inside"] or not sides["outside"]:
        return None
    places = [tuple(float(np.mean([row["ratio"][name] for name in sides[side]])) for side in sides) for row in rows]
    most = max(len(row["trials"]) for row in rows)
    whole = [place for place, row in zip(places, rows) if len(row["trials"]) == most]
    best = [
        number
        for number, (place, row) in enumerate(zip(places, rows))
        if len(row["trials"]) == most and not any(dominates(one, place) for one in whole)
    ]
    best.sort(key=lambda number: places[number])
    names = short_names(rows)
    figure = Figure(figsize=(8.4, 4.8))
    axes = figure.subplots()
    axes.scatter(*zip(*places), s=20, color=MUTED, alpha=0.7, linewidths=0, zorder=2)
    axes.plot(*zip(*(places[number] for number in best)), "o-", color=PURE, markersize=6, linewidth=1.3, zorder=3)
    axes.plot(*places[0], "o", markersize=12, color=INK, fillstyle="none", zorder=4)
    axes.set(
        title="Pareto front (ring: the winner)",
        xlabel=f"inside ({', '.join(sides['inside'])}): KL over plain rounding's",
        ylabel=f"outside ({', '.join(sides['outside'])})",
    )
    axes.margins(0.08)
    figure.draw_without_rendering()
    label_points(axes, [(_named(rows[number], names), *places[number], PURE) for number in best[:_MOST_LABELS]])
    return figure


def _named(row: Record, names: Mapping[str, str]) -> str:
    return ", ".join(f"{names[name]} {shown(value)}" for name, value in row["settings"].items())
