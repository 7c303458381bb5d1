"""Figures of a comparison, as matplotlib draws them: for a file, and for a page whose colours follow its reader's."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sqjax.run import InputError, atomic_path

MIB = 1 << 20
# Each colour occurs nowhere else, so that a page can put a variable of its own in its place.
INK, MUTED, RULE, PURE, OTHER, PLAIN = "#1c2127", "#667079", "#dde2e7", "#0a62c2", "#b5520a", "#4d5760"
COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", PURE: "pure", OTHER: "other", PLAIN: "plain"}
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "sqjax",
    "figure.constrained_layout.use": True,
}
_LINE_HEIGHT = 12.0  # points between labels


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


def _distinct(names: list[str]) -> list[str]:
    """Names without the parts, between dots, that all of them begin with."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def loss_against_size(result: Mapping[str, Any]) -> Figure:
    """One point a file: cross-entropy and KL divergence over all suites against MiB."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 4.6))
        left, right = figure.subplots(1, 2)
        files, reference = everyone(result), result["reference_facts"]
        sizes = [file["file_bytes"] / MIB for file in files.values()]
        colours = [colour_of(name, result) for name in files]
        names = _distinct([short(name) for name in files])
        losses = [file["cross_entropy"] for file in files.values()]
        left.axhline(reference["cross_entropy"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        left.scatter(sizes, losses, c=colours, s=34, zorder=3)
        kinds = "/".join(kind for kind in reference["types"] if kind != "F32") or "F32"
        dashed = f"dashed: {reference['name']}, {kinds}, {reference['file_bytes'] / MIB:,.1f} MiB"
        left.set(title=f"Loss against size ({dashed})", xlabel="file, MiB", ylabel="cross-entropy, nats per token")
        shown = [
            (n, s, file["kl"], file["kl_interval"], c) for n, s, file, c in zip(names, sizes, files.values(), colours)
        ]
        shown = [point for point in shown if point[2] > 0]
        right.set(title="KL divergence from the reference against size", xlabel="file, MiB", ylabel="nats per token")
        if shown:
            right.set_yscale("log")
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
            _label(axes, points)
        return figure


def _label(axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes names in a column on the right, in the order of their points, with a line to each."""
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    heights = [float(axes.transData.transform((x, y))[1] - box.y0) * scale for _, x, y, _ in points]
    order = sorted(range(len(points)), key=lambda index: (-heights[index], -points[index][1]))
    top, placed = box.height * scale + _LINE_HEIGHT / 2, {}
    for index in order:
        top = placed[index] = min(heights[index], top - _LINE_HEIGHT)
    # What was pushed below the axes goes up again, and pushes in turn.
    bottom = 0.0
    for index in reversed(order):
        placed[index] = max(placed[index], bottom)
        bottom = placed[index] + _LINE_HEIGHT
    for index, (name, x, y, colour) in enumerate(points):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, placed[index] / (box.height * scale)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "alpha": 0.7},
        )


def histograms(result: Mapping[str, Any]) -> Figure:
    """Share of tokens by the logarithm of their KL divergence, for each file, over that of plain rounding."""
    with matplotlib.rc_context(_STYLE):
        edges = np.asarray(result["histogram_edges"])
        centres = np.sqrt(edges[1:] * edges[:-1])
        files = {name: file for name, file in everyone(result).items() if file["kl"] > 0}
        columns = min(4, max(1, len(files)))
        rows = -(-max(1, len(files)) // columns)
        figure = Figure(figsize=(11.5, 0.6 + 1.75 * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        plain = _shares(result["baseline"])
        for axes, (name, file) in zip(grid, files.items()):
            axes.fill_between(
                centres, _shares(file), step="mid", color=colour_of(name, result), alpha=0.55, linewidth=0
            )
            axes.step(centres, plain, where="mid", color=PLAIN, linewidth=1)
            axes.axvline(file["kl"], color=INK, linewidth=1, linestyle=(0, (3, 2)))
            axes.set_title(short(name), fontsize=8.5)
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


def contributions(result: Mapping[str, Any]) -> Figure | None:
    """What each group of tensors contributes alone; a map of layers by matrices where every tensor was measured."""
    files = {name: file for name, file in everyone(result).items() if file.get("groups")}
    if not files:
        return None
    first = next(iter(files.values()))["groups"]
    with matplotlib.rc_context(_STYLE):
        return _map(files) if first[0]["group"].endswith(".weight") else _bars(files, result)


def _bars(files: Mapping[str, Any], result: Mapping[str, Any]) -> Figure:
    groups = list(dict.fromkeys(group["group"] for file in files.values() for group in file["groups"]))
    columns = min(4, len(files))
    rows = -(-len(files) // columns)
    figure = Figure(figsize=(11.5, rows * (0.8 + 0.24 * len(groups))))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, file) in zip(grid, files.items()):
        found = {group["group"]: group for group in file["groups"]}
        rows_y = [groups.index(group) for group in found]
        axes.barh(rows_y, [group["kl"] for group in found.values()], color=colour_of(name, result), height=0.62)
        for y, group in zip(rows_y, found.values()):
            axes.plot(group["kl_interval"], [y, y], color=INK, linewidth=1)
        axes.set_yticks(range(len(groups)), groups)
        axes.grid(visible=False, axis="y")
        axes.set_title(short(name), fontsize=8.5)
    grid[0].invert_yaxis()
    for axes in grid[len(files) :]:
        axes.set_visible(False)
    figure.supxlabel("KL divergence with this group alone quantized, nats per token", fontsize=9)
    return figure


def _map(files: Mapping[str, Any]) -> Figure:
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
    for axes, (name, found) in zip(grid, cells.items()):
        values = np.full((len(attributes), layers), np.nan)
        for tensor, kl in found.items():
            _, layer, attribute, *_ = tensor.split(".")
            values[attributes.index(attribute), int(layer)] = kl
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
        axes.set_yticks(range(len(attributes)), attributes, fontsize=7)
        axes.set_title(short(name), fontsize=8.5)
        axes.grid(visible=False)
    for axes in grid[len(cells) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="KL with this tensor alone quantized", shrink=0.8)
    figure.supxlabel("layer", fontsize=9)
    return figure


def curves(runs: Sequence[str | Path]) -> Figure | None:
    """KL divergence over the updates of refinements: on the batches, and on the watched text.

    Raises:
      InputError: a folder holds no metrics.
    """
    if not runs:
        return None
    with matplotlib.rc_context(_STYLE):
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
        axes.set_yscale("log")
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


def spectra(eigenvalues: Mapping[str, np.ndarray]) -> Figure:
    """Eigenvalues of the input and output Grams, each over their sum, later layers darker."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 3.8))
        layers = 1 + max(int(name.split(".")[1]) for name in eigenvalues)
        for axes, kind, colour in zip(figure.subplots(1, 2, sharey=True), ("input", "output"), (PURE, OTHER)):
            for name, values in eigenvalues.items():
                if name.startswith(f"{kind}/"):
                    share = np.maximum(values, 1e-12 * values[0]) / values.sum()
                    depth = (int(name.split(".")[1]) + 1) / layers
                    axes.loglog(
                        np.arange(1, len(share) + 1), share, color=colour, alpha=0.15 + 0.6 * depth, linewidth=0.9
                    )
            axes.set(
                title=f"{kind.capitalize()} Grams", xlabel="eigenvalue, from the largest", ylabel="share of the trace"
            )
        return figure


def effective_rank(values: np.ndarray) -> float:
    """Returns (sum of eigenvalues)^2 / sum of their squares: how many directions of equal weight would do."""
    return float(values.sum() ** 2 / math.fsum(values**2))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def draw(figure: Figure) -> tuple[bytes, str]:
    """Returns a figure as PNG, on white, and as SVG without a ground."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": "sqjax"})
        # The layout is found; finding it again takes longer than drawing.
        figure.set_layout_engine("none")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def save(drawn: tuple[bytes, str], path: Path) -> None:
    """Writes a drawn figure as `path` with .png and .svg, both on white."""
    png, svg = drawn
    svg = re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
    for ending, content in ((".png", png), (".svg", svg.encode())):
        with atomic_path(path.with_name(path.name + ending)) as temporary:
            temporary.write_bytes(content)


def inline(svg: str, name: str) -> str:
    """Returns SVG to stand in a page: colours are the page's variables, ids begin with `name`."""
    svg = re.sub(r"^.*?(?=<svg)", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    # The figure's caption and the tables say what it shows.
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
