"""The short convolution before the gated delta rule, SiLU and unit norms after it, as kernels for NVIDIA GPUs.

Let B denote batch, T time, H heads (queries, keys and values side by side), E head dim, W taps, N tiles of time. With
c the convolution, s = silu(c), and r = 1 / sqrt(sum_E s^2 + eps) for the first heads and 1 for the others, the result
is r s in bfloat16. `model.plain_heads` defines it; XLA's own passes over these widest arrays of a block run at half
the speed of memory, forward and backward, where a kernel reads once, writes once and keeps float32 to itself.

Backward, with g the cotangent: the gradient of s is r (g - s r^2 sum_E g s), for other heads g; that of c follows, is
rounded to bfloat16 like every gradient between matrices, and is correlated with the taps. Gradients of the taps are
summed by tiles and then over tiles, so that no result depends on the order in which programs run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from sqjax.delta_kernels import DIM, kernel_call

# Tokens of a tile; warps and stages of a program.
_TILE, _HOW = 64, (4, 1)


def heads(
    x_BTHE: Float[Array, "B T H E"], weight_WHE: Float[Array, "W H E"], unit: int, eps: float, interpret: bool = False
) -> Float[Array, "B T H E"]:
    """Convolves, applies SiLU and scales the first `unit` heads to unit norm; `interpret` runs on any backend."""
    time = x_BTHE.shape[1]
    padded = jnp.pad(x_BTHE.astype(jnp.bfloat16), ((0, 0), (0, -time % _TILE), (0, 0), (0, 0)))
    return _heads(padded, weight_WHE.astype(jnp.float32), unit, eps, interpret)[:, :time]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _heads(x_BTHE, weight_WHE, unit, eps, interpret):
    return _forward(x_BTHE, weight_WHE, unit, eps, interpret)[0]


def _forward(x_BTHE, weight_WHE, unit, eps, interpret):
    kernel = functools.partial(_conv_kernel, unit=unit, eps=eps)
    (out_BTHE,) = _tiles(kernel, x_BTHE, weight_WHE, [], [_out(x_BTHE)], interpret)
    return out_BTHE, (x_BTHE, weight_WHE)


def _backward(unit, eps, interpret, saved, grad_BTHE):
    x_BTHE, weight_WHE = saved
    batch, time = x_BTHE.shape[:2]
    taps = (batch, time // _TILE, *weight_WHE.shape)
    taps = (taps, jnp.float32, pl.BlockSpec((None, None, len(weight_WHE), None, DIM), lambda h, n, b: (b, n, 0, h, 0)))
    kernel = functools.partial(_conv_back_kernel, unit=unit, eps=eps)
    grad_c_BTHE, partial = _tiles(kernel, x_BTHE, weight_WHE, [grad_BTHE], [_out(x_BTHE), taps], interpret)
    (grad_x_BTHE,) = _tiles(_taps_back_kernel, grad_c_BTHE, weight_WHE, [], [_out(x_BTHE)], interpret)
    return grad_x_BTHE, jnp.sum(partial, axis=(0, 1))


_heads.defvjp(_forward, _backward)

_ROWS = pl.BlockSpec((None, _TILE, None, DIM), lambda h, n, b: (b, n, h, 0))


def _out(x_BTHE):
    return x_BTHE.shape, x_BTHE.dtype, _ROWS


def _tiles(kernel, x_BTHE, weight_WHE, beside, outputs, interpret):
    """Calls a kernel for every head and tile, with all tokens of the head, its taps and tiles of what lies `beside`."""
    batch, time, count, _ = x_BTHE.shape
    whole = pl.BlockSpec((None, time, None, DIM), lambda h, n, b: (b, 0, h, 0))
    taps = pl.BlockSpec((len(weight_WHE), None, DIM), lambda h, n, b: (0, h, 0))
    inputs = [(x_BTHE, whole), (weight_WHE, taps), *((x, _ROWS) for x in beside)]
    return kernel_call(kernel, (count, time // _TILE, batch), inputs, outputs, _HOW, interpret)


def _shifted(x_ref, shift: int):
    """The tile's tokens of a head, `shift` later; zero outside of the text."""
    row_T = pl.program_id(1) * _TILE + shift + lax.broadcasted_iota(jnp.int32, (_TILE,), 0)
    last = x_ref.shape[0] - 1
    x_TE = x_ref[jnp.clip(row_T, 0, last)].astype(jnp.float32)
    return jnp.where(((row_T >= 0) & (row_T <= last))[:, None], x_TE, 0.0)


def _convolved(x_ref, weight_ref):
    """c and silu's sigmoid of it."""
    width = weight_ref.shape[0]
    c_TE = sum(_shifted(x_ref, lag - width + 1) * weight_ref[lag][None, :] for lag in range(width))
    return c_TE, jax.nn.sigmoid(c_TE)


def _scale(s_TE, unit, eps):
    scale_T1 = lax.rsqrt(jnp.sum(s_TE * s_TE, axis=1, keepdims=True) + eps)
    return jnp.where(pl.program_id(0) < unit, scale_T1, 1.0)


def _conv_kernel(x_ref, weight_ref, out_ref, *, unit, eps):
    c_TE, sigmoid_TE = _convolved(x_ref, weight_ref)
    s_TE = c_TE * sigmoid_TE
    out_ref[:] = (s_TE * _scale(s_TE, unit, eps)).astype(out_ref.dtype)


def _conv_back_kernel(x_ref, weight_ref, grad_ref, grad_c_ref, taps_ref, *, unit, eps):
    c_TE, sigmoid_TE = _convolved(x_ref, weight_ref)
    s_TE, grad_TE = c_TE * sigmoid_TE, grad_ref[:].astype(jnp.float32)
    scale_T1 = _scale(s_TE, unit, eps)
    along_T1 = jnp.sum(grad_TE * s_TE, axis=1, keepdims=True) * scale_T1 * scale_T1
    grad_TE = scale_T1 * (grad_TE - s_TE * jnp.where(pl.program_id(0) < unit, along_T1, 0.0))
    grad_TE = (grad_TE * sigmoid_TE * (1.0 + c_TE * (1.0 - sigmoid_TE))).astype(grad_c_ref.dtype)
    grad_c_ref[:] = grad_TE
    width = weight_ref.shape[0]
    for lag in range(width):
        taps_ref[lag] = jnp.sum(grad_TE.astype(jnp.float32) * _shifted(x_ref, lag - width + 1), axis=0)


def _taps_back_kernel(grad_c_ref, weight_ref, grad_x_ref):
    width = weight_ref.shape[0]
    grad_TE = sum(_shifted(grad_c_ref, width - 1 - lag) * weight_ref[lag][None, :] for lag in range(width))
    grad_x_ref[:] = grad_TE.astype(grad_x_ref.dtype)
