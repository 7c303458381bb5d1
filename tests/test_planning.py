"""The plan counts what the programs really hold, and knows what it does not know."""

import functools
import math

import jax
import pytest

from sqjax import model, planning, programs, sources, statistics
from sqjax.config import ModelConfig
from sqjax.run import InputError

CONFIGS = {name: ModelConfig.from_huggingface(config) for name, config in planning.MODELS.items()}
SMALL = CONFIGS["qwen3.5-0.8b"]


def bytes_of(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_named_models_have_their_released_numbers_of_weights():
    # The 0.8B's follows from the released file's bytes; the others' are what their names and cards say.
    assert planning.sizes_of(SMALL).weights == 751_894_528
    billions = {name: planning.sizes_of(config).weights / 1e9 for name, config in CONFIGS.items()}
    assert billions["qwen3.5-9b"] == pytest.approx(8.95, abs=0.01)
    assert billions["qwen3.5-27b"] == pytest.approx(26.9, abs=0.1)


def test_grams_are_counted_as_they_are_allocated():
    sums = jax.eval_shape(statistics.empty, model.abstract(SMALL))
    assert bytes_of(sums.blocks) == 4 * sum(statistics.gram_sizes(SMALL).values())
    for passes in (2, 3):
        dealt = statistics.parts(SMALL, passes)
        assert sorted(sum(dealt, ())) == sorted(statistics.PROJECTIONS)
        part = functools.partial(statistics.empty, names=dealt[0])
        largest = bytes_of(jax.eval_shape(part, model.abstract(SMALL)).blocks)
        assert largest == 4 * planning._largest(SMALL, "statistics", passes) < bytes_of(sums.blocks)


def test_the_state_of_refinement_is_within_what_is_planned():
    start = programs.abstract_start(SMALL)
    student = jax.eval_shape(programs.initial, start)
    teacher = model.abstract(SMALL, "bfloat16")
    held = bytes_of(start) + 3 * bytes_of(student) + bytes_of(teacher)
    assert held < planning.need(SMALL, "refinement", 2048, 1).size(2048) < 3 * held


@pytest.mark.parametrize("stage", ["forward", "evaluation", "statistics", "refinement"])
def test_sharing_and_smaller_chunks_need_less(stage):
    grams = planning._largest(SMALL, stage, 1)
    sizes = [planning.need(CONFIGS["qwen3.5-27b"], stage, 2048, shard, grams).size(2048) for shard in (2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    full, small = (planning.need(SMALL, stage, 2048, 1, grams, chunk).size(2048) for chunk in (1024, 256))
    assert small <= full


def test_what_is_said_to_fit_fits_and_what_does_not_says_from_where():
    for topology in planning.TOPOLOGIES:
        _, chip, devices = planning.parse(topology)
        for row in planning.stages(CONFIGS["qwen3.5-27b"], topology):
            if row["fits"]:
                assert row["bytes"] <= chip.memory and devices % row["shard"] == 0
                assert row["seconds"] > 0
            elif row.get("needs"):
                kind = topology.partition(":")[0]
                more = planning.stages(CONFIGS["qwen3.5-27b"], f"{kind}:{row['needs']}")
                assert next(r for r in more if r["stage"] == row["stage"])["fits"]


@pytest.mark.parametrize("topology", ["v5e", "a100:8", "v5e:2xx", "h100:0"])
def test_unknown_topologies_are_refused(topology):
    with pytest.raises(InputError, match="is no topology"):
        planning.parse(topology)


def test_a_plan_reads_a_config(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        planning.plan(tmp_path / "config.json")
    result = planning.plan(str(sources.DEMO_MODEL / "config.json"), topology="v5e:2x2")
    assert all(row["fits"] for row in result["plans"]["v5e:2x2"])
