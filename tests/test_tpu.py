"""Every program of every stage is compiled by the TPU's own compiler, which needs no TPU; nothing here runs on one."""

import collections
import importlib.util
import json
from pathlib import Path

import pytest

from sqjax import aot, planning

# What is compiled, and the tokens of its windows.
MODELS = {
    "nano34": (Path(__file__).parent / "data" / "nano34.config.json", 512),
    "0.8b": ("qwen3.5-0.8b", 2048),
}
TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4")

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs sqjax[tpu-compile]"),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_program_compiles_and_fits(name, topology, record_property):
    _, chip, devices = planning.parse(topology)
    model, length = MODELS[name]
    config = planning.read_config(model)
    wanted = aot.every_program(config, devices, length)
    found = list(aot.compiled(config, topology, wanted, shard=devices, least_effort=True))
    # For the tables of experiments/plan.
    record_property("compiled", json.dumps({"model": name, "topology": topology, "programs": found}))
    assert [program for program in found if "error" in program] == []
    by_stage = collections.Counter(program["stage"] for program in found)
    # Rounding: the search, eight steps for each of two matrices, two programs for each of two kinds of block.
    assert by_stage == {"forward": 1, "evaluation": 1, "statistics": 2, "refinement": 4, "rounding": 1 + 16 + 4}
    assert all(program["bytes"] <= chip.memory for program in found), found
    # Weights that are shared come over the links, and the gradients of an update go back.
    by_name = {program["name"]: program["collectives"] for program in found}
    assert by_name["hidden"].keys() == {"all-gather"}
    assert "all-reduce" in by_name["update"] or "reduce-scatter" in by_name["update"]
