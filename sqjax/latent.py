"""Continuous stand-ins for a quantized matrix, whose forward value is what the file holds.

Letters: O out features, I in features, S super-blocks in a row, G sub-blocks in a super-block, N weights in one.

Latent values lie near the integers that rounding chose, u near a code:

    weight = fp16(d (1 + a)) round(s) round(u) - fp16(dmin (1 + b)) round(m).

The forward pass uses the rounded values, those of the file; gradients pass through the rounding as if it were not
there. A move of a scale thus moves values and flips no code. Codes may be soft: round(u) is then a stair whose steps
have a slope, at a high temperature nearly u itself.

References:
  Gong et al., Differentiable Soft Quantization, 2019. https://arxiv.org/abs/1908.05033
  Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013 (straight-through).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from sqjax.q4_k import MAX_CODE, MAX_SCALE, Q4K, SUB_BLOCK, steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latent:
    """Continuous stand-ins for the leaves of a Q4K, each in units of one step of its own grid, or of its own size.

    Attributes:
      codes_OI: near the integers 0..15.
      scales_OSG, mins_OSG: near the integers 0..63.
      d_OS, dmin_OS: relative changes of the starting d and dmin.
    """

    codes_OI: Float32[Array, "*O I"]
    scales_OSG: Float32[Array, "*O S 8"]
    mins_OSG: Float32[Array, "*O S 8"]
    d_OS: Float32[Array, "*O S"]
    dmin_OS: Float32[Array, "*O S"]


@jax.custom_jvp
def straight_through(value: Array, rounded: Array) -> Array:
    """Returns `rounded` to the bit, with the derivative of `value`."""
    del value
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def latent(solution: Q4K, weight_OI: Float[Array, "*O I"] | None = None, displacement: float = 0.0) -> Latent:
    """Returns the centres of the cells that a solution chose, or points of them displaced towards the weights."""
    codes_OSGN = jnp.asarray(solution.codes_OSGN).astype(jnp.float32)
    if weight_OI is not None:
        step_OSG, offset_OSG = steps(solution)
        ideal_OSGN = (weight_OI.reshape(codes_OSGN.shape) + offset_OSG[..., None]) / jnp.where(
            step_OSG == 0, jnp.inf, step_OSG
        )[..., None]
        # The cell is not left: hardened, the latent values are the solution still.
        codes_OSGN += displacement * jnp.clip(ideal_OSGN - codes_OSGN, -0.49, 0.49)
    return Latent(
        codes_OSGN.reshape(solution.shape),
        jnp.asarray(solution.scales_OSG).astype(jnp.float32),
        jnp.asarray(solution.mins_OSG).astype(jnp.float32),
        jnp.zeros(solution.d_OS.shape, jnp.float32),
        jnp.zeros(solution.dmin_OS.shape, jnp.float32),
    )


def _nearest(value: Array, top: int) -> Array:
    return jnp.clip(jnp.round(value), 0, top)


def _half(start_OS: Array, change_OS: Array) -> tuple[Array, Array]:
    """A changed d or dmin in float32, and the same in float16; one sum and one product round alike in every program."""
    value_OS = start_OS.astype(jnp.float32) * jnp.maximum(1.0 + change_OS, 0.0)
    return value_OS, value_OS.astype(jnp.float16)


def harden(values: Latent, start: Q4K) -> Q4K:
    """Returns what latent values stand for, as it is written to the file."""
    return Q4K(
        _half(jnp.asarray(start.d_OS), values.d_OS)[1],
        _half(jnp.asarray(start.dmin_OS), values.dmin_OS)[1],
        _nearest(values.scales_OSG, MAX_SCALE).astype(jnp.uint8),
        _nearest(values.mins_OSG, MAX_SCALE).astype(jnp.uint8),
        _nearest(values.codes_OI, MAX_CODE).astype(jnp.uint8).reshape(start.codes_OSGN.shape),
    )


def settle(values: Latent) -> Latent:
    """Returns the same with codes at the integers that they round to, as bytes: what hardens alike, in less memory."""
    return dataclasses.replace(values, codes_OI=_nearest(values.codes_OI, MAX_CODE).astype(jnp.uint8))


def stair(value: Array, temperature: Array) -> Array:
    """Returns floor(u) + (f(u - floor(u)) - f(0)) / (f(1) - f(0)), f(x) = sigmoid((x - 1/2) / temperature).

    Continuous; u where the temperature is high, round(u) where it is low.
    """
    low = jnp.floor(value)
    edge = jax.nn.sigmoid(-0.5 / temperature)
    return low + (jax.nn.sigmoid((value - low - 0.5) / temperature) - edge) / (1.0 - 2.0 * edge)


def between(value: Array, temperature: Array) -> Array:
    """Returns f (1 - f) for the part f of the stair above its lower step; zero where the temperature is."""
    part = stair(value, jnp.where(temperature > 0, temperature, 1.0)) - jnp.floor(value)
    return jnp.where(temperature > 0, part * (1.0 - part), 0.0)


def weights(values: Latent, start: Q4K, temperature: Array | None = None) -> Float32[Array, "*O I"]:
    """Returns the weights of the hardened values, differentiable in the latent ones.

    The derivative of a weight is that of d s u - dmin m at the rounded values of the other factors. Where the
    `temperature` is above zero codes are soft, and have the derivative of their stair.
    """

    def half(start_OS, change_OS):
        value_OS, half_OS = _half(jnp.asarray(start_OS), change_OS)
        return straight_through(value_OS, half_OS.astype(jnp.float32))[..., None]

    def integer(value, top):
        return straight_through(value, _nearest(value, top))

    step_OSG = half(start.d_OS, values.d_OS) * integer(values.scales_OSG, MAX_SCALE)
    offset_OSG = half(start.dmin_OS, values.dmin_OS) * integer(values.mins_OSG, MAX_SCALE)
    codes_OI = integer(values.codes_OI, MAX_CODE)
    if temperature is not None:
        soft_OI = jnp.clip(stair(values.codes_OI, jnp.where(temperature > 0, temperature, 1.0)), 0, MAX_CODE)
        codes_OI = jnp.where(temperature > 0, soft_OI, codes_OI)
    codes_OSGN = codes_OI.reshape(*step_OSG.shape, SUB_BLOCK)
    return (step_OSG[..., None] * codes_OSGN - offset_OSG[..., None]).reshape(values.codes_OI.shape)
