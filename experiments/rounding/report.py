"""Tables and figures of the ablation, from its lines of results alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import COLOURS, save
from experiments.refinement.report import DOMAINS, mean_of, ratios, table
from experiments.rounding.ablation import ADDED, STRENGTHS, TOKEN_RECIPES, WITHOUT
from experiments.workers import results

Row = Mapping[str, Any]


def write(folder: Path, target: Path) -> None:
    """Writes ablation.md, ablation.jsonl (the lines without errors), and the figures that there are lines for."""
    rows = list({row["job"]: row for row in results(folder) if "error" not in row}.values())
    target.mkdir(parents=True, exist_ok=True)
    (target / "ablation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    by_label = {part: {row["label"]: row for row in rows if row["part"] == part} for part in ("steps", "tokens")}
    strengths = [point for row in rows if row["part"] == "strength" for point in row["points"]]
    apart = {row["label"]: row for row in rows if row["part"] == "sequential"}
    sections = [steps(by_label["steps"]), tokens(by_label["tokens"]), strength(strengths), sequential(apart)]
    (target / "ablation.md").write_text("\n".join(section for section in sections if section), encoding="utf-8")
    if by_label["steps"]:
        save(lambda: draw_steps(by_label["steps"]), target, "steps")
    if by_label["tokens"]:
        save(lambda: draw_tokens(by_label["tokens"]), target, "tokens")
    if strengths:
        save(lambda: draw_strength(strengths), target, "strength")


def outside_of(texts: Mapping[str, Any]) -> list[str]:
    """Names of the texts outside of the calibration's domains."""
    return [name for name in texts if name not in (*DOMAINS, "watch", "trained")]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def steps(rows: Mapping[str, Row]) -> str:
    """One step after the other, then all but one."""
    lines = [(label, rows[label]) for label in (*ADDED, *WITHOUT) if label in rows]
    if not lines:
        return ""
    seconds = table(["", "seconds"], [[label, f"{row['seconds']:.0f}"] for label, row in lines])
    return "\n".join([f"## Steps, {lines[0][1]['tokens']:,} tokens\n", ratios(lines), seconds])


def tokens(rows: Mapping[str, Row]) -> str:
    """Recipes against the number of calibration tokens."""
    lines = [(f"`{row['recipe']}`, {row['tokens']:,} tokens", row) for row in by_recipe(rows)]
    return "\n".join(["## Calibration tokens\n", ratios(lines)]) if lines else ""


def by_recipe(rows: Mapping[str, Row]) -> list[Row]:
    """Lines in the order of the recipes, then of the tokens."""
    return sorted(rows.values(), key=lambda row: (TOKEN_RECIPES.index(row["recipe"]), row["tokens"]))


def strength(points: Sequence[Row]) -> str:
    """Watched and other divergences by the two strengths, and the best by watch."""
    if not points:
        return ""
    place = {(point["gamma_in"], point["gamma_out"]): point["texts"] for point in points}
    measures = {"watch": lambda texts: texts["watch"]["ratio"], "mean of the domains": mean_of}
    if outside := outside_of(points[0]["texts"]):
        measures |= {name: lambda texts, name=name: texts[name]["ratio"] for name in outside}
    parts = ["## Strengths, without the sequential pass\n"]
    for name, measure in measures.items():
        head = [f"{name}: gamma_in, gamma_out", *(f"{g:g}" for g in STRENGTHS)]
        cell = lambda a, g, measure=measure: f"{measure(place[a, g]):.3f}" if (a, g) in place else ""  # noqa: E731
        parts.append(table(head, [[f"{a:g}", *(cell(a, g) for g in STRENGTHS)] for a in STRENGTHS]))
        (a, g), texts = min(place.items(), key=lambda item, measure=measure: measure(item[1]))
        parts.append(f"Best: gamma_in {a:g}, gamma_out {g:g} ({measure(texts):.3f}).\n")
    return "\n".join(parts)


def sequential(rows: Mapping[str, Row]) -> str:
    """One strength at a time in the whole recipe."""
    lines = list(rows.items())
    return "\n".join(["## Strengths in the whole recipe, one at a time\n", ratios(lines)]) if lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw_steps(rows: Mapping[str, Row]) -> Figure:
    """A bar a step: the mean of the domains, and a mark for each text outside of them."""
    labels = [label for label in (*ADDED, *WITHOUT) if label in rows][::-1]
    figure = Figure(figsize=(7.2, 0.28 * len(labels) + 1.0))
    axes = figure.subplots()
    values = [mean_of(rows[label]["texts"]) for label in labels]
    axes.barh(labels, values, color=[COLOURS[0] if label in ADDED else COLOURS[5] for label in labels], height=0.6)
    for name, colour in zip(["watch", *outside_of(rows[labels[0]]["texts"])], COLOURS[1:]):
        axes.plot([rows[label]["texts"][name]["ratio"] for label in labels], labels, "o", color=colour, label=name)
    for label, value in zip(labels, values):
        axes.annotate(f"{value:.3f}", (0, label), xytext=(4, 0), textcoords="offset points", color="white", va="center")
    figure.legend(loc="outside lower right", ncols=4, frameon=False)
    axes.set(title="One step after the other; all but one", xlabel="KL over plain rounding's, mean of the domains")
    return figure


def draw_tokens(rows: Mapping[str, Row]) -> Figure:
    """A line a recipe against calibration tokens, one panel in the calibration's domains and one outside."""
    ordered = by_recipe(rows)
    outside = outside_of(ordered[0]["texts"])
    panels = {"mean of the domains": mean_of} | {n: lambda texts, n=n: texts[n]["ratio"] for n in outside}
    figure = Figure(figsize=(4.2 * len(panels) + 1, 3.6))
    for axes, (name, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for recipe, colour in zip(TOKEN_RECIPES, COLOURS):
            line = [row for row in ordered if row["recipe"] == recipe]
            axes.plot(
                [r["tokens"] for r in line], [measure(r["texts"]) for r in line], "o-", color=colour, label=recipe
            )
        axes.set_xscale("log")
        axes.legend(frameon=False)
        axes.set(title=name, xlabel="calibration tokens", ylabel="KL over plain rounding's")
    return figure


def draw_strength(points: Sequence[Row]) -> Figure:
    """A line a gamma_out against gamma_in; one panel for the watched text, the domains, and each text outside."""
    panels = {"watch": lambda texts: texts["watch"]["ratio"], "mean of the domains": mean_of}
    panels |= {n: lambda texts, n=n: texts[n]["ratio"] for n in outside_of(points[0]["texts"])}
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 3.6))
    for axes, (name, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for g, colour in zip(STRENGTHS, COLOURS):
            line = sorted((p["gamma_in"], measure(p["texts"])) for p in points if p["gamma_out"] == g)
            axes.plot(*zip(*line) if line else ([], []), "o-", color=colour, label=f"gamma_out {g:g}")
        axes.legend(frameon=False)
        axes.set(title=name, xlabel="gamma_in", ylabel="KL over plain rounding's")
    return figure
