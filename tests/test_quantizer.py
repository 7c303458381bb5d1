"""Whole models rounded by recipes: what may change, what may not, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoint

import sqjax
from sqjax import gguf_file, making, quantizer, sources
from sqjax.calibration import collect
from sqjax.checkpoint import load_checkpoint
from sqjax.folding import equalize, refold
from sqjax.model import Qwen35
from sqjax.q4_k import Q4K, valid
from sqjax.quantizer import Recipe, dequantized, matched_target, quantize
from sqjax.run import InputError
from sqjax.statistics import means


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A random model with two value heads a key head, and statistics of random tokens."""
    folder = tmp_path_factory.mktemp("model")
    random_checkpoint.write(folder, **random_checkpoint.RUNNABLE)
    checkpoint = load_checkpoint(folder)
    model = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)
    rows = np.random.default_rng(0).integers(3, checkpoint.config.vocab_size, (4, 96)).astype(np.int32)
    return checkpoint, model, means(checkpoint.config, collect(model, rows, batch=2), rows)


def float_tensors(checkpoint):
    return {name: jnp.asarray(tensor).astype(jnp.float32) for name, tensor in checkpoint.tensors.items()}


def test_equalization_leaves_the_logits_as_they_are(measured):
    checkpoint, model, statistics = measured
    assert checkpoint.config.linear_num_value_heads == 2 * checkpoint.config.linear_num_key_heads
    scaled, _ = equalize(checkpoint.config, float_tensors(checkpoint), statistics, 0.01)
    for name, tensor in float_tensors(checkpoint).items():
        if name.startswith("blk.") and name.endswith("_norm.weight") and "_q_" not in name and "_k_" not in name:
            assert float(jnp.mean(jnp.abs(scaled[name] - tensor))) > 0.01 * float(jnp.mean(jnp.abs(tensor))), name
    tokens = jnp.arange(3, 67)[None]
    before = model.logits(model.hidden(tokens))
    after_model = Qwen35.from_tensors(checkpoint.config, scaled)
    after = after_model.logits(after_model.hidden(tokens))
    np.testing.assert_allclose(np.asarray(after), np.asarray(before), atol=1e-5 * float(jnp.max(jnp.abs(before))))


def test_folded_scales_are_found_again_in_a_file(measured):
    checkpoint, _, statistics = measured
    # Nothing is to be found of a channel whose gain is zero.
    tensors = {name: jnp.where(tensor == 0, 0.5, tensor) for name, tensor in float_tensors(checkpoint).items()}
    scaled, _ = equalize(checkpoint.config, tensors, statistics, 0.01)
    for name, tensor in refold(checkpoint.config, tensors, scaled).items():
        np.testing.assert_allclose(
            tensor, scaled[name], atol=1e-5 * float(jnp.max(jnp.abs(scaled[name]))), err_msg=name
        )


def test_scaled_statistics_are_those_of_the_scaled_model(measured):
    checkpoint, _, statistics = measured
    scaled, predicted = equalize(checkpoint.config, float_tensors(checkpoint), statistics, 0.01)
    model = Qwen35.from_tensors(checkpoint.config, scaled)
    rows = statistics.windows_WT
    again = means(checkpoint.config, collect(model, rows, batch=2), rows)
    for name, expected in again.inputs.items():
        expected = np.asarray(expected)
        np.testing.assert_allclose(np.asarray(predicted.inputs[name]), expected, atol=1e-3 * np.abs(expected).max())


def test_groups_side_by_side_give_the_same_bits_in_order(measured, monkeypatch):
    checkpoint, _, statistics = measured
    solutions, reports = [], []
    for count in (1, 3):
        monkeypatch.setattr(quantizer, "_at_once", lambda count=count: count)
        done = []
        arguments = (checkpoint.config, checkpoint.tensors, statistics, Recipe(steps=("feedback",)))
        solutions.append(quantize(*arguments, lambda number, total, done=done: done.append((number, total))))
        reports.append(done)
    assert reports[0] == reports[1] and list(solutions[0]) == list(solutions[1])
    for one, other in zip(*map(jax.tree.leaves, solutions), strict=True):
        np.testing.assert_array_equal(one, other)


RECIPES = {
    "one-sided": Recipe(steps=("feedback",)),
    "two-sided": Recipe(steps=("search", "two_sided_feedback"), gamma_out=0.5, equalize=True),
    "sequential": Recipe(steps=("search",), sequential=True, sequential_windows=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_writes_a_file_of_the_same_size(measured, name, tmp_path):
    checkpoint, _, statistics = measured
    plain = gguf_file.write_gguf(tmp_path / "plain.gguf", checkpoint, file_type="q4_k")
    tensors = quantize(checkpoint.config, checkpoint.tensors, statistics, RECIPES[name])
    assert all(valid(tensor) for tensor in tensors.values() if isinstance(tensor, Q4K))
    written = jax.tree.map(np.asarray, tensors)
    file = gguf_file.write_gguf(tmp_path / "file.gguf", checkpoint, written, file_type="q4_k")
    assert (file.file_bytes, file.tensor_bytes) == (plain.file_bytes, plain.tensor_bytes)
    assert file.sha256 != plain.sha256
    back = gguf_file.read_gguf(tmp_path / "file.gguf")
    for key, expected in dequantized(tensors).items():
        np.testing.assert_array_equal(np.asarray(back.tensors[key]), np.asarray(expected), err_msg=key)


def test_matched_target_is_the_best_map_of_the_quantized_input():
    key = jax.random.split(jax.random.key(0), 3)
    weight, x, noise = (jax.random.normal(k, shape) for k, shape in zip(key, ((8, 16), (400, 16), (400, 16))))
    student = x + 0.3 * noise
    own, cross = student.T @ student / 400.0, x.T @ student / 400.0
    target = matched_target(weight, own, cross, 0.0)
    best, *_ = np.linalg.lstsq(np.asarray(student, np.float64), np.asarray(x @ weight.T, np.float64), rcond=None)
    np.testing.assert_allclose(np.asarray(target), best.T, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(matched_target(weight, own, own, 0.01)), np.asarray(weight))


def test_rows_that_fill_no_super_block_fall_back(tmp_path, capsys):
    random_checkpoint.write(tmp_path / "model")
    made = sqjax.quantize(tmp_path / "model", tmp_path / "file.gguf", recipe="rtn")
    assert made["types"].get("Q4_K", 0) == 0
    assert "Q5_0" in made["types"]


def test_what_a_recipe_gets_wrong_is_named(tmp_path, measured):
    checkpoint = measured[0]
    with pytest.raises(InputError, match="no step 'polish'"):
        Recipe(steps=("polish",))
    with pytest.raises(InputError, match="starts with"):
        Recipe(steps=("descend_codes",))
    with pytest.raises(InputError, match="no recipe best"):
        making.read_recipe("best")
    with pytest.raises(InputError, match="no setting gama_in"):
        making.read_recipe("gptq", ["gama_in=1"])
    with pytest.raises(InputError, match="gamma_in is 'high'"):
        making.read_recipe("gptq", ["gamma_in=high"])
    assert making.read_recipe("gptq", ["gamma_in=0.5"]).gamma_in == 0.5
    with pytest.raises(InputError, match="needs statistics"):
        quantize(checkpoint.config, checkpoint.tensors, None, RECIPES["one-sided"])
    with pytest.raises(InputError, match="no complete statistics"):
        sqjax.quantize(sources.DEMO_MODEL, tmp_path / "out.gguf", recipe="gptq", statistics=tmp_path)
