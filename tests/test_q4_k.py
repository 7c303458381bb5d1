"""The format against gguf-py and ggml: the same bytes mean the same float32 weights, bit for bit."""

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from sqjax import q4_k
from sqjax.q4_k import Q4K


def random_q4k(seed: int, rows: int = 5, blocks: int = 3) -> Q4K:
    rng = np.random.default_rng(seed)
    lead = (rows, blocks)
    # Any non-negative finite float16, subnormal ones and zero among them.
    d, dmin = (rng.integers(0, 0x7C00, lead).astype(np.uint16).view(np.float16) for _ in range(2))
    scales, mins = (rng.integers(0, 64, (*lead, 8)).astype(np.uint8) for _ in range(2))
    return Q4K(d, dmin, scales, mins, rng.integers(0, 16, (*lead, 8, 32)).astype(np.uint8))


@pytest.mark.parametrize("seed", range(4))
def test_dequantize_is_gguf_py_bit_for_bit(seed):
    q = random_q4k(seed)
    packed = q4_k.pack(q)
    assert packed.shape == (5, 3, 144) and packed.dtype == np.uint8
    expected = gguf_dequantize(packed.reshape(5, -1), GGMLQuantizationType.Q4_K)
    for weight in (q4_k.dequantize(q), jax.jit(q4_k.dequantize)(jax.tree.map(jax.numpy.asarray, q))):
        assert weight.dtype == np.float32 and q.shape == weight.shape
        np.testing.assert_array_equal(np.asarray(weight).view(np.uint32), expected.view(np.uint32))


def test_dequantize_is_ggml_bit_for_bit():
    libgguf = pytest.importorskip("libgguf")
    q = random_q4k(7)
    expected = libgguf.dequantize_rows(q4_k.pack(q).reshape(5, -1), GGMLQuantizationType.Q4_K)
    np.testing.assert_array_equal(q4_k.dequantize(q).view(np.uint32), np.asarray(expected).view(np.uint32))


def test_unpack_and_pack_are_inverse():
    q = random_q4k(1)
    packed = q4_k.pack(q)
    for leaf, again in zip(jax.tree.leaves(q), jax.tree.leaves(q4_k.unpack(packed)), strict=True):
        np.testing.assert_array_equal(leaf, again)
    # Every byte string is a super-block, so the inverse holds from both sides.
    noise = np.random.default_rng(2).integers(0, 256, (4, 2, 144)).astype(np.uint8)
    np.testing.assert_array_equal(q4_k.pack(q4_k.unpack(noise)), noise)


def test_packing_takes_jax_arrays_and_stacks():
    q = random_q4k(3, rows=6)
    stacked = jax.tree.map(lambda a: jax.numpy.asarray(a).reshape(2, 3, *a.shape[1:]), q)
    np.testing.assert_array_equal(q4_k.pack(stacked).reshape(6, 3, 144), q4_k.pack(q))
    np.testing.assert_array_equal(np.asarray(q4_k.dequantize(stacked)).reshape(6, -1), q4_k.dequantize(q))
    assert stacked.shape == (2, 3, 768)


@pytest.mark.parametrize(
    ("leaf", "value"),
    [
        ("d_OS", np.nan),
        ("d_OS", -1.0),
        ("dmin_OS", np.inf),
        ("scales_OSG", 64),
        ("mins_OSG", 64),
        ("codes_OSGN", 16),
    ],
)
def test_valid_finds_one_leaf_out_of_range(leaf, value):
    q = random_q4k(4)
    assert q4_k.valid(q) and q4_k.valid(jax.tree.map(jax.numpy.asarray, q))
    getattr(q, leaf).flat[-1] = value
    assert not q4_k.valid(q)


def test_unpack_refuses_other_block_sizes():
    with pytest.raises(ValueError, match="144 bytes"):
        q4_k.unpack(np.zeros((1, 1, 176), np.uint8))
