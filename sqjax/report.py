"""The report of a comparison: its tables and figures, and the tokens on which files disagree with the reference."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqjax import charts, drawing
from sqjax.charts import everyone, short
from sqjax.pages import Figured, Report, half, visible
from sqjax.run import MIB
from sqjax.spectra import read_spectra
from sqjax.tables import all_tables

_SIZES = {"plain": "plain rounding", "pure": "files of its size", "other": "other sizes"}


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
    eigenvalues = read_spectra(statistics) if statistics is not None else {}
    report = Report(
        title=f"{result['reference_facts']['name']}: files compared",
        summary=summary(result),
        tables=all_tables(result, eigenvalues),
        figures=_figures(result, eigenvalues, runs),
        conditions=conditions(result),
    )
    shown = {"files": everyone(result), "suites": list(result["suites"]), "short": short}
    return report.write(Path(out), "report.html.jinja", ending=_disagreements(result), **shown)


def _figures(
    result: Mapping[str, Any], eigenvalues: Mapping[str, Any], runs: Sequence[str | Path]
) -> dict[str, Figured]:
    size = "Loss and divergence of each file against its size."
    refinement = "KL divergence in the course of refinement; faint: of each batch."
    figures = {
        "loss-size": (charts.loss_against_size(result), size, "loss", _SIZES),
        "kl-histograms": (charts.histograms(result), "How the divergence is spread over tokens.", "divergence", _SIZES),
        "contributions": (charts.contributions(result), "What each group of tensors contributes alone.", "groups"),
        "refinement": (charts.curves(runs), refinement, "provenance"),
        "spectra": (charts.spectra(eigenvalues), "Spectra of the calibration's Grams.", "spectra-table"),
    }
    return {
        name: Figured(drawing.draw(figure), *said) for name, (figure, *said) in figures.items() if figure is not None
    }


def summary(result: Mapping[str, Any]) -> str:
    """Returns two sentences: what was compared, and what came of the files of plain rounding's size."""
    plain = result["baseline"]
    same = {name: file for name, file in everyone(result).items() if file["tensor_bytes"] == plain["tensor_bytes"]}
    name, best = next(iter(same.items()))
    if name == plain["name"]:
        said = "Of those of plain rounding's size none is closer to the reference than plain rounding"
    else:
        bits = f"{best['bits_per_weight']:.2f} bits per weight"
        said = f"At plain rounding's size, {bits}, {short(name)} is closest: {kept(result, name)}"
    given = "1 file" if len(result["files"]) == 1 else f"{len(result['files'])} files"
    return f"{given} against {scored(result)}. {said}."


def scored(result: Mapping[str, Any]) -> str:
    """Returns the reference and how much text files were compared on."""
    tokens = sum(suite["tokens"] for suite in result["suites"].values())
    texts = "one suite" if len(result["suites"]) == 1 else f"{len(result['suites'])} suites"
    return f"{result['reference_facts']['name']} on {tokens:,} tokens of {texts}"


def kept(result: Mapping[str, Any], name: str) -> str:
    """Returns the divergence of a file, beside that of plain rounding unless that is none or the file itself."""
    plain, file = result["baseline"], everyone(result)[name]
    change = file["difference_from_plain"]
    said = f"KL {file['kl']:.4f} ± {half(file['kl_interval']):.4f} nats per token"
    if name == plain["name"] or change["ratio"] is None:
        return said
    low, high = change["kl_interval"]
    unsure = ", a difference within its interval" if low <= 0 <= high else ""
    return f"{said}, {change['ratio']:.0%} of plain rounding's {plain['kl']:.4f}{unsure}"


def conditions(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns under what conditions files were compared: a name and a sentence of each."""
    settings, versions = result["settings"], result["versions"]
    runtime = {"jax": "dequantized, in JAX", "both": "dequantized, in JAX; and llama.cpp"}.get(settings["runtime"])
    memory = f"{result['peak_memory_bytes'] / MIB:,.0f} MiB"
    if result.get("peak_device_memory_bytes"):
        memory += f", of the device {result['peak_device_memory_bytes'] / MIB:,.0f} MiB"
    windows = "all" if settings["windows"] is None else f"the first {settings['windows']} of each suite"
    # A suite's name may say how many windows it has.
    others = {name: suite["windows"] for name, suite in result["suites"].items()}
    windows += "".join(f", {n} of {name}" for name, n in others.items() if n != settings["windows"])
    disjoint = {
        True: "checked",
        False: "no: a file was made on some of the text",
        None: "not checked: what some file was made on is not known",
    }[result["disjoint_from_calibration"]]
    return [
        ("Date", result["date"]),
        ("Models ran", f"{runtime or 'in llama.cpp'}, matrices in {settings['dtype']}"),
        ("Windows", windows),
        ("Bootstrap seed", str(settings["seed"])),
        ("Disjoint from the calibration text", disjoint),
        ("Device", result["device"]),
        ("Seconds", f"{result['seconds']:,.0f}, scores kept from before not counted"),
        ("Peak memory", memory),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _disagreements(result: Mapping[str, Any]) -> str:
    found = everyone(result)
    shown = [(name, one) for name, file in found.items() for one in file.get("disagreements", ())[:3] if one["kl"] > 0]
    lines = [_spoken(short(name), one) for name, one in shown]
    return "\n".join(["## Largest disagreements\n\nThree of each file; the page has more.\n", *lines]) if lines else ""


def _spoken(name: str, one: Mapping[str, Any]) -> str:
    five = lambda best: ", ".join(f"`{visible(b['token'])}` {b['probability']:.0%}" for b in best)  # noqa: E731
    prefix = visible(one["prefix"][-160:])
    return (
        f"* {name}, {one['suite']}, KL {one['kl']:.3f}: `{prefix}` → `{visible(one['true'])}`\n"
        f"  * reference: {five(one['best_reference'])}\n  * file: {five(one['best'])}"
    )
