"""What a study found: settings ranked over seeds, and which of them no other one is better than in every way."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqjax.run import atomic_path

Record = Mapping[str, Any]


def ranking(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Joins trials that differ in their seed alone, and orders settings by the mean of their objectives.

    Each has `settings`, `values` and `ratio` (means over seeds; KL divergence over that of plain rounding), `spread`
    (half the range of the values over seeds), `seeds`, `trials` and `on_front`: whether no other setting is better in
    all objectives. A point that a sampler drew twice counts once.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["state"] == "complete" and "same_as" not in record:
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
        row["on_front"] = len(row["trials"]) == most and not any(dominates(other, row["values"]) for other in others)
    return rows


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first is nowhere larger, and somewhere smaller."""
    pairs = list(zip(first, second))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def short_names(rows: Sequence[Record]) -> dict[str, str]:
    """Returns the searched settings with the last part of their dotted names, where that tells them apart."""
    names = list(rows[0]["settings"])
    last = [name.split(".")[-1] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last)}


def shown(value: Any) -> str:
    """Returns a setting as a reader wants it: a drawn number to six digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


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
