"""The report of a study: the winner, every setting that was tried, figures and trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqjax import drawing, study_charts
from sqjax.pages import Cell, Figured, Report, Table, half, number, with_interval
from sqjax.run import MIB
from sqjax.study_results import Record, short_names, shown

Study = Mapping[str, Any]


def write(study: Study, records: Sequence[Record], out: str | Path) -> dict[str, str]:
    """Writes report.md, report.html and the figures as PNG and SVG; returns their paths by kind.

    Args:
      study: what `sweeping.sweep` returned, or its sweep.json.
      records: of its trials, as in results.jsonl.
      out: folder for the files.

    Raises:
      InputError: the folder cannot be written.
    """
    tables = (_settings(study), _heldout(study), _texts(study, records), _trials(study, records))
    report = Report(
        title=f"{study['study']}: a sweep on {study['model']}",
        summary=summary(study),
        tables=[table for table in tables if table],
        figures=_figures(study, records),
        conditions=_conditions(study, records),
    )
    winner = _winner(study)
    lines = "".join(f"* {name}: {said}\n" for name, said in winner)
    ending = f"## Winner\n\n{lines}\n```toml\n{study['recipe']}```\n"
    return report.write(Path(out), "study.html.jinja", ending=ending, winner=winner, recipe=study["recipe"])


def summary(study: Study) -> str:
    """Returns what was tried, what is best, and what its file came to on text that no trial has seen."""
    rows, best = study["ranking"], study["best"]
    seeds = len(best["trials"])
    trials = f"{sum(study['trials'].values())} trials"
    tried = f"{len(rows)} settings in {trials}" if len(rows) > 1 else f"One setting in {trials}"
    names = short_names(rows)
    settings = ", ".join(f"{names[name]} {shown(value)}" for name, value in best["settings"].items())
    sides = [f"{best_of:.3f} {side} ({', '.join(study['sides'][side])})" for side, best_of in _by_side(best, study)]
    said = f"{tried}. Best{f' over {seeds} seeds' if seeds > 1 else ''}: {settings}, with KL {' and '.join(sides)}"
    said += " of plain rounding's."
    if measured := _measured(study):
        ratio = measured["quantized"]["kl"] / measured["plain"]["kl"]
        kl = f"{measured['quantized']['kl']:.4f} nats per token"
        said += f" Its file, on text that no trial was judged by: KL {kl}, {ratio:.3f} of plain rounding's."
    return said


def _by_side(row: Record, study: Study) -> list[tuple[str, float]]:
    """Mean ratio of the texts of each side that has any."""
    return [
        (side, sum(row["ratio"][name] for name in names) / len(names))
        for side, names in study["sides"].items()
        if names
    ]


def _measured(study: Study) -> Mapping[str, Any] | None:
    """Metrics of the winner's file and of plain rounding on text that no trial has seen, once they are known."""
    return (study.get("verified") or {}).get("evaluation")


def _winner(study: Study) -> list[tuple[str, str]]:
    best = study["best"]
    names = short_names(study["ranking"])
    said = [(names[name], shown(value)) for name, value in best["settings"].items()]
    for objective, value, spread in zip(study["objectives"], best["values"], best["spread"]):
        over = f" ± {spread:.4f} over seeds" if len(best["trials"]) > 1 else ", one seed"
        said.append((f"KL over plain rounding's, {objective}", f"{value:.4f}{over}"))
    if verified := study.get("verified"):
        size = f"{verified['file_bytes']:,} bytes, {verified['file_bytes'] / MIB:.1f} MiB"
        types = ", ".join(f"{count} {kind}" for kind, count in verified["types"].items())
        said.append(
            ("File", f"{Path(verified['file']).name}: {size}, {verified['bits_per_weight']:.2f} bits per weight")
        )
        said += [("Tensors", types), ("SHA-256", verified["sha256"])]
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _settings(study: Study) -> Table:
    rows, names = study["ranking"], short_names(study["ranking"])
    texts = list(rows[0]["ratio"])
    most = max(len(row["trials"]) for row in rows)
    whole = [row for row in rows if len(row["trials"]) == most]
    best = [min(row["values"][n] for row in whole) for n in range(len(study["objectives"]))]
    best_on = {text: min(row["ratio"][text] for row in whole) for text in texts}
    highest = max(value for row in rows for value in row["values"])
    shown = []
    for place, row in enumerate(rows, 1):
        competes = len(row["trials"]) == most and len(whole) > 1
        shown.append(
            [
                number(place, "d"),
                *(_setting(row["settings"][name]) for name in names),
                *(
                    number(value, ".4f", share=value / highest, is_best=competes and value == least)
                    for value, least in zip(row["values"], best)
                ),
                number(max(row["spread"]), ".4f"),
                *(
                    number(row["ratio"][text], ".4f", is_best=competes and row["ratio"][text] == best_on[text])
                    for text in texts
                ),
                number(len(row["trials"]), "d"),
                Cell("front" if row["on_front"] else ""),
            ]
        )
    words = [names[name] for name in names if not _is_number(rows[0]["settings"][name])]
    caption = (
        "KL divergence over that of plain rounding, mean over seeds: of the objectives with half of the largest range "
        "over seeds, and on each text. Ordered by the mean of the objectives, settings that were not tried with all "
        "seeds last; bold: the least of a column; front: no other setting is better in all objectives."
    )
    columns = ("rank", *names.values(), *study["objectives"], "±", *texts, "seeds", "Pareto")
    return Table("settings", "Settings", caption, columns, shown, frozenset([*words, "Pareto"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _setting(value: Any) -> Cell:
    return Cell(shown(value), value if _is_number(value) else "")


def _heldout(study: Study) -> Table | None:
    measured = _measured(study)
    if measured is None:
        return None
    ours, plain = measured["quantized"], measured["plain"]
    texts = {"all of it": (ours, plain)}
    texts |= {name: (part, plain["domains"][name]) for name, part in ours.get("domains", {}).items()}
    rows = [
        [
            Cell(name, name),
            number(one["tokens"], ",d"),
            with_interval(one["kl"], one["kl_interval"]),
            number(other["kl"], ".5f"),
            number(one["kl"] / other["kl"] if other["kl"] else None, ".3f"),
            *(number(one[f"kl_{part}"], ".4f") for part in ("median", "p99", "p999", "max")),
            number(one["top1"], ".2%"),
            number(one["rms_probability_change"], ".2%"),
            Cell(f"{one['gap']:+.4f} ± {half(one['gap_interval']):.4f}", one["gap"]),
            number(other["gap"], "+.4f"),
        ]
        for name, (one, other) in texts.items()
    ]
    caption = (
        f"The file of the winner, read back, on {', '.join(study['heldout'])}, by which no trial was judged: KL from "
        "the original in nats per token with its 95% interval, beside that of plain rounding, quantiles over tokens, "
        "agreement on the most probable token, change of the true token's probability, and the gap in loss."
    )
    columns = ("text", "tokens", "KL", "KL, plain", "over plain", "median", "99%", "99.9%", "max")
    columns += ("top-1", "RMS Δp", "gap", "gap, plain")
    return Table("heldout", "The winner on held-out text", caption, columns, rows)


def _trials(study: Study, records: Sequence[Record]) -> Table:
    names = list(dict.fromkeys(name for record in records for name in record["settings"]))
    last = [name.split(".")[-1] for name in names]
    short = [end if last.count(end) == 1 else name for name, end in zip(names, last)]
    rows = []
    for record in records:
        values = record["values"] or [None] * len(study["objectives"])
        spent = [record[part] for part in ("rounding_seconds", "judging_seconds") if part in record]
        note = record.get("error") or (f"as trial {record['same_as']}" if "same_as" in record else "")
        rows.append(
            [
                number(record["trial"], "d"),
                Cell(record["state"]),
                *(_setting(record["settings"][name]) if name in record["settings"] else Cell("—") for name in names),
                *(number(value, ".4f") for value in values),
                number(record["attempts"], "d"),
                number(sum(spent) if spent else None, ",.1f"),
                Cell(note),
            ]
        )
    caption = "Objectives of each trial; those rounded side by side share their time."
    words = {name for at, name in enumerate(short) if not _is_number(records[0]["settings"].get(names[at], 0))}
    columns = ("trial", "state", *short, *study["objectives"], "attempts", "seconds", "note")
    return Table("trials", "Trials", caption, columns, rows, frozenset({"state", "note", *words}))


def _texts(study: Study, records: Sequence[Record]) -> Table:
    complete = next(record for record in records if record["state"] == "complete")
    rows = [
        [
            Cell(name, name),
            Cell(source),
            Cell(next((side for side, names in study["sides"].items() if name in names), "pruning alone")),
            number(complete["kl"][name] / complete["ratio"][name], ".5f"),
        ]
        for name, source in study["watched"].items()
    ]
    caption = "What trials were judged by, and the KL of plain rounding on it in nats per token."
    return Table(
        "texts", "Watched text", caption, ("text", "source", "side", "KL, plain"), rows, frozenset({"source", "side"})
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures and conditions


def _figures(study: Study, records: Sequence[Record]) -> dict[str, Figured]:
    rows, sides = study["ranking"], study["sides"]
    strength = (
        "KL divergence over that of plain rounding on each text against what was searched; bands: range over seeds."
    )
    front = "What each setting keeps inside and outside of the calibration's kind of text; down and left is better."
    figures = {"strength": (study_charts.strength(records, rows, sides), strength)}
    figures |= {"pareto": (study_charts.front(rows, sides), front)}
    return {
        name: Figured(drawing.draw(figure), caption, "settings")
        for name, (figure, caption) in figures.items()
        if figure is not None
    }


def _conditions(study: Study, records: Sequence[Record]) -> list[tuple[str, str]]:
    calibration = study["calibration"]
    text = f"{calibration['tokens']:,} tokens of {', '.join(calibration['text'])}, windows of {calibration['length']}"
    windows = "all windows" if not study["windows"] else f"the first {study['windows']} windows or conversations"
    seconds = sum(record.get(part, 0) for record in records for part in ("rounding_seconds", "judging_seconds"))
    devices = dict.fromkeys(record["device"] for record in records if "device" in record)
    seeds = sorted({seed for row in study["ranking"] for seed in row["seeds"] if seed is not None})
    return [
        ("Date", study["date"]),
        ("Search", f"{study['sampler']}, seed {study['sampler_seed']}, objectives {' and '.join(study['objectives'])}"),
        ("Trials", ", ".join(f"{count} {state}" for state, count in study["trials"].items())),
        ("Calibrated on", text),
        ("Seeds of the calibration", ", ".join(map(str, seeds)) or str(calibration["seed"])),
        ("Judged by", f"{windows} of each text, dequantized, in JAX"),
        (
            "Disjoint",
            "no document is in two of the texts of calibration, watching and the end; a hub's data sets aside",
        ),
        ("Device", ", ".join(devices) or "not stated"),
        ("Seconds", f"{seconds:,.0f} of rounding and judging, of all workers together"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in study["versions"].items())),
    ]
