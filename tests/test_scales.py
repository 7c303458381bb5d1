"""The scale searches: llama.cpp's own equal ggml's C code, and the better ones are never worse than they are."""

import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from sqjax import q4_k, scales

libgguf = pytest.importorskip("libgguf")
RNG = np.random.default_rng(20)
Q4_K = GGMLQuantizationType.Q4_K


def matrices() -> dict[str, np.ndarray]:
    """Rows that a checkpoint may hold, ordinary and not, two super-blocks long."""
    normal = RNG.standard_normal((40, 512))
    one_sided = np.abs(normal)
    rows = {
        "normal": 0.02 * normal,
        "bfloat16": (0.02 * normal).astype(ml_dtypes.bfloat16),
        "heavy-tailed": 0.02 * RNG.standard_t(2, (40, 512)),
        "one outlier": np.where(RNG.random((40, 512)) < 1 / 200, 3.0, 0.01) * normal,
        "sparse": np.where(RNG.random((40, 512)) < 0.9, 0, 0.02) * normal,
        "positive": one_sided,
        "negative": -one_sided,
        "constant": np.repeat([[0.5], [-0.5], [1.0], [-3.1]], 512, 1),
        "constant sub-blocks": np.repeat(normal[:, ::32], 32, 1),
        "zero": np.zeros((2, 512)),
        "tiny": 1e-7 * normal,
        "vanishing": 1e-20 * normal,
        "large": 30 * normal,
    }
    return {name: np.asarray(matrix, np.float32) for name, matrix in rows.items()}


def packed_by_ggml(weight_OI, importance_I=None) -> np.ndarray:
    rows = libgguf.quantize_rows(np.ascontiguousarray(weight_OI, np.float32), Q4_K, importance_I)
    return np.asarray(rows).reshape(weight_OI.shape[0], -1, q4_k.BLOCK_BYTES)


def error(q, weight_OI, importance_I=1.0) -> float:
    return float((importance_I * (q4_k.dequantize(q).astype(np.float64) - weight_OI) ** 2).sum())


@pytest.mark.parametrize(("name", "weight_OI"), matrices().items())
def test_round_to_nearest_writes_the_bytes_of_ggml(name, weight_OI):
    q = scales.round_to_nearest(weight_OI)
    assert q4_k.valid(q)
    np.testing.assert_array_equal(q4_k.pack(q), packed_by_ggml(weight_OI))


@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(("name", "weight_OI"), matrices().items())
def test_round_with_importance_writes_the_bytes_of_ggml(name, weight_OI, spread):
    importance_I = np.random.default_rng(5).lognormal(0, spread, weight_OI.shape[1]).astype(np.float32)
    q = scales.round_with_importance(weight_OI, importance_I)
    assert q4_k.valid(q)
    np.testing.assert_array_equal(q4_k.pack(q), packed_by_ggml(weight_OI, importance_I))


def test_importance_lowers_the_error_that_it_weighs():
    weight_OI = matrices()["heavy-tailed"]
    importance_I = RNG.lognormal(0, 2, 512).astype(np.float32)
    plain, weighed = scales.round_to_nearest(weight_OI), scales.round_with_importance(weight_OI, importance_I)
    assert error(weighed, weight_OI, importance_I) < 0.95 * error(plain, weight_OI, importance_I)
    assert error(weighed, weight_OI) > error(plain, weight_OI)


def test_more_super_blocks_than_a_chunk_and_any_kind_of_array(monkeypatch):
    weight_OI = RNG.standard_normal((7, 3 * 256)).astype(ml_dtypes.bfloat16)
    whole = scales.round_to_nearest(weight_OI)
    monkeypatch.setattr(scales, "CHUNK", 4)
    for again in (scales.round_to_nearest(weight_OI), scales.round_to_nearest(jax.numpy.asarray(weight_OI))):
        jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert whole.shape == weight_OI.shape


@pytest.mark.parametrize("outlier", [1e30, 3e38])
def test_weights_beyond_the_reach_of_float16_still_make_a_readable_file(outlier):
    weight_OI = np.full((1, 256), 0.1, np.float32)
    weight_OI[0, 7] = outlier
    weight_OI[0, 9] = -outlier / 2
    assert q4_k.valid(scales.round_to_nearest(weight_OI))
    assert q4_k.valid(scales.round_with_importance(weight_OI, np.ones(256, np.float32)))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="256"):
        scales.round_to_nearest(np.zeros((2, 300), np.float32))
    with pytest.raises(ValueError, match="importance of shape"):
        scales.round_with_importance(np.zeros((2, 256), np.float32), np.ones(512, np.float32))


def test_q5_0_writes_the_bytes_of_ggml():
    weight_OI = RNG.standard_normal((6, 96)).astype(np.float32)
    expected = libgguf.quantize_rows(weight_OI, GGMLQuantizationType.Q5_0)
    np.testing.assert_array_equal(scales.round_q5_0(weight_OI), np.asarray(expected).reshape(6, -1))


IMPORTANCES = {
    "none": lambda shape: np.ones(shape[1], np.float32),
    "spread": lambda shape: RNG.lognormal(0, 2, shape[1]).astype(np.float32),
    "by weight": lambda shape: RNG.lognormal(0, 1, shape).astype(np.float32),
    "mostly zero": lambda shape: (RNG.random(shape[1]) < 0.2).astype(np.float32) * 1e6,
    "zero": lambda shape: np.zeros(shape[1], np.float32),
}


def block_errors(q, weight_OI, importance) -> np.ndarray:
    """Weighted squared error of every super-block, in float64."""
    difference_OI = np.asarray(q4_k.dequantize(q), np.float64) - weight_OI
    return (importance * difference_OI**2).reshape(-1, 256).sum(1)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(("name", "weight_OI"), matrices().items())
def test_search_is_never_worse_than_llama_cpp(name, weight_OI, importance):
    importance = IMPORTANCES[importance](weight_OI.shape)
    q = scales.search(weight_OI, importance)
    assert q4_k.valid(q) and q.shape == weight_OI.shape
    if importance.ndim == 1:
        theirs = scales.round_with_importance(weight_OI, importance)
    else:
        rows = [scales.round_with_importance(weight_OI[o : o + 1], importance[o]) for o in range(len(weight_OI))]
        theirs = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    before, after = block_errors(theirs, weight_OI, importance), block_errors(q, weight_OI, importance)
    assert np.all(after <= before * (1 + 1e-5))
    if name in ("normal", "bfloat16", "heavy-tailed") and before.sum() > 0:
        assert after.sum() < 0.97 * before.sum()
    # The codes are the nearest ones: the grid alone is the result.
    nearest = q4_k.dequantize(q4_k.Q4K(*jax.tree.leaves(q)[:4], np.asarray(q4_k.nearest_codes(weight_OI, q))))
    np.testing.assert_allclose(
        block_errors(q, weight_OI, 1), ((nearest - weight_OI) ** 2).reshape(-1, 256).sum(1), 1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_search_comes_close_to_brute_force_over_steps_and_offsets(seed):
    """With one sub-block that is not zero, d and dmin are free and so are its step and offset."""
    rng = np.random.default_rng(seed)
    weight_N, importance_N = rng.standard_normal(32), rng.lognormal(0, 1, 32)
    weight_OI, importance_I = np.zeros((1, 256), np.float32), np.ones(256, np.float32)
    weight_OI[0, 64:96], importance_I[64:96] = weight_N, importance_N
    span = np.ptp(weight_N)
    step, offset = np.meshgrid(np.linspace(0.6, 1.2, 240) * span / 15, np.linspace(0, -weight_N.min() * 1.2, 240))
    step, offset = step[..., None], offset[..., None]
    brute_N = step * np.clip(np.rint((weight_N + offset) / step), 0, 15) - offset - weight_N
    least = (importance_N * brute_N**2).sum(-1).min()
    assert error(scales.search(weight_OI, importance_I), weight_OI, importance_I) < 1.05 * least


@pytest.mark.parametrize("power", [-80, 100])
def test_only_ratios_of_the_importance_matter(power):
    weight_OI, importance_I = matrices()["normal"], RNG.lognormal(0, 1, 512).astype(np.float32)
    for function in (scales.round_with_importance, scales.search):
        q, scaled = function(weight_OI, importance_I), function(weight_OI, np.ldexp(importance_I, power))
        jax.tree.map(np.testing.assert_array_equal, q, scaled)


@pytest.mark.skipif("SQJAX_REFERENCE" not in os.environ, reason="SQJAX_REFERENCE does not say where nano34 lies")
def test_every_matrix_of_a_trained_model_equals_ggml():
    from safetensors import safe_open

    for path in sorted(Path(os.environ["SQJAX_REFERENCE"], "nano34").glob("*.safetensors")):
        with safe_open(path, "flax") as file:
            for name in sorted(file.keys()):
                weight_OI = np.asarray(file.get_tensor(name))
                if weight_OI.ndim == 2:
                    packed = q4_k.pack(scales.round_to_nearest(weight_OI))
                    np.testing.assert_array_equal(packed, packed_by_ggml(weight_OI), err_msg=name)
