"""The report of a comparison: tables and figures as markdown, as image files, and as one page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sqjax import charts
from sqjax.charts import MIB, everyone, short
from sqjax.run import atomic_path
from sqjax.spectra import read_spectra
from sqjax.tables import Table, all_tables

_FIGURES_AFTER = {
    "loss": ("loss-size",),
    "divergence": ("kl-histograms",),
    "groups": ("contributions",),
    "spectra-table": ("spectra",),
    "provenance": ("refinement",),
}


def write(
    result: Mapping[str, Any], out: str | Path, *, statistics: str | Path | None = None, runs: Sequence[str | Path] = ()
) -> dict[str, str]:
    """Writes report.md, report.html and the figures as PNG and SVG; returns their paths by kind.

    Args:
      result: what `comparison.compare` returned, or its JSON.
      out: folder for the files.
      statistics: folder that `calibrate` wrote, for spectra.
      runs: folders that `refine` wrote, for curves.

    Raises:
      InputError: the folder cannot be written, or statistics or runs cannot be read.
    """
    out = Path(out)
    eigenvalues = read_spectra(statistics) if statistics is not None else {}
    figures = {
        "loss-size": (charts.loss_against_size(result), "Loss and divergence of each file against its size."),
        "kl-histograms": (charts.histograms(result), "How the divergence is spread over tokens."),
        "contributions": (charts.contributions(result), "What each group of tensors contributes alone."),
        "refinement": (charts.curves(runs), "KL divergence in the course of refinement; faint: of each batch."),
        "spectra": (charts.spectra(eigenvalues) if eigenvalues else None, "Spectra of the calibration's Grams."),
    }
    figures = {
        name: (charts.draw(figure), caption) for name, (figure, caption) in figures.items() if figure is not None
    }
    paths = {"markdown": str(out / "report.md"), "html": str(out / "report.html")}
    for name, (drawn, _) in figures.items():
        charts.save(drawn, out / name)
        paths |= {f"{name}.{kind}": str(out / f"{name}.{kind}") for kind in ("png", "svg")}
    tables = all_tables(result, eigenvalues)
    with atomic_path(out / "report.md") as path:
        path.write_text(_markdown(result, tables, figures), encoding="utf-8")
    with atomic_path(out / "report.html") as path:
        path.write_text(_page(result, tables, figures), encoding="utf-8")
    return paths


def summary(result: Mapping[str, Any]) -> str:
    """Returns two sentences: what was compared, and what came of the files of plain rounding's size."""
    plain, files = result["baseline"], everyone(result)
    tokens = sum(suite["tokens"] for suite in result["suites"].values())
    texts = "one suite" if len(result["suites"]) == 1 else f"{len(result['suites'])} suites"
    first = f"{len(files)} files against {result['reference_facts']['name']} on {tokens:,} tokens of {texts}"
    same = {name: file for name, file in files.items() if file["tensor_bytes"] == plain["tensor_bytes"]}
    name, best = next(iter(same.items()))
    if name == plain["name"]:
        return f"{first}. Of those of plain rounding's size none is closer to the reference than plain rounding."
    change = best["difference_from_plain"]
    sure = "" if change["kl_interval"][1] < 0 else ", a difference within its interval"
    return (
        f"{first}. At plain rounding's size, {best['bits_per_weight']:.2f} bits per weight, {short(name)} is closest: "
        f"KL {best['kl']:.4f}, {change['ratio']:.0%} of plain rounding's {plain['kl']:.4f} nats per token{sure}."
    )


def _conditions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, versions = result["settings"], result["versions"]
    runtime = {"jax": "dequantized, in JAX", "both": "dequantized, in JAX; and llama.cpp"}.get(settings["runtime"])
    memory = f"{result['peak_memory_bytes'] / MIB:,.0f} MiB"
    if result.get("peak_device_memory_bytes"):
        memory += f", of the device {result['peak_device_memory_bytes'] / MIB:,.0f} MiB"
    disjoint = {
        True: "checked",
        False: "no: a file was made on some of the text",
        None: "not checked: what some file was made on is not known",
    }[result["disjoint_from_calibration"]]
    return [
        ("Date", result["date"]),
        ("Models ran", f"{runtime or 'in llama.cpp'}, matrices in {settings['dtype']}"),
        ("Windows", "all" if settings["windows"] is None else f"the first {settings['windows']} of each suite"),
        ("Bootstrap seed", str(settings["seed"])),
        ("Disjoint from the calibration text", disjoint),
        ("Device", result["device"]),
        ("Seconds", f"{result['seconds']:,.0f}, scores kept from before not counted"),
        ("Peak memory", memory),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _markdown(result: Mapping[str, Any], tables: Sequence[Table], figures: Mapping[str, tuple[Any, str]]) -> str:
    parts = [f"# {result['reference_facts']['name']}: files compared\n", summary(result) + "\n"]
    for table in tables:
        parts.append(table.markdown())
        for name in _FIGURES_AFTER.get(table.key, ()):
            if name in figures:
                parts.append(f"![{figures[name][1]}]({name}.png)\n")
    parts.append("## Conditions\n\n" + "".join(f"* {name}: {value}\n" for name, value in _conditions(result)))
    found = everyone(result)
    shown = [(name, one) for name, file in found.items() for one in file.get("disagreements", ())[:3]]
    if shown:
        parts.append("## Largest disagreements\n\nThree of each file; the page has more.\n")
        parts += [_spoken(short(name), one) for name, one in shown if one["kl"] > 0]
    return "\n".join(parts)


def _spoken(name: str, one: Mapping[str, Any]) -> str:
    five = lambda best: ", ".join(f"`{_visible(b['token'])}` {b['probability']:.0%}" for b in best)  # noqa: E731
    prefix = _visible(one["prefix"][-160:]).replace("`", "'")
    return (
        f"* {name}, {one['suite']}, KL {one['kl']:.3f}: `{prefix}` → `{_visible(one['true'])}`\n"
        f"  * reference: {five(one['best_reference'])}\n  * file: {five(one['best'])}"
    )


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("`", "'") or "∅"


def _page(result: Mapping[str, Any], tables: Sequence[Table], figures: Mapping[str, tuple[Any, str]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = _visible
    return environment.get_template("report.html.jinja").render(
        title=f"{result['reference_facts']['name']}: files compared",
        summary=summary(result),
        tables=tables,
        figures={name: (charts.inline(svg, name), caption) for name, ((_, svg), caption) in figures.items()},
        figures_after=_FIGURES_AFTER,
        conditions=_conditions(result),
        files=everyone(result),
        suites=list(result["suites"]),
        short=short,
    )
