"""Every program of every stage is compiled by the TPU's own compiler, which needs no TPU; nothing here runs on one."""

import importlib.util

import pytest

from sqjax import aot, planning
from sqjax.config import ModelConfig

NANO = planning.MODELS["qwen3.5-0.8b"] | {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1280}
NANO |= {"num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
NANO |= {"linear_num_key_heads": 4, "linear_num_value_heads": 4}
MODELS = {"nano34": NANO, "0.8b": planning.MODELS["qwen3.5-0.8b"]}
# The largest and the most oblong matrices of each.
MATRICES = {"nano34": [(1536, 512), (512, 1280)], "0.8b": [(6144, 1024), (1024, 3584)]}
LENGTHS = {"nano34": 512, "0.8b": 2048}

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs sqjax[tpu-compile]"),
]


def wanted(name: str, devices: int) -> list[dict]:
    """One request for each stage, and for the steps of rounding one for each matrix."""
    sizes = {"batch": devices, "length": LENGTHS[name]}
    settings = sizes | {"accumulate": 1, "dtype": "bf16", "shard": devices}
    stages = [{"stage": stage} | sizes for stage in ("forward", "evaluation", "statistics")]
    stages.append({"stage": "refinement", "settings": settings})
    return [*stages, {"stage": "search", "count": 32768}, *({"stage": "rounding", "shape": s} for s in MATRICES[name])]


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_program_compiles_and_fits(name, topology):
    _, chip, devices = planning.parse(topology)
    config = ModelConfig.from_huggingface(MODELS[name])
    found = list(aot.compiled(config, topology, wanted(name, devices), shard=devices))
    assert [program for program in found if "error" in program] == []
    assert {program["stage"] for program in found} == {"forward", "evaluation", "statistics", "refinement", "rounding"}
    assert len(found) == 5 + 8 * len(MATRICES[name])
    assert all(program["bytes"] <= chip.memory for program in found), found
    # Weights that are shared come over the links, and the gradients of an update go back.
    by_stage = {program["stage"]: program["collectives"] for program in found}
    assert by_stage["forward"].keys() == {"all-gather"}
    assert "all-reduce" in by_stage["refinement"] or "reduce-scatter" in by_stage["refinement"]
