"""Tables of a comparison."""

from collections.abc import Mapping
from typing import Any

from sqjax import charts
from sqjax.charts import everyone, short
from sqjax.pages import Cell, Table, half, number, with_interval
from sqjax.run import MIB

OUTSIDE = "out of domain"


def all_tables(result: Mapping[str, Any], eigenvalues: Mapping[str, Any] | None = None) -> list[Table]:
    """Returns every table of a comparison, in the order of the report."""
    tables = [losses(result), divergences(result), recoveries(result), divergences_by_suite(result), roles(result)]
    tables += [in_llama_cpp(result), pairs(result), groups(result), _spectra(eigenvalues or {})]
    return [table for table in (*tables, suites(result), provenance(result)) if table and table.rows]


def _name(name: str, result: Mapping[str, Any]) -> Cell:
    made = " (made for this table)" if name == result["baseline"]["name"] and not result["baseline"]["given"] else ""
    return Cell(short(name) + made, short(name))


def _suite_names(result: Mapping[str, Any]) -> list[str]:
    return list(result["suites"])


def _headed(result: Mapping[str, Any], name: str) -> str:
    return f"{name} ({OUTSIDE})" if result["suites"][name]["out_of_domain"] else name


def _outside(result: Mapping[str, Any]) -> list[str]:
    return [name for name, suite in result["suites"].items() if suite["out_of_domain"]]


def _with_outside(result: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    """Every table says how files do outside of what they were made for, be it that nobody measured it."""
    return columns if _outside(result) else (*columns, OUTSIDE)


def _no_outside(result: Mapping[str, Any]) -> list[Cell]:
    return [] if _outside(result) else [Cell("not measured")]


def losses(result: Mapping[str, Any]) -> Table:
    """Cross-entropy on each suite beside bits per weight and size: the table of a release."""
    facts, names = result["reference_facts"], _suite_names(result)
    files = everyone(result)
    columns = _with_outside(result, ("model", "bpw", "MiB", *(_headed(result, name) for name in names)))
    kinds = "/".join(kind for kind in facts["types"] if kind != "F32") or "F32"
    rows = [
        [
            Cell(f"{facts['name']} ({kinds}, reference)", ""),
            *(number(facts["bits_per_weight"], ".2f"), number(facts["file_bytes"] / MIB, ".1f")),
            *(number(facts["suites"][name]["cross_entropy"], ".4f") for name in names),
            *_no_outside(result),
        ]
    ]
    same = [file for file in files.values() if file["tensor_bytes"] == result["baseline"]["tensor_bytes"]]
    # A loss below the original's is no quality: such a file does not compete.
    fair = {name: [file["suites"][name] for file in same] for name in names}
    fair = {name: [s["cross_entropy"] for s in found if not _fits_the_data(s)] for name, found in fair.items()}
    best = {name: min(found, default=None) for name, found in fair.items()}
    for name, file in files.items():
        found = [file["suites"][suite]["cross_entropy"] for suite in names]
        row = [_name(name, result), number(file["bits_per_weight"], ".2f"), number(file["file_bytes"] / MIB, ".1f")]
        row += [
            number(loss, ".4f", is_best=file in same and len(same) > 1 and loss == best[suite])
            for loss, suite in zip(found, names)
        ]
        rows.append([*row, *_no_outside(result)])
    caption = (
        "Cross-entropy in nats per token, lower is better down to the reference's; bold: the best file of plain "
        "rounding's size, files that fit the data aside."
    )
    return Table("loss", "Loss and size", caption, columns, rows)


def _fits_the_data(suite: Mapping[str, Any]) -> bool:
    return suite["recovery"]["label"] == "fits the data"


def divergences(result: Mapping[str, Any]) -> Table:
    """KL divergence over all suites: mean with interval, tail, agreement."""
    files, outside = everyone(result), _outside(result)
    columns = ("model", "KL", "±", "over plain", "median", "99%", "99.9%", "max", "top-1", "RMS Δp", f"KL {OUTSIDE}")
    highest = max((file["kl"] for file in files.values()), default=0) or 1
    rows = []
    for name, file in files.items():
        scored = [(file["suites"][suite]["kl"], file["suites"][suite]["tokens"]) for suite in outside]
        total = sum(tokens for _, tokens in scored)
        apart = number(sum(kl * tokens for kl, tokens in scored) / total, ".5f") if total else Cell("not measured")
        rows.append(
            [
                _name(name, result),
                number(file["kl"], ".5f", share=file["kl"] / highest),
                number(half(file["kl_interval"]), ".5f"),
                number(file["difference_from_plain"]["ratio"], ".3f"),
                *(number(file[f"kl_{part}"], ".4f") for part in ("median", "p99", "p999", "max")),
                number(file["top1"], ".2%"),
                number(file["rms_probability_change"], ".2%"),
                apart,
            ]
        )
    caption = (
        "KL(reference ‖ file) per token in nats over all suites, with half the width of its 95% interval (bootstrap "
        "over sequences), its quantiles over tokens, agreement on the most probable token, and the root mean square "
        "change of the true token's probability."
    )
    return Table("divergence", "Divergence from the reference", caption, columns, rows)


def recoveries(result: Mapping[str, Any]) -> Table:
    """The gap in loss of each file, and the part of plain rounding's that it closes, on each suite."""
    names = _suite_names(result)
    columns = ("model", "gap", "all suites", *(_headed(result, name) for name in names))
    rows = []
    for name, file in everyone(result).items():
        gap = Cell(f"{file['gap']:+.4f} ± {half(file['gap_interval']):.4f}", file["gap"])
        found = [file["recovery"], *(file["recovery"]["suites"][suite] for suite in names)]
        rows.append([_name(name, result), gap, *map(_recovered, found), *_no_outside(result)])
    caption = (
        "Gap: cross-entropy minus the reference's, over all suites, in nats per token. Recovery: (plain - file) / "
        "(plain - reference) of the cross-entropy, with its 95% interval. It is not stated where plain rounding's gap "
        "is not larger than its own interval; above 100% the loss fell because the model moved towards the text, "
        "which is no quality."
    )
    return Table("recovery", "Gap recovery", caption, _with_outside(result, columns), rows)


def _recovered(recovery: Mapping[str, Any]) -> Cell:
    if recovery["value"] is None:
        is_plain = recovery["label"] == "plain rounding"
        return Cell("plain rounding" if is_plain else "not stated", float("inf"))
    if recovery["label"] == "fits the data":
        return Cell("fits the data", recovery["value"])
    low, high = recovery["interval"]
    return Cell(f"{recovery['value']:.1%} [{low:.0%}, {high:.0%}]", recovery["value"])


def divergences_by_suite(result: Mapping[str, Any]) -> Table | None:
    """Mean KL of each file on each suite."""
    names = _suite_names(result)
    if len(names) < 2:
        return None
    columns = _with_outside(result, ("model", *(_headed(result, name) for name in names)))
    rows = [
        [
            _name(name, result),
            *(with_interval(file["suites"][suite]["kl"], file["suites"][suite]["kl_interval"]) for suite in names),
            *_no_outside(result),
        ]
        for name, file in everyone(result).items()
    ]
    return Table("suites-kl", "Divergence by suite", "Mean KL in nats per token ± half the interval.", columns, rows)


def roles(result: Mapping[str, Any]) -> Table | None:
    """Mean KL of template, prompt and response tokens of conversations."""
    files = {name: file for name, file in everyone(result).items() if file.get("roles")}
    present = list(dict.fromkeys(role for file in files.values() for role in file["roles"]))
    if not present:
        return None
    counts = next(iter(files.values()))["roles"]
    rows = [
        [
            _name(name, result),
            *(with_interval(file["roles"][role]["kl"], file["roles"][role]["kl_interval"]) for role in present),
            *(number(file["roles"][role]["top1"], ".2%") for role in present),
        ]
        for name, file in files.items()
    ]
    tokens = ", ".join(f"{counts[role]['tokens']:,} {role}" for role in present)
    columns = ("model", *(f"KL, {role}" for role in present), *(f"top-1, {role}" for role in present))
    return Table("roles", "Template, prompt and response", f"Conversations only: {tokens} tokens.", columns, rows)


def in_llama_cpp(result: Mapping[str, Any]) -> Table | None:
    """What llama.cpp says of the same files and tokens, each against its own reference."""
    files = {name: file for name, file in everyone(result).items() if file.get("llama.cpp")}
    if not files:
        return None
    columns = ("model", "KL, llama.cpp", "KL, dequantized", "top-1, llama.cpp", "loss, llama.cpp", "loss, dequantized")
    columns = (*columns, f"KL {OUTSIDE}, llama.cpp")
    rows = []
    for name, file in files.items():
        real, apart = file["llama.cpp"], [file["llama.cpp"]["suites"][suite] for suite in _outside(result)]
        total = sum(suite["tokens"] for suite in apart)
        rows.append(
            [
                _name(name, result),
                with_interval(real["kl"], real["kl_interval"]),
                with_interval(file["kl"], file["kl_interval"]),
                number(real["top1"], ".2%"),
                *(number(real["cross_entropy"], ".4f"), number(file["cross_entropy"], ".4f")),
                number(sum(s["kl"] * s["tokens"] for s in apart) / total, ".5f") if total else Cell("not measured"),
            ]
        )
    first = next(iter(files.values()))
    caption = (
        "The same tokens in llama.cpp, which rounds the activations of quantized matrices to 8 bits, against the "
        f"reference as F32 in llama.cpp (loss {first['llama.cpp']['cross_entropy_reference']:.4f}; dequantized "
        f"{first['cross_entropy_reference']:.4f})."
    )
    return Table("llama-cpp", "In llama.cpp", caption, columns, rows)


def pairs(result: Mapping[str, Any]) -> Table | None:
    """Paired differences of the mean KL between files."""
    rows = []
    for pair in result["differences"]:
        low, high = pair["kl_interval"]
        verdict = "no difference seen" if low <= 0 <= high else "first is closer" if high < 0 else "second is closer"
        rows.append(
            [
                Cell(short(pair["first"]), short(pair["first"])),
                Cell(short(pair["second"]), short(pair["second"])),
                number(pair["kl"], "+.5f"),
                Cell(f"[{low:+.5f}, {high:+.5f}]", low),
                Cell(verdict, verdict),
            ]
        )
    caption = "KL of the first minus KL of the second over all suites, with the paired 95% interval over sequences."
    columns = ("first", "second", "difference", "interval", "verdict")
    return Table("pairs", "File against file", caption, columns, rows, frozenset({"second", "verdict"}))


def groups(result: Mapping[str, Any]) -> Table | None:
    """What each group of tensors contributes alone."""
    rows = [
        [
            _name(name, result),
            Cell(group["group"], group["group"]),
            number(group["parameters"], ",d"),
            with_interval(group["kl"], group["kl_interval"]),
            number(group["kl"] / file["kl"] if file["kl"] else None, ".1%"),
            number(group["gap"], "+.4f"),
            number(group["top1"], ".2%"),
        ]
        for name, file in everyone(result).items()
        for group in file.get("groups", ())
    ]
    caption = "The reference with this group alone taken from the file: what that costs, over all suites."
    columns = ("model", "group", "parameters", "KL", "of the file's", "gap", "top-1")
    return Table("groups", "Contributions", caption, columns, rows, frozenset({"group"}))


def _spectra(eigenvalues: Mapping[str, Any]) -> Table | None:
    rows = [
        [
            Cell(name.split("/")[1], name.split("/")[1]),
            Cell(name.split("/")[0], name.split("/")[0]),
            number(len(values), "d"),
            number(charts.effective_rank(values), ".1f"),
            number(float(values[0] / values.sum()), ".1%"),
            number(float(values.sum()), ".3g"),
        ]
        for name, values in eigenvalues.items()
    ]
    caption = "Of each Gram: its effective rank (Σλ)² / Σλ², the share of its largest eigenvalue, and its trace."
    columns = ("tensor", "Gram", "size", "effective rank", "largest", "trace")
    return Table("spectra-table", "Spectra", caption, columns, rows, frozenset({"Gram"}))


def suites(result: Mapping[str, Any]) -> Table:
    """What was scored."""
    rows = [
        [
            Cell(name, name),
            Cell(suite["source"], suite["source"]),
            Cell(suite["kind"] + (f", windows of {suite['length']}" if suite["kind"] != "conversations" else "")),
            number(suite["sequences"], ",d"),
            number(suite["tokens"], ",d"),
            Cell("yes" if suite["out_of_domain"] else "no"),
            Cell(suite["sha256"][:16], suite["sha256"]),
        ]
        for name, suite in result["suites"].items()
    ]
    columns = ("suite", "source", "kind", "sequences", "scored tokens", OUTSIDE, "SHA-256 of tokens")
    caption = "Every token after the first of a sequence is scored."
    return Table("texts", "Suites", caption, columns, rows, frozenset({"source", "kind", OUTSIDE, columns[-1]}))


def provenance(result: Mapping[str, Any]) -> Table:
    """What each file is, to the byte, and how it was made where it says so."""
    rows = []
    for name, file in everyone(result).items():
        types = ", ".join(f"{count} {kind}" for kind, count in file["types"].items())
        size = number(file["file_bytes"], ",d")
        rows.append([_name(name, result), size, Cell(types), Cell(_made(file["provenance"])), Cell(file["sha256"])])
    columns = ("model", "bytes", "tensors", "made by", "SHA-256")
    caption = f"Reference: {result['reference_facts']['name']}, SHA-256 {result['reference_facts']['sha256']}."
    return Table("provenance", "Provenance", caption, columns, rows, frozenset({"tensors", "made by", "SHA-256"}))


def _made(provenance: Mapping[str, Any] | None) -> str:
    parts = []
    for step in steps(provenance):
        parts.append(step["recipe"])
        if step["tokens"]:
            parts.append(f"{step['tokens']:,} tokens of {', '.join(step['text'])}")
        if step["sha256"]:
            parts.append(f"tokens' SHA-256 {step['sha256'][:16]}")
        if step["seed"] is not None:
            parts.append(f"seed {step['seed']}")
    return ", ".join(parts) or "not stated"


def steps(provenance: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns how a file came about, first step first, as far as its provenance states it.

    Each has `recipe`; `text`, `tokens` and their `sha256`, what it was calibrated or refined on; `seed`; `watch`, the
    text that chose the best state; whether vectors of F32 `changed`; `seconds` and `device`.
    """
    if not provenance:
        return []
    settings, calibration = provenance.get("settings") or {}, provenance.get("calibration") or provenance
    text, is_refined = calibration.get("text") or [], "start_sha256" in provenance
    step = {
        "recipe": str(provenance.get("recipe", "refine" if is_refined else "sqjax")),
        "text": [text] if isinstance(text, str) else list(text),
        "tokens": calibration.get("tokens"),
        "sha256": calibration.get("windows_sha256"),
        "watch": settings.get("watch") if is_refined else None,
        "changed": bool(settings.get("train_vectors") or settings.get("equalize")),
    }
    step |= {key: provenance.get(key) for key in ("seed", "seconds", "device", "peak_memory_bytes")}
    return [*steps(provenance.get("start")), step]
