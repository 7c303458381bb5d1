"""Figures of a comparison."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sqjax.drawing import INK, MUTED, OTHER, PLAIN, PURE, elided, label_points, plain_log, styled
from sqjax.run import MIB, InputError


def colour_of(name: str, result: Mapping[str, Any]) -> str:
    """Plain rounding, files of its size to a thousandth, and all others have a colour each."""
    plain = result["baseline"]
    if name == plain["name"]:
        return PLAIN
    file = result["files"][name]
    return PURE if abs(file["tensor_bytes"] / plain["tensor_bytes"] - 1) < 1e-3 else OTHER


def everyone(result: Mapping[str, Any]) -> dict[str, Any]:
    """All files, plain rounding among them, smallest divergence first."""
    files = result["files"] | {result["baseline"]["name"]: result["baseline"]}
    return dict(sorted(files.items(), key=lambda item: item[1]["kl"]))


def short(name: str) -> str:
    """A file's name without its ending."""
    return re.sub(r"\.gguf$", "", name)


def _distinct(names: Sequence[str], reference: str) -> list[str]:
    """Names as figures have room for them: without the reference's name, and without what all of them begin with."""
    names = [re.sub(rf"^{re.escape(reference)}[-._]+(?=.)", "", short(name)) for name in names]
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return [elided(".".join(part)) for part in parts]


def _titles(files: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    return _distinct(list(files), result["reference_facts"]["name"])


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@styled
def loss_against_size(result: Mapping[str, Any]) -> Figure:
    """One point a file: cross-entropy and KL divergence over all suites against MiB."""
    figure = Figure(figsize=(11.5, 4.6))
    left, right = figure.subplots(1, 2)
    files, reference = everyone(result), result["reference_facts"]
    sizes = [file["file_bytes"] / MIB for file in files.values()]
    colours = [colour_of(name, result) for name in files]
    names = _titles(files, result)
    losses = [file["cross_entropy"] for file in files.values()]
    left.axhline(reference["cross_entropy"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    left.scatter(sizes, losses, c=colours, s=34, zorder=3)
    kinds = "/".join(kind for kind in reference["types"] if kind != "F32") or "F32"
    dashed = f"Dashed: the reference, {reference['name']}, {kinds}, {reference['file_bytes'] / MIB:,.1f} MiB"
    figure.supxlabel(dashed, x=0.01, ha="left", fontsize=8, color=MUTED)
    left.set(title="Loss against size", xlabel="file, MiB", ylabel="cross-entropy, nats per token")
    shown = [(n, s, file["kl"], file["kl_interval"], c) for n, s, file, c in zip(names, sizes, files.values(), colours)]
    shown = [point for point in shown if point[2] > 0]
    right.set(title="KL divergence from the reference against size", xlabel="file, MiB", ylabel="nats per token")
    if shown:
        plain_log(right.set_yscale, right.yaxis)
        right.scatter([p[1] for p in shown], [p[2] for p in shown], c=[p[4] for p in shown], s=34, zorder=3)
        for _, size, _, interval, colour in shown:
            right.plot([size, size], interval, color=colour, linewidth=1.4, zorder=2)
    for axes, points in (
        (left, list(zip(names, sizes, losses, colours))),
        (right, [(name, size, kl, colour) for name, size, kl, _, colour in shown]),
    ):
        low, high = min(sizes), max(sizes)
        axes.set_xlim(low - 0.06 * (high - low or low), high + 0.06 * (high - low or low))
        axes.margins(y=0.12)
        figure.draw_without_rendering()
        label_points(axes, points)
    return figure


@styled
def histograms(result: Mapping[str, Any]) -> Figure:
    """Share of tokens by the logarithm of their KL divergence, for each file, over that of plain rounding."""
    edges = np.asarray(result["histogram_edges"])
    centres = np.sqrt(edges[1:] * edges[:-1])
    files = {name: file for name, file in everyone(result).items() if file["kl"] > 0}
    columns = min(4, max(1, len(files)))
    rows = -(-max(1, len(files)) // columns)
    figure = Figure(figsize=(11.5, 0.6 + 1.75 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    plain = _shares(result["baseline"])
    for axes, (name, file), title in zip(grid, files.items(), _titles(files, result)):
        axes.fill_between(centres, _shares(file), step="mid", color=colour_of(name, result), alpha=0.55, linewidth=0)
        axes.step(centres, plain, where="mid", color=PLAIN, linewidth=1)
        axes.axvline(file["kl"], color=INK, linewidth=1, linestyle=(0, (3, 2)))
        axes.set_title(title, fontsize=8.5)
        axes.set_xscale("log")
        axes.grid(visible=False, axis="y")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for axes in grid[len(files) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(files) - columns) : len(files)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("KL divergence of a token, nats (dashed: mean; outline: plain rounding)", fontsize=9)
    return figure


def _shares(file: Mapping[str, Any]) -> np.ndarray:
    counts = np.asarray(file["histogram"], float)
    return counts[1:-1] / max(counts.sum(), 1)


@styled
def contributions(result: Mapping[str, Any]) -> Figure | None:
    """What each group of tensors contributes alone; a map of layers by matrices where every tensor was measured."""
    files = {name: file for name, file in everyone(result).items() if file.get("groups")}
    if not files:
        return None
    first = next(iter(files.values()))["groups"]
    return _map(files, result) if first[0]["group"].endswith(".weight") else _bars(files, result)


def _bars(files: Mapping[str, Any], result: Mapping[str, Any]) -> Figure:
    groups = list(dict.fromkeys(group["group"] for file in files.values() for group in file["groups"]))
    columns = min(4, len(files))
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(11.5, rows * (0.8 + 0.24 * len(groups))))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, file), title in zip(grid, files.items(), _titles(files, result)):
        found = {group["group"]: group for group in file["groups"]}
        rows_y = [groups.index(group) for group in found]
        axes.barh(rows_y, [group["kl"] for group in found.values()], color=colour_of(name, result), height=0.62)
        for y, group in zip(rows_y, found.values()):
            axes.plot(group["kl_interval"], [y, y], color=INK, linewidth=1)
        axes.set_yticks(range(len(groups)), groups)
        axes.grid(visible=False, axis="y")
        axes.set_title(title, fontsize=8.5)
    grid[0].invert_yaxis()
    for axes in grid[len(files) :]:
        axes.set_visible(False)
    figure.supxlabel("KL divergence with this group alone quantized, nats per token", fontsize=9)
    return figure


def _map(files: Mapping[str, Any], result: Mapping[str, Any]) -> Figure:
    cells = {
        name: {group["group"]: group["kl"] for group in file["groups"] if group["group"].startswith("blk.")}
        for name, file in files.items()
    }
    attributes = list(dict.fromkeys(tensor.split(".")[2] for found in cells.values() for tensor in found))
    layers = 1 + max(int(tensor.split(".")[1]) for found in cells.values() for tensor in found)
    columns = min(3, len(files))
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(11.5, rows * (1.0 + 0.2 * len(attributes))))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    highest = max(max(found.values()) for found in cells.values())
    for axes, found, title in zip(grid, cells.values(), _titles(files, result)):
        values = np.full((len(attributes), layers), np.nan)
        for tensor, kl in found.items():
            _, layer, attribute, *_ = tensor.split(".")
            values[attributes.index(attribute), int(layer)] = kl
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        axes.set_yticks(range(len(attributes)), attributes, fontsize=7)
        axes.set_title(title, fontsize=8.5)
        axes.grid(visible=False)
    for axes in grid[len(cells) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="KL with this tensor alone quantized", shrink=0.8)
    figure.supxlabel("layer", fontsize=9)
    return figure


@styled
def curves(runs: Sequence[str | Path]) -> Figure | None:
    """KL divergence over the updates of refinements: on the batches, and on the watched text.

    Raises:
      InputError: a folder holds no metrics.
    """
    if not runs:
        return None
    figure = Figure(figsize=(11.5, 3.6))
    axes = figure.subplots()
    for number, run in enumerate(runs):
        records = _metrics(Path(run))
        steps = [(r["step"], r["kl"]) for r in records if r.get("kl")]
        watched = [(r["step"], r["watched_kl"]) for r in records if r.get("watched_kl")]
        colour = (PURE, OTHER, PLAIN)[number % 3]
        axes.plot(*zip(*steps), color=colour, alpha=0.35, linewidth=1)
        if watched:
            axes.plot(*zip(*watched), "o-", color=colour, markersize=4, label=f"{Path(run).name}, watched text")
    plain_log(axes.set_yscale, axes.yaxis)
    axes.set(title="Refinement", xlabel="update", ylabel="KL divergence, nats per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)
    return figure


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl" if run.is_dir() else run
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{run} holds no metrics of a refinement ({error}); give the folder of sqjax refine"
        ) from error
    if not any(record.get("kl") for record in records):
        raise InputError(f"{path} has no finished update yet; wait, or leave it out")
    return records


@styled
def spectra(eigenvalues: Mapping[str, np.ndarray]) -> Figure | None:
    """Eigenvalues of the input and output Grams, each over their sum, later layers darker."""
    if not eigenvalues:
        return None
    figure = Figure(figsize=(11.5, 3.8))
    layers = 1 + max(int(name.split(".")[1]) for name in eigenvalues)
    for axes, kind, colour in zip(figure.subplots(1, 2, sharey=True), ("input", "output"), (PURE, OTHER)):
        for name, values in eigenvalues.items():
            if name.startswith(f"{kind}/"):
                share = np.maximum(values, 1e-12 * values[0]) / values.sum()
                depth = (int(name.split(".")[1]) + 1) / layers
                axes.loglog(np.arange(1, len(share) + 1), share, color=colour, alpha=0.15 + 0.6 * depth, linewidth=0.9)
        axes.set(title=f"{kind.capitalize()} Grams", xlabel="eigenvalue, from the largest", ylabel="share of the trace")
    return figure


def effective_rank(values: np.ndarray) -> float:
    """Returns (sum of eigenvalues)^2 / sum of their squares: how many directions of equal weight would do."""
    return float(values.sum() ** 2 / math.fsum(values**2))
