"""What a study found: settings ranked, over seeds, the Pareto front, and figures."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqjax.run import atomic_path

Record = Mapping[str, Any]
_MOST_LINES = 8


def ranking(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Joins trials that differ in their seed alone, and orders settings by the mean of their objectives.

    Each has `settings`, `values` and `ratio` (means over seeds; KL divergence over that of plain rounding), `spread`
    (half the range of the values over seeds), `seeds`, `trials` and `on_front`: whether no other setting is better in
    all objectives.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["state"] == "complete":
            settings = {key: value for key, value in record["settings"].items() if key != "seed"}
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(record)
    rows = []
    for text, members in groups.items():
        values = np.asarray([record["values"] for record in members], np.float64)
        names = members[0].get("ratio", {})
        rows.append(
            {
                "settings": json.loads(text),
                "values": values.mean(axis=0).tolist(),
                "spread": (np.ptp(values, axis=0) / 2).tolist(),
                "ratio": {name: float(np.mean([record["ratio"][name] for record in members])) for name in names},
                "seeds": [record["settings"].get("seed") for record in members],
                "trials": [record["trial"] for record in members],
            }
        )
    # Settings that were not tried with all seeds come last: one lucky seed is no finding.
    most = max((len(row["trials"]) for row in rows), default=0)
    rows.sort(key=lambda row: (len(row["trials"]) < most, float(np.mean(row["values"]))))
    for row in rows:
        others = [other["values"] for other in rows if len(other["trials"]) == most]
        row["on_front"] = len(row["trials"]) == most and not any(_dominates(other, row["values"]) for other in others)
    return rows


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    pairs = list(zip(first, second))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes one line of JSON a trial."""
    with atomic_path(path) as temporary:
        lines = (json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(records: Sequence[Record], sides: Mapping[str, Sequence[str]], folder: Path) -> list[Path]:
    """Draws KL divergence against what was searched, for each text, and inside against outside; PNG and SVG of each.

    Args:
      records: of a study.
      sides: texts `inside` and `outside`.
      folder: for the files.

    Returns:
      The files; none where no trial is complete.
    """
    rows = ranking(records)
    if not rows:
        return []
    # Drawn to files alone: no display is asked for.
    from matplotlib.figure import Figure

    files = []
    if axes := _axes_of(rows):
        figure = Figure(figsize=(3.2 * min(3, len(rows[0]["ratio"])), 2.9 * -(-len(rows[0]["ratio"]) // 3)))
        _draw_strength(figure, [r for r in records if r["state"] == "complete"], rows, axes)
        files += _save(figure, folder / "strength")
    if sides["inside"] and sides["outside"]:
        figure = Figure(figsize=(5.2, 4.2))
        _draw_front(figure, rows, sides)
        files += _save(figure, folder / "pareto")
    return files


def _save(figure, stem: Path) -> list[Path]:
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        with atomic_path(file) as path:
            figure.savefig(path, format=file.suffix[1:], dpi=150, bbox_inches="tight")
    return files


def _axes_of(rows: Sequence[Record]) -> list[str]:
    """The searched numbers with more than one value, at most two; shaping strengths first."""
    values: dict[str, set] = {}
    for row in rows:
        for name, value in row["settings"].items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    names = [name for name, found in values.items() if len(found) > 1]
    return sorted(names, key=lambda name: "gamma" not in name)[:2]


def _draw_strength(figure, records: Sequence[Record], rows: Sequence[Record], axes: Sequence[str]) -> None:
    texts = list(rows[0]["ratio"])
    columns = min(3, len(texts))
    plots = figure.subplots(-(-len(texts) // columns), columns, squeeze=False, sharex=True)
    lines = sorted({row["settings"].get(axes[1]) for row in rows}) if len(axes) > 1 else [None]
    for plot, text in zip(plots.flat, texts):
        for index, line in enumerate(lines if len(lines) <= _MOST_LINES else [None]):
            chosen = [r for r in records if line is None or r["settings"].get(axes[1]) == line]
            points: dict[float, list[float]] = {}
            for record in chosen:
                points.setdefault(record["settings"][axes[0]], []).append(record["ratio"][text])
            x = sorted(points)
            label = None if line is None else f"{axes[1].split('.')[-1]} {line:g}"
            # Of searches other than grids a point may have many neighbours: the best one is the envelope.
            y = [float(np.mean(points[value])) if len(lines) <= _MOST_LINES else min(points[value]) for value in x]
            plot.plot(x, y, marker="o", markersize=3, linewidth=1.2, color=f"C{index}", label=label)
            plot.fill_between(
                x, [min(points[v]) for v in x], [max(points[v]) for v in x], color=f"C{index}", alpha=0.15
            )
        plot.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
        plot.set_title(text, fontsize=9)
        plot.set_xlabel(axes[0], fontsize=8)
        plot.tick_params(labelsize=7)
    for plot in plots.flat[len(texts) :]:
        plot.set_visible(False)
    plots[0][0].set_ylabel("KL / KL of plain rounding", fontsize=8)
    if len(axes) > 1 and len(lines) <= _MOST_LINES:
        plots[0][0].legend(fontsize=6)


def _draw_front(figure, rows: Sequence[Record], sides: Mapping[str, Sequence[str]]) -> None:
    plot = figure.subplots()
    mean = lambda row, side: float(np.mean([row["ratio"][name] for name in sides[side]]))  # noqa: E731
    points = [(mean(row, "inside"), mean(row, "outside"), row) for row in rows]
    best = sorted(p for p in ((x, y) for x, y, _ in points) if not any(_dominates(q[:2], p) for q in points))
    plot.scatter([x for x, _, _ in points], [y for _, y, _ in points], s=14, color="0.6", label="tried")
    plot.plot(*zip(*best), marker="o", markersize=5, color="C3", linewidth=1.2, label="Pareto front")
    for x, y, row in points:
        if (x, y) in best:
            label = ", ".join(f"{value:g}" for value in row["settings"].values() if isinstance(value, int | float))
            plot.annotate(label, (x, y), fontsize=6, xytext=(4, 4), textcoords="offset points")
    plot.scatter([1.0], [1.0], marker="x", color="black", label="plain rounding")
    plot.set_xlabel(f"inside ({', '.join(sides['inside'])}): KL / KL of plain rounding", fontsize=8)
    plot.set_ylabel(f"outside ({', '.join(sides['outside'])})", fontsize=8)
    plot.tick_params(labelsize=7)
    plot.legend(fontsize=7)
