"""The second-order objective of rounding: how much an error in a weight costs, in nats per token.

Letters: O out features, I in features, R rank.

To second order, replacing W by W + E raises KL(original || quantized) by trace(E^T G E A) / 2, where A = E[x x^T] is
the input Gram of the layer and G = E[g g^T] its output Gram (g: gradient of the log-likelihood of a label drawn from
the model with respect to the layer's output). Shaping raises the eigenvalues of either Gram to a power.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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


@jax.jit
def shape_gram(
    gram_II: Float[Array, "I I"], gamma: float | Float[Array, ""], damping: float | Float[Array, ""]
) -> Float[Array, "I I"]:
    """Raises the eigenvalues of a damped Gram to the power gamma, keeping its mean eigenvalue.

    Returns (A + damping * mean(diag A) I)^gamma, scaled to the trace of the damped A. gamma = 0 gives a multiple of the
    identity (plain rounding), gamma = 1 the damped Gram itself.
    """
    gram_II = 0.5 * (gram_II + gram_II.T)
    size = gram_II.shape[0]
    mean = jnp.trace(gram_II) / size
    eigenvalues_I, vectors_II = jnp.linalg.eigh(gram_II / mean)
    # Rounding in float32 leaves eigenvalues of about -1e-7 of the largest where A has no rank.
    damped_I = jnp.maximum(eigenvalues_I, 0.0) + damping
    powered_I = damped_I**gamma
    powered_I = powered_I * (jnp.sum(damped_I) / jnp.sum(powered_I)) * mean
    return matmul(vectors_II * powered_I[None, :], vectors_II.T)


def truncate_gram(gram_II: Float[Array, "I I"], rank: int) -> Float[Array, "I I"]:
    """Keeps the `rank` largest eigenvalues of a Gram and replaces the others by their mean; 0 keeps all."""
    size = gram_II.shape[0]
    if not 0 < rank < size:
        return gram_II
    eigenvalues_I, vectors_II = jnp.linalg.eigh(0.5 * (gram_II + gram_II.T))
    eigenvalues_I = eigenvalues_I.at[: size - rank].set(jnp.mean(eigenvalues_I[: size - rank]))
    return matmul(vectors_II * eigenvalues_I[None, :], vectors_II.T)


def damp(gram_II: Float[Array, "I I"], damping: float | Float[Array, ""]) -> Float[Array, "I I"]:
    """Adds `damping` times the mean diagonal to the diagonal, after symmetrising."""
    gram_II = 0.5 * (gram_II + gram_II.T)
    size = gram_II.shape[0]
    return gram_II + damping * (jnp.trace(gram_II) / size) * jnp.eye(size, dtype=gram_II.dtype)


def upper_factor(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I I"]:
    """Returns the upper triangular V with gram = V V^T, through the Cholesky factor of the reversed matrix.

    An error E then costs |E V|^2: column j of E V mixes the errors of columns 0..j, so that columns can be rounded
    from left to right, each making good the errors before it.
    """
    flipped_II = jnp.flip(gram_II, axis=(-2, -1))
    return jnp.flip(jnp.linalg.cholesky(flipped_II, symmetrize_input=False), axis=(-2, -1))


def conditional_variance(gram_II: Float[Array, "*batch I I"]) -> Float[Array, "*batch I"]:
    """Variance of each input given those after it: what an error of its column costs once feedback does its work."""
    return jnp.square(jnp.diagonal(upper_factor(gram_II), axis1=-2, axis2=-1))
