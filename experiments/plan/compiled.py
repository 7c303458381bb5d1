"""Writes tables of what the TPU's own compiler, which needs no TPU, says of every program of a model.

python experiments/plan/compiled.py --read runs/tpu.xml               # of what `make tpu` compiled
python experiments/plan/compiled.py qwen3.5-0.8b --full-effort [--stages refinement] [--topologies v5e:2x4]

Compiling needs sqjax[tpu-compile]. What comes of each program goes to standard error at once, the table to standard
output at the end.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sqjax import aot, planning

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4")
SHORT = {"all-gather": "ag", "all-reduce": "ar", "reduce-scatter": "rs", "all-to-all": "aa", "collective-permute": "cp"}

# Topology -> what `aot.compiled` says of its programs.
Found = dict[str, list[dict[str, Any]]]


def compile_all(arguments: argparse.Namespace) -> Found:
    """Compiles what the command line names."""
    config, found = planning.read_config(arguments.model), {}
    for topology in arguments.topologies:
        devices = planning.parse(topology)[2]
        wanted = aot.every_program(config, devices, arguments.length)
        wanted = [each for each in wanted if not arguments.stages or each["stage"] in arguments.stages]
        effort = {"least_effort": not arguments.full_effort}
        for facts in aot.compiled(config, topology, wanted, shard=devices, **effort):
            print(topology, json.dumps(facts), file=sys.stderr, flush=True)
            found.setdefault(topology, []).append(facts)
    return found


def read(path: Path) -> Iterator[tuple[str, Found]]:
    """Yields the models of pytest's report and what was found of them."""
    cases = [json.loads(each.get("value")) for each in ElementTree.parse(path).iter("property")]
    for model in dict.fromkeys(case["model"] for case in cases):
        yield model, {case["topology"]: case["programs"] for case in cases if case["model"] == model}


def cell(facts: dict[str, Any]) -> str:
    """MB a device, collectives, CPU seconds; or what the compiler said."""
    if "error" in facts:
        return f"**{facts['error'][:60]}**"
    collectives = " ".join(f"{count} {SHORT[name]}" for name, count in sorted(facts["collectives"].items()))
    return ", ".join(filter(None, (f"{facts['bytes'] / 1e6:.1f}", collectives, f"{facts['cpu_seconds']:.1f} s")))


def table(found: Found) -> str:
    """A row for each program, a column for each topology, and the sums of seconds."""
    topologies = [topology for topology in TOPOLOGIES if topology in found] or list(found)
    rows: dict[str, dict[str, str]] = {}
    for topology in topologies:
        for facts in found[topology]:
            rows.setdefault(f"{facts['stage']}: {facts['name']}", {})[topology] = cell(facts)
    lines = [["program", *topologies], ["---"] * (len(topologies) + 1)]
    lines += [[name, *(cells.get(topology, "") for topology in topologies)] for name, cells in rows.items()]
    total = lambda topology, clock: f"{sum(facts[clock] for facts in found[topology]):.0f} s"  # noqa: E731
    for name, clock in (("all: CPU", "cpu_seconds"), ("all: wall", "seconds")):
        lines.append([name, *(total(topology, clock) for topology in topologies)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="name, config.json or whatever else sqjax plan reads")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--stages", nargs="+", help="of aot.every_program, all unless given")
    parser.add_argument("--full-effort", action="store_true", help="compile as a run on TPUs would")
    parser.add_argument("--read", type=Path, help="pytest's report; compiles nothing")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.read is None):
        parser.error("give a model, or --read and a report")
    results = read(arguments.read) if arguments.read else [(arguments.model, compile_all(arguments))]
    for model, found in results:
        print(f"\n**{model}**\n\n{table(found)}")


if __name__ == "__main__":
    main()
