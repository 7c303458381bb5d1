"""Q4_K, the 4.5-bit format of GGUF: 256 weights in 144 bytes, and what they stand for.

Let O denote output features, I input features, S super-blocks in a row (I / 256), G sub-blocks in a super-block (8),
N weights in a sub-block (32) and B the bytes of a packed super-block (144).

Source: `block_q4_K` in ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Float32, UInt8

SUPER_BLOCK = 256
SUB_BLOCK = 32
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
BLOCK_BYTES = 144
MAX_SCALE = 63
MAX_CODE = 15


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q4K:
    """A matrix in Q4_K, unpacked; for every super-block s, sub-block g and weight n of an output feature o

        weight[o, 256 s + 32 g + n] = d[o, s] scales[o, s, g] codes[o, s, g, n] - dmin[o, s] mins[o, s, g].

    Leaves are all numpy or all JAX arrays. Further leading axes (a stack of layers) are allowed everywhere.

    Attributes:
      d_OS: step of the scales, non-negative and finite.
      dmin_OS: step of the mins, non-negative and finite.
      scales_OSG: 0..63.
      mins_OSG: 0..63.
      codes_OSGN: 0..15.
    """

    d_OS: Float16[Array | np.ndarray, "*O S"]
    dmin_OS: Float16[Array | np.ndarray, "*O S"]
    scales_OSG: UInt8[Array | np.ndarray, "*O S 8"]
    mins_OSG: UInt8[Array | np.ndarray, "*O S 8"]
    codes_OSGN: UInt8[Array | np.ndarray, "*O S 8 32"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that the codes stand for."""
        return (*self.d_OS.shape[:-1], self.d_OS.shape[-1] * SUPER_BLOCK)


def steps(q: Q4K) -> tuple[Float32[Array, "*O S 8"], Float32[Array, "*O S 8"]]:
    """Returns the quantization step d * scale and the offset dmin * min of every sub-block, both exact in float32."""
    xp = np if isinstance(q.d_OS, np.ndarray) else jnp
    d_OS1, dmin_OS1 = (a.astype(xp.float32)[..., None] for a in (q.d_OS, q.dmin_OS))
    return d_OS1 * q.scales_OSG.astype(xp.float32), dmin_OS1 * q.mins_OSG.astype(xp.float32)


def dequantize(q: Q4K) -> Float32[Array, "*O I"]:
    """Returns the weights that the codes stand for, in float32, bit for bit those of ggml.

    Both products have at most 11 + 6 + 4 significant bits and are exact, so that the subtraction is the only rounding
    and a compiler that fuses it with the multiplication changes nothing.
    """
    step_OSG, offset_OSG = steps(q)
    weight_OSGN = step_OSG[..., None] * q.codes_OSGN.astype(step_OSG.dtype) - offset_OSG[..., None]
    return weight_OSGN.reshape(q.shape)


def nearest_codes(weight_OI: Float[Array, "*O I"], q: Q4K) -> UInt8[Array, "*O S 8 32"]:
    """Returns the codes that come nearest to the weights on the grid of `q`, whose own codes are not read.

    Where the step is zero every code means the same weight, and the code is zero.
    """
    step_OSG1, offset_OSG1 = (jnp.asarray(a)[..., None] for a in steps(q))
    weight_OSGN = jnp.asarray(weight_OI).astype(jnp.float32).reshape(*q.scales_OSG.shape, SUB_BLOCK)
    codes_OSGN = (weight_OSGN + offset_OSG1) / jnp.where(step_OSG1 > 0, step_OSG1, jnp.inf)
    return jnp.clip(jnp.round(codes_OSGN), 0, MAX_CODE).astype(jnp.uint8)


def valid(q: Q4K) -> bool:
    """Whether every leaf is in the range that the format can hold and that llama.cpp's own quantizer emits."""
    steps_valid = all(
        bool(np.all(np.isfinite(a) & (a >= 0))) for a in (np.asarray(q.d_OS), np.asarray(q.dmin_OS)) if a.size
    )
    sixes_valid = all(int(a.max(initial=0)) <= MAX_SCALE for a in (np.asarray(q.scales_OSG), np.asarray(q.mins_OSG)))
    return steps_valid and sixes_valid and int(np.asarray(q.codes_OSGN).max(initial=0)) <= MAX_CODE


# A packed super-block, little-endian. Upper case is a scale's low and high bits, lower case a min's; a..h are g = 0..7.
#
#   byte   0..1     d, float16
#          2..3     dmin, float16
#          4..7     EEAAAAAA FFBBBBBB GGCCCCCC HHDDDDDD    scales 0..3, and the high two bits of scales 4..7
#          8..11    eeaaaaaa ffbbbbbb ggcccccc hhdddddd    mins 0..3, and the high two bits of mins 4..7
#         12..15    eeeeEEEE ffffFFFF ggggGGGG hhhhHHHH    the low four bits of mins and scales 4..7
#         16..143   four runs of 32 bytes; byte n of run r holds
#                   code n of sub-block 2r in its low four bits and of sub-block 2r + 1 in its high four


def pack(q: Q4K) -> UInt8[np.ndarray, "*O S 144"]:
    """Returns the bytes that a GGUF file holds, on the host."""
    lead = q.d_OS.shape
    d, dmin = (np.ascontiguousarray(np.asarray(a), "<f2")[..., None].view(np.uint8) for a in (q.d_OS, q.dmin_OS))
    scales, mins = np.asarray(q.scales_OSG), np.asarray(q.mins_OSG)
    low_scales, high_scales, low_mins, high_mins = scales[..., :4], scales[..., 4:], mins[..., :4], mins[..., 4:]
    codes = np.asarray(q.codes_OSGN).reshape(*lead, 4, 2, SUB_BLOCK)
    return np.concatenate(
        [
            d,
            dmin,
            low_scales | (high_scales >> 4 << 6),
            low_mins | (high_mins >> 4 << 6),
            (high_scales & 15) | (high_mins << 4),
            (codes[..., 0, :] | (codes[..., 1, :] << 4)).reshape(*lead, SUPER_BLOCK // 2),
        ],
        axis=-1,
        dtype=np.uint8,
    )


def unpack(packed_OSB: UInt8[np.ndarray, "*O S 144"]) -> Q4K:
    """Returns the leaves, as numpy arrays, of the bytes that a GGUF file holds.

    Raises:
      ValueError: the last axis is not the 144 bytes of a super-block.
    """
    if packed_OSB.shape[-1] != BLOCK_BYTES:
        raise ValueError(f"a Q4_K super-block has {BLOCK_BYTES} bytes, not {packed_OSB.shape[-1]}")
    lead = packed_OSB.shape[:-1]
    d, dmin = (np.ascontiguousarray(packed_OSB[..., i : i + 2]).view("<f2")[..., 0] for i in (0, 2))
    scale_byte, min_byte, mixed = (packed_OSB[..., i : i + 4] for i in (4, 8, 12))
    runs = packed_OSB[..., 16:].reshape(*lead, 4, 1, SUB_BLOCK)
    return Q4K(
        d_OS=d,
        dmin_OS=dmin,
        scales_OSG=np.concatenate([scale_byte & 63, (mixed & 15) | (scale_byte >> 6 << 4)], axis=-1),
        mins_OSG=np.concatenate([min_byte & 63, (mixed >> 4) | (min_byte >> 6 << 4)], axis=-1),
        codes_OSGN=np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*lead, SUB_BLOCKS, SUB_BLOCK),
    )
