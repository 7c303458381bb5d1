"""Compiles programs for TPUs that are not there, by the real compiler: the package libtpu, on any machine.

    python -m sqjax.aot '{"topology": "v5e:2x4", "devices": 8, "shard": 1, "least_effort": true, "config": {...},
                         "programs": [...]}'

One process serves one topology, hence a process of its own. For each program a JSON line: what a device holds, how many
operations and bytes the compiler counts, which collectives it chose, how long it took; or what went wrong.

The compiler's least effort gives an executable all the same, some four times sooner, but a slower one whose temporaries
take other room, mostly more: it shows that a program compiles and fits, not what it needs at its best.
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

from sqjax.config import ModelConfig, is_matrix
from sqjax.run import InputError

_COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
# XLA's OptimizationLevel O0, by number because the option takes no name.
_LEAST_EFFORT = {"optimization_level": 9}


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
    least_effort: bool = False,
) -> Iterator[dict[str, Any]]:
    """Compiles programs for a topology such as v5e:2x4, in a process of its own, and says what came of each.

    Args:
      programs: each has `stage` and that stage's sizes; see `requested`.
      devices: of the topology; all unless given.
      shard: devices that share one copy of the parameters.
      least_effort: compile soon, not well.

    Raises:
      InputError: the compiler is not installed, or does not know the topology.
    """
    if not is_available():
        raise InputError("the TPU's compiler is not installed; install sqjax[tpu-compile]")
    request = {"topology": topology, "devices": devices, "shard": shard, "programs": list(programs)}
    request |= {"config": dataclasses.asdict(config), "least_effort": least_effort}
    # JAX reads these when it is imported; on TPU virtual machines it must not take the chips. As it takes none, several
    # processes may have the library loaded.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "sqjax.aot", json.dumps(request)]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            try:
                for line in process.stdout:
                    yield json.loads(line)
            except BaseException:
                # Whoever asked has stopped listening.
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().split("\n")[-1]
            raise InputError(f"the compiler for {topology} failed: {last[:300]}")


def every_program(config: ModelConfig, devices: int, length: int) -> list[dict[str, Any]]:
    """Requests all programs of all stages, with a window a device and everything shared by all devices.

    The steps of rounding are requested for the matrix with most rows and the one with most columns.
    """
    sizes = {"batch": devices, "length": length}
    settings = sizes | {"accumulate": 1, "dtype": "bf16", "shard": devices}
    shapes = {s for name, s in config.tensor_shapes().items() if name.startswith("blk.") and is_matrix(name, s)}
    # Of two with as many rows, the larger.
    largest = [max(shapes, key=lambda shape: (shape[axis], shape[1 - axis])) for axis in (0, 1)]
    return [
        *({"stage": stage} | sizes for stage in ("forward", "evaluation", "statistics")),
        {"stage": "refinement", "settings": settings},
        {"stage": "search", "count": 4096 * devices},
        *({"stage": "rounding", "shape": shape} for shape in largest),
        {"stage": "sequential"} | sizes,
    ]


def requested(config: ModelConfig, mesh: Any, wanted: Mapping[str, Any]) -> Iterator[Any]:
    """Makes the programs that one entry of a request names.

    Stages and their sizes: forward (batch, length), evaluation (batch, length, chunk), statistics (batch, length,
    names), refinement (settings), rounding (shape, count), search (count), sequential (batch, length).
    """
    from sqjax import programs
    from sqjax.refinement import Refinement

    sizes = dict(wanted)
    stage = sizes.pop("stage")
    if stage == "refinement":
        yield from programs.refinement(
            config, mesh, Refinement(**{"remat": "blocks", "chunk": 1024} | sizes["settings"])
        )
    elif stage == "rounding":
        yield from programs.matrix_steps(mesh, tuple(sizes["shape"]), sizes.get("count", 1))
    elif stage == "search":
        yield programs.search(mesh, sizes["count"])
    elif stage == "sequential":
        yield from programs.sequential(config, mesh, **sizes)
    elif stage == "statistics":
        yield from programs.statistics_of(config, mesh, **sizes)
    else:
        yield {"forward": programs.forward, "evaluation": programs.score}[stage](config, mesh, **sizes)


def facts(program: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Compiles a program; returns bytes a device, operations, collectives and seconds, or the error."""
    result = {"stage": program.stage, "name": program.name}
    clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
    start = {name: clock() for name, clock in clocks.items()}
    taken = lambda: {name: clock() - start[name] for name, clock in clocks.items()}  # noqa: E731
    try:
        executable = program.compile(options)
        memory, cost, text = executable.memory_analysis(), executable.cost_analysis() or {}, executable.as_text()
    except Exception as error:  # what the compiler refuses is a finding, not a failure of this process
        return result | taken() | {"error": f"{type(error).__name__}: {error}"[:1000]}
    parts = {part: getattr(memory, f"{part}_size_in_bytes") for part in ("argument", "output", "alias", "temp")}
    return result | {
        **taken(),
        "bytes": parts["argument"] + parts["output"] - parts["alias"] + parts["temp"],
        **{f"{part}_bytes": size for part, size in parts.items()},
        # The compiler counts the body of a loop once: a figure to compare programs by, no total.
        "flops_of_one_pass": cost.get("flops"),
        "collectives": dict(collections.Counter(match[1] for match in _COLLECTIVE.finditer(text))),
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
            print(json.dumps(facts(program, _LEAST_EFFORT if request["least_effort"] else None)), flush=True)
            # Executables of the real size are large, and none of them is run.
            jax.clear_caches()


if __name__ == "__main__":
    _main(sys.argv[1])
