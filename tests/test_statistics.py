"""Grams against brute force, in any batch order and on any number of devices, through interruptions."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import calibration, spectra, statistics
from sqjax.checkpoint import load_checkpoint
from sqjax.model import Qwen35
from sqjax.run import InputError

DEMO = Path(__file__).parents[1] / "sqjax" / "demo8"


@pytest.fixture(scope="module")
def model():
    checkpoint = load_checkpoint(DEMO)
    return Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)


def windows(count, length=24, seed=0):
    return np.random.default_rng(seed).integers(3, 16000, (count, length)).astype(np.int32)


def accumulate(model, rows, key=0):
    mask = jnp.asarray(rows >= 0, jnp.float32)
    tokens = jnp.asarray(np.maximum(rows, 0))
    return statistics.accumulator()(model, statistics.empty(model), tokens, mask, jax.random.key(key), chunk=32)


def test_grams_are_sums_over_tokens_of_inputs_and_gradients(model):
    rows = windows(2)
    sums = accumulate(model, rows)
    layer, tokens, mask = 1, jnp.asarray(rows), jnp.ones(rows.shape, jnp.float32)
    inputs = {}

    def loss(shifts):
        """The same loss with a shift on every output of one layer: its gradient is each token's own."""
        x = model.embed(tokens)
        for index in range(model.config.num_hidden_layers):

            def probe(name, x, y):
                inputs[name] = x
                return y + shifts.get(name, jnp.zeros(y.shape, y.dtype))

            x = model.block(index)(x, probe if index == layer else None)
        from sqjax.model import rms_norm

        hidden = rms_norm(x, model.output_norm[...], model.config.rms_norm_eps)
        return statistics._sampled_loss(model, hidden, mask, jax.random.key(0), 32)[0], dict(inputs)

    zeros = {name: jnp.zeros((*rows.shape, 256)) for name in ("ssm_out", "ffn_down")}
    zeros["ffn_up"] = jnp.zeros((*rows.shape, model.config.intermediate_size))
    gradients, seen = jax.grad(loss, has_aux=True)(zeros)
    flat = lambda x: np.asarray(x, np.float64).reshape(-1, x.shape[-1])  # noqa: E731
    for name, gradient in gradients.items():
        expected = flat(gradient).T @ flat(gradient)
        got = np.asarray(sums.blocks[layer][name]["output"][0])
        np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
        if name != "ffn_up":
            expected = flat(seen[name]).T @ flat(seen[name])
            np.testing.assert_allclose(
                np.asarray(sums.blocks[layer][name]["input"][0]), expected, atol=1e-5 * np.abs(expected).max()
            )
    assert float(sums.tokens) == rows.size
    counts = np.bincount(rows.reshape(-1), minlength=model.config.vocab_size)
    np.testing.assert_array_equal(np.asarray(sums.lookup_count_V), counts)


def test_projections_of_one_input_share_its_gram(model):
    sums = statistics.empty(model)
    assert all("input" not in block[name] for block in sums.blocks for name in block if name in statistics.SHARED_INPUT)
    assert statistics.input_name("blk.2.ssm_beta.weight") == "blk.2.attn_qkv.weight"


def test_padding_adds_nothing(model):
    rows = windows(2)
    padded = np.concatenate([rows, np.full((2, 8), -1, np.int32)], axis=1)
    plain, with_padding = accumulate(model, rows), accumulate(model, padded)
    assert float(with_padding.tokens) == float(plain.tokens)
    for name in ("attn_qkv", "ffn_down"):
        first, second = (np.asarray(s.blocks[0][name]["input"][0]) for s in (plain, with_padding))
        np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())
    assert np.isfinite(np.asarray(with_padding.lookup_gram_DD)).all()


def test_batch_order_does_not_change_input_grams(model):
    rows = windows(4)
    forward = calibration.collect(model, rows, batch=2)
    backward = calibration.collect(model, rows[::-1].copy(), batch=1)
    for block, other in zip(forward.blocks, backward.blocks):
        for name, kinds in block.items():
            if "input" in kinds:
                got, expected = np.asarray(other[name]["input"]), np.asarray(kinds["input"])
                np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_devices_do_not_change_the_grams(model, tmp_path):
    rows = windows(4)
    np.save(tmp_path / "rows.npy", rows)
    script = f"""
        import jax, numpy as np
        from sqjax import calibration
        from sqjax.checkpoint import load_checkpoint
        from sqjax.model import Qwen35
        assert len(jax.devices()) == 4
        checkpoint = load_checkpoint({str(DEMO)!r})
        model = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)
        sums = calibration.collect(model, np.load("rows.npy"), batch=4)
        np.savez("sums.npz", *jax.tree.leaves(sums))
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(DEMO.parents[1])
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, check=True)
    single = jax.tree.leaves(calibration.collect(model, rows, batch=4))
    with np.load(tmp_path / "sums.npz") as file:
        sharded = [file[name] for name in file.files]
    for got, expected in zip(sharded, single, strict=True):
        expected = np.asarray(expected)
        np.testing.assert_allclose(got, expected, atol=3e-4 * max(np.abs(expected).max(), 1e-9))


def test_an_interrupted_run_ends_with_the_same_bits(model, tmp_path):
    rows, about = windows(6), {"text": "random"}
    run = lambda folder, progress=lambda done, total: None: calibration.calibrate(  # noqa: E731
        model.config, model, rows, folder, about=about, batch=1, save_every=2, save_seconds=0.0, progress=progress
    )

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", stop)
    assert not spectra.files(tmp_path / "broken")
    with pytest.raises(InputError, match="other settings"):
        calibration.calibrate(model.config, model, rows, tmp_path / "broken", about=about, batch=1, seed=9)
    run(tmp_path / "broken")
    run(tmp_path / "whole")
    broken, whole = (spectra.files(tmp_path / name) for name in ("broken", "whole"))
    assert [path.name for path in broken] == [path.name for path in whole] and len(whole) > 1
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(broken, whole))
    loaded, record = calibration.load(tmp_path / "whole")
    assert record["tokens"] == rows.size == loaded.tokens
    calibration.check_model(loaded, model.config)


def test_importance_matrix_round_trip(model, tmp_path):
    rows = windows(2)
    measured = statistics.means(model.config, accumulate(model, rows), rows)
    path = tmp_path / "imatrix.gguf"
    calibration.write_imatrix(path, measured, model.config, "random")
    read = calibration.read_imatrix(path)
    name = "blk.0.ffn_down.weight"
    np.testing.assert_allclose(read[name], np.diagonal(np.asarray(measured.input_gram(name))), rtol=1e-5)
    with pytest.raises(InputError):
        calibration.read_imatrix(__file__)


def test_grams_of_bfloat16_matrices_are_those_of_float32(model):
    rows = windows(4)
    halves = Qwen35.from_tensors(model.config, model.to_tensors(), dtype=jnp.bfloat16)
    exact, narrow = (accumulate(m, rows).blocks for m in (model, halves))
    for kind, bound in (("input", 0.02), ("output", 0.1)):
        pairs = [(a[kind], b[kind]) for p, q in zip(exact, narrow) for a, b in zip(p.values(), q.values()) if kind in a]
        assert max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in pairs) < bound


def test_text_without_tokens_is_an_error(model):
    with pytest.raises(InputError, match="no tokens"):
        statistics.means(model.config, statistics.empty(model), windows(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grams_have_the_precision_of_float32(dtype):
    # Channels of very different scale, as large models have them: what is small must not drown in what is large.
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 2048, 48)) * np.exp2(random.integers(-8, 8, 48))
    rows = jnp.asarray(rows, dtype)
    exact = np.einsum("bti,btj->ij", *(np.asarray(rows, np.float64),) * 2)
    gram = statistics.gram(rows)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert gram.dtype == jnp.float32 and np.max(np.abs(np.asarray(gram, np.float64) - exact) / scale) < 1e-6
