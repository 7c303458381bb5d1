"""Channel scales that make a matrix easier to round and cost nothing in the file.

Letters: O out features, I in features, S super-blocks in a row, G sub-blocks in a super-block, N weights in one.

Where x = gain * normed is read by several matrices, a positive scale s per channel can be moved between them:
W x = (W s)(x / s), with 1 / s folded into the gain. The function is unchanged; its rounding error is not.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sqjax.q4_k import MAX_CODE, MAX_SCALE, SUB_BLOCK, SUPER_BLOCK

# Mean square of a 4-bit code over its sub-block: what an error in the 6-bit scale is multiplied with.
MEAN_SQUARE_CODE = 75.0


def expected_error(
    weight_OI: Float[Array, "O I"], row_weight_O: Float[Array, " O"], column_cost_I: Float[Array, " I"]
) -> Float[Array, ""]:
    """Expected cost of rounding a matrix to Q4_K, with errors uniform within a quantization step.

    Sums row_weight_i column_cost_j times the variance of the rounding error of weight ij: step^2 / 12 for the codes of
    a sub-block of that step, and the part of the 6-bit rounding of scales and mins. Differentiable almost everywhere.
    """
    rows, columns = weight_OI.shape
    if columns % SUPER_BLOCK:
        weight_OI, column_cost_I = (
            jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -columns % SUPER_BLOCK)]) for a in (weight_OI, column_cost_I)
        )
    weight_OSGN = weight_OI.reshape(rows, -1, SUPER_BLOCK // SUB_BLOCK, SUB_BLOCK)
    low_OSG = jnp.maximum(-jnp.min(weight_OSGN, axis=-1), 0.0)
    step_OSG = (jnp.maximum(jnp.max(weight_OSGN, axis=-1), 0.0) + low_OSG) / MAX_CODE
    d_OS1 = jnp.max(step_OSG, axis=-1, keepdims=True) / MAX_SCALE
    dmin_OS1 = jnp.max(low_OSG, axis=-1, keepdims=True) / MAX_SCALE
    variance_OSG = (jnp.square(step_OSG) + MEAN_SQUARE_CODE * jnp.square(d_OS1) + jnp.square(dmin_OS1)) / 12.0
    cost_SG = jnp.sum(column_cost_I.reshape(*variance_OSG.shape[1:], SUB_BLOCK), axis=-1)
    return jnp.einsum("osg,sg,o->", variance_OSG, cost_SG, row_weight_O, precision="highest")


@functools.partial(jax.jit, static_argnames="updates")
def equalizing_scale(
    readers: Sequence[tuple[Float[Array, "O I"], Float[Array, " O"]]],
    column_cost_I: Float[Array, " I"],
    tie_I: Int[Array, " I"],
    *,
    updates: int = 300,
    rate: float = 0.05,
) -> Float[Array, " I"]:
    """Searches the scale s per channel that minimises the expected rounding error of the matrices that read it.

    Readers are (weight, row weight); after scaling a reader holds weight * s and an error of column j costs
    column_cost_j / s_j^2. Starts from the best of a grid s = cost^(alpha / 2) / magnitude^beta (AWQ is beta = 0) and
    descends by gradient on log s. The mean of log s is zero: a common factor changes nothing.

    Args:
      tie_I: columns of one number share one scale; `jnp.arange(I)` leaves all free.

    Returns:
      The scale of every column.

    References:
      Lin et al., AWQ, 2023. https://arxiv.org/abs/2306.00978
    """
    columns = tie_I.shape[0]
    members_I = jnp.zeros(columns).at[tie_I].add(1.0)

    def share(values_I):
        """Replaces each value by the mean over its tied columns, around a mean of zero."""
        mean_I = (jnp.zeros(columns).at[tie_I].add(values_I) / jnp.maximum(members_I, 1.0))[tie_I]
        return mean_I - jnp.mean(mean_I)

    def loss(log_scale_I):
        scale_I = jnp.exp(share(log_scale_I))
        cost_I = column_cost_I / jnp.square(scale_I)
        return sum(expected_error(weight * scale_I[None, :], row_weight, cost_I) for weight, row_weight in readers)

    log_cost_I = 0.5 * jnp.log(column_cost_I + 1e-12 * jnp.mean(column_cost_I))
    magnitude_I = sum(jnp.mean(jnp.abs(weight), axis=0) for weight, _ in readers)
    log_magnitude_I = jnp.log(magnitude_I + 1e-9 * jnp.mean(magnitude_I))
    alpha_K, beta_K = (a.reshape(-1) for a in jnp.meshgrid(jnp.linspace(0.0, 1.0, 6), jnp.linspace(0.0, 1.0, 6)))
    grid_KI = alpha_K[:, None] * log_cost_I[None, :] - beta_K[:, None] * log_magnitude_I[None, :]
    start_I = grid_KI[jnp.argmin(jax.lax.map(loss, grid_KI))]

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, updates))
    value_and_grad = jax.value_and_grad(lambda log_scale_I: jnp.log(loss(log_scale_I)))

    def update(state, _):
        log_scale_I, optimizer_state, best_I, best = state
        value, gradient_I = value_and_grad(log_scale_I)
        best_I, best = jnp.where(value < best, log_scale_I, best_I), jnp.minimum(value, best)
        # Optax counts in integers and raises floats to their power.
        with jax.numpy_dtype_promotion("standard"):
            change_I, optimizer_state = optimizer.update(gradient_I, optimizer_state)
        return (log_scale_I + change_I, optimizer_state, best_I, best), None

    state = (start_I, optimizer.init(start_I), start_I, jnp.float32(jnp.inf))
    (_, _, best_I, _), _ = jax.lax.scan(update, state, None, length=updates)
    return jnp.exp(share(best_I))
