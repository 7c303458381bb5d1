"""The second-order objective of rounding: how much an error in a weight costs, in nats per token.

Letters: O out features, I in features, R rank.

To second order, replacing W by W + E raises KL(original || quantized) by trace(E^T G E A) / 2, where A = E[x x^T] is
the input Gram of the layer and G = E[g g^T] its output Gram (g: gradient of the log-likelihood of a label drawn from
the model with respect to the layer's output). Shaping raises the eigenvalues of either Gram to a power.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Columns that a blocked Cholesky factorization takes at a time.
_PANEL = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """One matrix to be rounded: the target W [O, I] and the two Grams that weigh an error E as trace(E^T G E A) / 2.

    `gram_in_II` is None where plain rounding is all that is asked for, `gram_out_OO` where rows are taken as equally
    important and independent (G = identity).
    """

    weight_OI: Float[Array, "*batch O I"]
    gram_in_II: Float[Array, "*batch I I"] | None = None
    gram_out_OO: Float[Array, "*batch O O"] | None = None


def proxy_loss(problem: Problem, weight_OI: Float[Array, "O I"]) -> Float[Array, ""]:
    """Second-order estimate of the KL divergence caused by replacing the target with `weight_OI`.

    With E = weight_OI - W returns trace(E^T G E A) / 2, in nats per token where both Grams are means over tokens.

    References:
      Tseng et al., Model-Preserving Adaptive Rounding, 2025. https://arxiv.org/abs/2505.22988
    """
    error_OI = weight_OI - problem.weight_OI
    weighted_OI = matmul(error_OI, problem.gram_in_II)
    if problem.gram_out_OO is not None:
        weighted_OI = matmul(problem.gram_out_OO, weighted_OI)
    return 0.5 * jnp.sum(error_OI * weighted_OI)


def matmul(left: Float[Array, "*batch M K"], right: Float[Array, "*batch K N"]) -> Float[Array, "*batch M N"]:
    """Returns the matrix product in full float32; by default accelerators round its operands to 8 or 10 bits."""
    return jnp.matmul(left, right, precision="highest")


def _one_by_one(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """Returns a factorization of one matrix that CPUs do of stacked ones in a loop.

    There, a call of LAPACK for a stack waits for other threads of the pool that it holds a thread of: two calls at the
    same time wait forever where the pool has two (seen with jaxlib 0.10.2).
    """
    in_a_loop = jax.custom_batching.sequential_vmap(function)
    return lambda gram_II: jax.lax.platform_dependent(gram_II, cpu=in_a_loop, default=function)


_eigh = _one_by_one(lambda gram_II: tuple(jnp.linalg.eigh(gram_II)))
_cholesky = _one_by_one(lambda gram_II: jnp.linalg.cholesky(gram_II, symmetrize_input=False))


def _stacked(function: Callable[[Array], Any], gram_II: Float[Array, "*batch I I"]) -> Any:
    """Applies a factorization of one matrix to any stack of them."""
    for _ in range(gram_II.ndim - 2):
        function = jax.vmap(function)
    return function(gram_II)


def shape_gram(
    gram_II: Float[Array, "*batch I I"], gamma: float | Float[Array, ""], damping: float | Float[Array, ""]
) -> Float[Array, "*batch I I"]:
    """Raises the eigenvalues of a damped Gram to the power gamma, keeping its mean eigenvalue.

    Returns (A + damping * mean(diag A) I)^gamma, scaled to the trace of the damped A. gamma = 0 gives a multiple of the
    identity (plain rounding), gamma = 1 the damped Gram itself. On TPUs it is computed on the host, in float64, because
    the compiler there takes longer over the eigenvectors of a large matrix than all of rounding does.
    """
    if jax.default_backend() != "tpu":
        return _shape_on_device(gram_II, gamma, damping)
    arguments = (gram_II, gamma, damping)
    if not any(isinstance(argument, jax.core.Tracer) for argument in arguments):
        return jnp.asarray(_shape_on_host(*arguments))
    # Within a program the device asks the host; mapped over gamma alone, it decomposes the Gram once.
    result = jax.ShapeDtypeStruct(gram_II.shape, jnp.float32)
    return jax.pure_callback(_shape_on_host, result, *arguments, vmap_method="expand_dims")


def _shape_on_host(gram_II, gamma, damping) -> np.ndarray:
    gram_II = np.asarray(gram_II, np.float64)
    # Axes that these have lead; those of a batch of Grams follow.
    lead = lambda x: np.reshape(x, np.shape(x) + (1,) * (gram_II.ndim - 1 - np.ndim(x)))  # noqa: E731
    return _shaped(gram_II, lead(gamma), lead(damping), np).astype(np.float32)


@jax.jit
def _shape_on_device(gram_II, gamma, damping):
    shape = gram_II.shape
    shaped = jax.vmap(lambda gram_II: _shaped(gram_II, gamma, damping, jnp))(gram_II.reshape(-1, *shape[-2:]))
    return shaped.reshape(shape)


def _shaped(gram_II, gamma, damping, xp):
    """Shapes with JAX or, with `xp` NumPy and any leading axes, on the host in the precision of what it gets."""
    gram_II = 0.5 * (gram_II + xp.swapaxes(gram_II, -1, -2))
    size = gram_II.shape[-1]
    mean = (xp.trace(gram_II, axis1=-2, axis2=-1) / size)[..., None]
    eigenvalues_I, vectors_II = _eigenvectors(gram_II / mean[..., None], xp)
    # Rounding in float32 leaves eigenvalues of about -1e-7 of the largest where A has no rank.
    damped_I = xp.maximum(eigenvalues_I, 0.0) + damping
    powered_I = damped_I**gamma
    powered_I = powered_I * (xp.sum(damped_I, axis=-1) / xp.sum(powered_I, axis=-1))[..., None] * mean
    product = np.matmul if xp is np else matmul
    return product(vectors_II * powered_I[..., None, :], xp.swapaxes(vectors_II, -1, -2))


def _eigenvectors(gram_II, xp):
    return np.linalg.eigh(gram_II) if xp is np else _stacked(_eigh, gram_II)


def truncate_gram(gram_II: Float[Array, "*batch I I"], rank: int) -> Float[Array, "*batch I I"]:
    """Keeps the `rank` largest eigenvalues of a Gram and replaces the others by their mean; 0 keeps all."""
    size = gram_II.shape[-1]
    if not 0 < rank < size:
        return gram_II
    # On TPUs on the host, as for `shape_gram`.
    xp = np if jax.default_backend() == "tpu" else jnp
    gram_II = np.asarray(gram_II, np.float64) if xp is np else gram_II
    eigenvalues_I, vectors_II = _eigenvectors(0.5 * (gram_II + xp.swapaxes(gram_II, -1, -2)), xp)
    low_I = xp.broadcast_to(xp.mean(eigenvalues_I[..., : size - rank], axis=-1, keepdims=True), eigenvalues_I.shape)
    eigenvalues_I = xp.where(np.arange(size) < size - rank, low_I, eigenvalues_I)
    product = np.matmul if xp is np else matmul
    return jnp.asarray(product(vectors_II * eigenvalues_I[..., None, :], xp.swapaxes(vectors_II, -1, -2)), jnp.float32)


def damp(gram_II: Float[Array, "I I"], damping: float | Float[Array, ""]) -> Float[Array, "I I"]:
    """Adds `damping` times the mean diagonal to the diagonal, after symmetrising."""
    gram_II = 0.5 * (gram_II + gram_II.T)
    size = gram_II.shape[0]
    return gram_II + damping * (jnp.trace(gram_II) / size) * jnp.eye(size, dtype=gram_II.dtype)


def cholesky(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I I"]:
    """Returns the lower triangular L with gram = L L^T; only the lower half of a Gram is read.

    On TPUs in panels, in a loop: the compiler there does not finish the factorization of thousands of columns at once.
    """
    whole = functools.partial(_stacked, _cholesky)
    if gram_II.shape[-1] <= 2 * _PANEL:
        return whole(gram_II)
    return jax.lax.platform_dependent(gram_II, tpu=cholesky_in_panels, default=whole)


def cholesky_in_panels(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I I"]:
    """The same, 256 columns at a time: factor the diagonal block, solve for the rows below it, update what is left.

    A panel's product meets the whole matrix, not the part that is left: three times the operations, one small program.
    """
    shape = gram_II.shape
    return jax.vmap(_panels)(gram_II.reshape(-1, *shape[-2:])).reshape(shape)


def _panels(gram_II):
    size = gram_II.shape[0]
    fill = -size % _PANEL
    index_I = jnp.arange(size + fill)
    matrix = jnp.pad(jnp.tril(gram_II) + jnp.tril(gram_II, -1).T, ((0, fill), (0, fill)))
    # The rows and columns that fill the last panel are those of the identity.
    matrix = matrix + jnp.diag((index_I >= size).astype(gram_II.dtype))

    def panel(number, matrix):
        start = number * _PANEL
        columns_IP = jax.lax.dynamic_slice_in_dim(matrix, start, _PANEL, axis=1)
        block_PP = jax.lax.dynamic_slice_in_dim(columns_IP, start, _PANEL, axis=0)
        factor_PP = jnp.linalg.cholesky(block_PP, symmetrize_input=False)
        solved_IP = jax.lax.linalg.triangular_solve(factor_PP, columns_IP, transpose_a=True, lower=True)
        below_IP = jnp.where((index_I >= start + _PANEL)[:, None], solved_IP, 0.0)
        matrix = matrix - matmul(below_IP, below_IP.T)
        lower_IP = jax.lax.dynamic_update_slice_in_dim(below_IP, factor_PP, start, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(matrix, lower_IP, start, axis=1)

    return jnp.tril(jax.lax.fori_loop(0, len(index_I) // _PANEL, panel, matrix))[:size, :size]


def upper_factor(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I I"]:
    """Returns the upper triangular V with gram = V V^T, through the Cholesky factor of the reversed matrix.

    An error E then costs |E V|^2: column j of E V mixes the errors of columns 0..j, so that columns can be rounded
    from left to right, each making good the errors before it.
    """
    flipped_II = jnp.flip(gram_II, axis=(-2, -1))
    return jnp.flip(cholesky(flipped_II), axis=(-2, -1))


def conditional_variance(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I"]:
    """Variance of each input given those after it: what an error of its column costs once feedback does its work."""
    return jnp.square(jnp.diagonal(upper_factor(gram_II), axis1=-2, axis2=-1))
