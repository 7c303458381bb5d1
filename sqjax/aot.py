"""Compiles programs for TPUs that are not there, by the real compiler: the package libtpu, on any machine.

    python -m sqjax.aot '{"topology": "v5e:2x4", "devices": 8, "shard": 1, "config": {...}, "programs": [...]}'

One process serves one topology, hence a process of its own. For each program a JSON line: what a device holds, how many
operations and bytes the compiler counts, which collectives it chose, how long it took; or what went wrong.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqjax.config import ModelConfig
from sqjax.run import InputError

_COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def is_available() -> bool:
    """Whether the TPU's compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compiled(
    config: ModelConfig,
    topology: str,
    programs: Sequence[Mapping[str, Any]],
    *,
    devices: int = 0,
    shard: int = 1,
) -> Iterator[dict[str, Any]]:
    """Compiles programs for a topology such as v5e:2x4, in a process of its own, and says what came of each.

    Args:
      programs: each has `stage` and that stage's sizes; see `requested`.
      devices: of the topology; all unless given.
      shard: devices that share one copy of the parameters.

    Raises:
      InputError: the compiler is not installed, or does not know the topology.
    """
    if not is_available():
        raise InputError("the TPU's compiler is not installed; install sqjax[tpu-compile]")
    request = {"topology": topology, "devices": devices, "shard": shard, "programs": list(programs)}
    request["config"] = dataclasses.asdict(config)
    # JAX reads these when it is imported; on TPU virtual machines it must not take the chips.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    command = [sys.executable, "-m", "sqjax.aot", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in process.stdout:
                yield json.loads(line)
        except BaseException:
            # Whoever asked has stopped listening.
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            last = errors.read().strip().split("\n")[-1]
            raise InputError(f"the compiler for {topology} failed: {last[:300]}")


def requested(config: ModelConfig, mesh: Any, wanted: Mapping[str, Any]) -> Iterator[Any]:
    """Makes the programs that one entry of a request names.

    Stages and their sizes: forward (batch, length), evaluation (batch, length, chunk), statistics (batch, length,
    names), refinement (settings), rounding (shape, count), search (count).
    """
    from sqjax import programs
    from sqjax.refinement import Refinement

    sizes = dict(wanted)
    stage = sizes.pop("stage")
    if stage == "refinement":
        yield programs.update(config, mesh, Refinement(**sizes["settings"]))
    elif stage == "rounding":
        yield from programs.matrix_steps(mesh, tuple(sizes["shape"]), sizes.get("count", 1))
    elif stage == "search":
        yield programs.search(mesh, sizes["count"])
    else:
        make = {"forward": programs.forward, "evaluation": programs.score, "statistics": programs.accumulate}[stage]
        yield make(config, mesh, **sizes)


def facts(program: Any) -> dict[str, Any]:
    """Compiles a program; returns bytes a device, operations, bytes moved, collectives and seconds, or the error."""
    result = {"stage": program.stage, "name": program.name}
    start = time.monotonic()
    try:
        executable = program.compile()
    except Exception as error:  # what the compiler refuses is a finding, not a failure of this process
        return result | {"seconds": time.monotonic() - start, "error": f"{type(error).__name__}: {error}"[:1000]}
    memory, cost = executable.memory_analysis(), executable.cost_analysis() or {}
    parts = {part: getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")}
    found = collections.Counter(match[1] for match in _COLLECTIVE.finditer(executable.as_text()))
    return result | {
        "seconds": time.monotonic() - start,
        "bytes": parts["argument"] + parts["output"] - parts["alias"] + parts["temp"],
        **{f"{part}_bytes": size for part, size in parts.items()},
        # The compiler counts the body of a loop once: a figure to compare programs by, no total.
        "flops_of_one_pass": cost.get("flops"),
        "collectives": dict(found),
    }


def _main(text: str) -> None:
    import jax
    from jax.experimental import topologies

    from sqjax import mesh as meshes

    request = json.loads(text)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in request["config"].items()}
    config = ModelConfig(**values)
    found = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices
    mesh = meshes.create(request["shard"], found[: request["devices"] or len(found)])
    for wanted in request["programs"]:
        for program in requested(config, mesh, wanted):
            print(json.dumps(facts(program)), flush=True)
            # Executables of the real size are large, and none of them is run.
            jax.clear_caches()


if __name__ == "__main__":
    _main(sys.argv[1])
