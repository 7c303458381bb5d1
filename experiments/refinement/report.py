"""Tables and the figure of the experiment, from its lines of results alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.figures import COLOURS, save
from experiments.refinement.parts import CHAT, DEFAULTS, GROUPS
from experiments.workers import results

# What the mean is of; other texts have columns of their own.
DOMAINS = ("c4", "chat", "prose", "docs", "code")
_OWN_TEXTS = ("watch", "trained")

Row = Mapping[str, Any]


def write(folder: Path, target: Path) -> None:
    """Writes tables.md, curve.png, curve.svg and results.jsonl (the lines without errors) into a folder."""
    last = {row["job"]: row for row in results(folder) if "error" not in row}
    rows = list(last.values())
    target.mkdir(parents=True, exist_ok=True)
    (target / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = [curve(rows), seeds(rows, "even"), seeds(rows, "uneven"), ablation(rows), chat(rows), elsewhere(rows)]
    sections += [in_runtime(rows), size(rows), check(rows)]
    (target / "tables.md").write_text("\n".join(section for section in sections if section), encoding="utf-8")
    if line := along_curve(rows):
        save(lambda: draw(line), target, "curve")


# ---------------------------------------------------------------------------------------------------------------------
# Which lines belong together


def along_curve(rows: Sequence[Row]) -> list[Row]:
    """The start and the runs with default settings of the seed that has most of them, by tokens."""
    plain = [row for row in rows if is_default(row) and row["start"].startswith("even.train")]
    starts = [row["start"] for row in plain]
    most = max(starts, key=starts.count, default=None)
    return sorted((row for row in plain if row["start"] == most), key=lambda row: row["asked"])


def is_default(row: Row) -> bool:
    """Whether a line is a start, or a run on the pool with settings as they are."""
    return "start" in row and not row.get("overrides") and row.get("text", "train") == "train"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Names of the texts: watched and trained on, those of the mean, others."""
    names = list(dict.fromkeys(name for row in rows for name in row["texts"]))
    return [name for name in names if name in DOMAINS] + [name for name in names if name not in (*DOMAINS, *_OWN_TEXTS)]


def mean_of(texts: Mapping[str, Mapping[str, Any]], key: str = "ratio") -> float:
    """The mean over the domains that there are, or over all texts where there is none of them."""
    names = [name for name in texts if name in DOMAINS] or [name for name in texts if name not in _OWN_TEXTS]
    return sum(texts[name][key] for name in names) / len(names)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"


def ratios(rows: Sequence[tuple[str, Row]], own: Sequence[str] = ("watch",)) -> str:
    """KL over plain rounding's by text, the mean last but for the texts outside of it."""
    names = columns_of([row for _, row in rows])
    inside, outside = [n for n in names if n in DOMAINS], [n for n in names if n not in DOMAINS]
    head = ["", *own, *inside, "mean", *outside]
    lines = []
    for label, row in rows:
        texts = row["texts"]
        cells = [f"{texts[name]['ratio']:.3f}" for name in (*own, *inside)] + [f"**{mean_of(texts):.3f}**"]
        lines.append([label, *cells, *(f"{texts[name]['ratio']:.3f}" for name in outside)])
    return table(head, lines)


def recoveries(rows: Sequence[tuple[str, Row]]) -> str:
    """The part of plain rounding's gap in loss that is closed, by text, with its interval."""
    names = columns_of([row for _, row in rows])

    def cell(found):
        if found is None:
            return "gap within its interval"
        if found["label"] == "fits the data":
            return "fits the data"
        low, high = found["interval"]
        return f"{found['value']:.0%} [{low:.0%}, {high:.0%}]"

    lines = [[label, *(cell(row["texts"][name]["recovery"]) for name in names)] for label, row in rows]
    return table(["", *names], lines)


def tokens_of(row: Row) -> str:
    """How many tokens a line's file was refined on."""
    return f"{row['asked'] / 1e6:g} M tokens" if row["asked"] else "`spectral`"


def curve(rows: Sequence[Row]) -> str:
    """Divergence and recovery against tokens."""
    line = [(tokens_of(row), row) for row in along_curve(rows)]
    if not line:
        return ""
    head = ["", "updates", "tokens a second", "seconds"]
    rates = [
        [label, str(row["step"]), f"{row['tokens_per_second']:,.0f}", f"{row['seconds']:.0f}"]
        for label, row in line
        if row["asked"]
    ]
    parts = ["## Tokens\n", "KL over plain rounding's:\n", ratios(line), "Gap in loss recovered:\n", recoveries(line)]
    return "\n".join([*parts, *([table(head, rates)] if rates else [])])


def seeds(rows: Sequence[Row], model: str) -> str:
    """The longest runs with default settings, seed by seed, and their mean and range."""
    found = [row for row in rows if is_default(row) and row["start"].startswith(f"{model}.train")]
    longest = max((row["asked"] for row in found), default=0)
    lines = [
        (f"seed {row['start'].rsplit('.', 1)[1]}, {tokens_of(row)}", row)
        for tokens in sorted({0, longest})
        for row in sorted(found, key=lambda row: row["start"])
        if row["asked"] == tokens
    ]
    if not lines:
        return ""
    refined = [mean_of(row["texts"]) for _, row in lines if row["asked"] == longest]
    spread = (
        f"{len(refined)} seeds: mean {sum(refined) / len(refined):.3f}, {min(refined):.3f} to {max(refined):.3f}.\n"
    )
    others = [row for row in rows if row.get("text") == "languages" and row["start"].startswith(f"{model}.train")]
    lines += [(row["label"], row) for row in others]
    title = "Seeds" if model == "even" else "Uneven channels"
    return "\n".join([f"## {title}\n", ratios(lines), spread, recoveries(lines)])


def ablation(rows: Sequence[Row]) -> str:
    """Every setting of the ablation, group by group, and what was chosen."""
    runs = {row["label"]: row for row in rows if row.get("part") in ("ablation", "chosen") and "texts" in row}
    if not runs:
        return ""
    budget = min(row["asked"] for row in runs.values())
    lines = [(DEFAULTS, row) for row in along_curve(rows) if row["asked"] == budget]
    for group, settings in GROUPS.items():
        lines += [(f"{group}: {label}", runs[label]) for label in settings if label in runs]
    picked = [row for row in rows if row.get("part") == "chosen"]
    lines += [(f"chosen, {tokens_of(row)}", row) for row in picked if "texts" in row]
    named = next((row["settings"] for row in picked if "settings" in row), None)
    words = [] if named is None else [f"Chosen by watch: {', '.join(named) or 'the defaults'}.\n"]
    return "\n".join([f"## Settings, {budget / 1e6:g} M tokens\n", ratios(lines), *words])


def chat(rows: Sequence[Row]) -> str:
    """Prompts alone: the start from them, and passes over them."""
    runs = {row["label"]: row for row in rows if row.get("part") == "chat"}
    starts = [("calibrated on prompts", row) for row in rows if row.get("start", "").startswith("even.chat")][:1]
    lines = [line for line in starts if not line[1]["asked"]]
    lines += [(label, runs[label]) for label in (*CHAT, "16 epochs, calibrated on the pool") if label in runs]
    if not lines:
        return ""
    return "\n".join(["## Prompts alone\n", ratios(lines, ("trained", "watch")), recoveries(lines)])


def elsewhere(rows: Sequence[Row]) -> str:
    """Files made elsewhere."""
    row = next((row for row in rows if row["job"] == "also"), None)
    if row is None:
        return ""
    lines = [(f"{name}, {row['sizes'][name]:,} bytes", {"texts": texts}) for name, texts in row["files"].items()]
    return "\n".join(["## Other files\n", ratios(lines), recoveries(lines)])


def in_runtime(rows: Sequence[Row]) -> str:
    """The same in llama.cpp."""
    row = next((row for row in rows if row["job"] == "runtime"), None)
    if row is None:
        return ""
    lines = [(name, {"texts": texts}) for name, texts in row["files"].items()]
    return "\n".join(["## In llama.cpp\n", ratios(lines, ()), recoveries(lines)])


def size(rows: Sequence[Row]) -> str:
    """The shape of Qwen3.5-0.8B."""
    row = next((row for row in rows if row["job"] == "size"), None)
    if row is None:
        return ""
    device = row["peak_device_memory_bytes"]
    cells = [f"{row['tokens_per_second']:,.0f}", "" if device is None else f"{device / 2**30:.1f}"]
    cells += [
        f"{row['peak_memory_bytes'] / 2**30:.1f}",
        f"{row['convert_seconds']:.0f}",
        f"{row['refine_seconds']:.0f}",
    ]
    head = [row["device"], "tokens a second", "device GiB", "host GiB", "convert, s", f"{row['updates']} updates, s"]
    return "\n".join(["## The real size\n", table(head, [["", *cells]])])


def check(rows: Sequence[Row]) -> str:
    """Whether anything that is evaluated was trained on."""
    counts = next((row["disjoint"] for row in rows if row.get("disjoint")), None)
    if counts is None:
        return ""
    seen = {name: count["also trained on"] for name, count in counts.items() if count["also trained on"]}
    return f"Evaluated documents that were trained on: {seen or 'none'}.\n"


# ---------------------------------------------------------------------------------------------------------------------
# Figure


def draw(line: Sequence[Row]) -> Figure:
    """KL over plain rounding's against tokens, a line a text; the start stands left of the first run."""
    figure = Figure(figsize=(7.2, 4.4))
    axes = figure.subplots()
    first = min((row["asked"] for row in line if row["asked"]), default=1)
    places = [row["asked"] or first / 2 for row in line]
    for name, colour in zip([*columns_of(line), "watch"], COLOURS):
        values = [row["texts"][name]["ratio"] for row in line]
        style = "--" if name not in DOMAINS else "-"
        axes.plot(places, values, style, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name)
    figure.legend(loc="outside right center", frameon=False)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, ["0", *(f"{row['asked'] / 1e6:g}" for row in line if row["asked"])][-len(places) :])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(title="Refinement from `spectral`", xlabel="million tokens", ylabel="KL over plain rounding's")
    return figure
