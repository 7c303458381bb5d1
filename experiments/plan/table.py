"""Writes the tables of README.md: what each stage of each model needs on each kind of device.

python experiments/plan/table.py [--models qwen3.5-0.8b ...] [--compile]
"""

import argparse

import sqjax
from sqjax import planning

STAGES = ("forward", "evaluation", "statistics", "rounding", "refinement")


def cell(row: dict) -> str:
    """GB a device, how it is shared, windows a step, least time; or from how many devices it would fit."""
    source = "*" if row["source"] == "compiler" else ""
    size = f"{row['bytes'] / 1e9:.1f}{source}"
    if not row["fits"]:
        return f"{size}, **no**" + (f" (from {row['needs']})" if row.get("needs") else "")
    shared = f"/{row['shard']}" if row["shard"] > 1 else ""
    windows = f", {row['batch']}w" if row.get("batch") else ""
    passes = f", {row['passes']} passes" if row.get("passes", 1) > 1 else ""
    passes += f", chunk {row['chunk']}" if row.get("chunk", 1024) != 1024 and row["stage"] != "evaluation" else ""
    return f"{size}{shared}{windows}{passes}, {_time(row['seconds'])}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(planning.MODELS))
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    for model in arguments.models:
        result = sqjax.plan(model, compile=arguments.compile)
        print(f"\n**{model}**, {result['parameters'] / 1e9:.2f} billion weights in matrices\n")
        print("| | " + " | ".join(STAGES) + " |\n|" + "---|" * (len(STAGES) + 1))
        for topology, rows in result["plans"].items():
            by_stage = {row["stage"]: row for row in rows}
            print(f"| {topology} | " + " | ".join(cell(by_stage[stage]) for stage in STAGES) + " |")


if __name__ == "__main__":
    main()
