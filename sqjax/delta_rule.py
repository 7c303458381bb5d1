"""The gated delta rule, token by token (the definition) and in parallel over chunks (the same, fast).

Let B denote batch, T time, H value heads, K key heads, E head dim, N chunks, R = H / K value heads per key head, and
C, S positions in a chunk. Value head h reads key head h mod K, so that h = r * K + k.

A head keeps a state S of shape [E, E], keys by values. Each token decays it, corrects what it answers to the token's
key, and reads it with the token's query:

    S <- exp(log_decay) S;   delta = beta (v - S^T k);   S <- S + k delta^T;   out = S^T q / sqrt(E)

References:
  Yang, Kautz, Hatamizadeh, Gated Delta Networks, 2025. https://arxiv.org/abs/2412.06464
  Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024.
  https://arxiv.org/abs/2406.06484
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def recurrent(
    q: Float[Array, "B T K E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T H E"],
    log_decay_BTH: Float[Array, "B T H"],
    beta_BTH: Float[Array, "B T H"],
    state: Float[Array, "B H E E"] | None = None,
    *,
    precision: jax.lax.PrecisionLike = "highest",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H E E"]]:
    """Runs the gated delta rule as it is defined, one token after the other, in float32.

    Returns:
      The outputs and the state after the last token. `state` is zero when it is not given.
    """
    batch, _, key_heads, dim = q.shape
    heads = v.shape[2]
    grouped = (batch, heads // key_heads, key_heads)
    if state is None:
        state = jnp.zeros((batch, heads, dim, dim), jnp.float32)
    einsum = functools.partial(jnp.einsum, precision=precision)

    def step(state, token):
        q, k, v, log_decay, beta = token
        state = state * jnp.exp(log_decay)[..., None, None]
        delta = beta[..., None] * (v - einsum("brked,bke->brkd", state, k))
        state = state + einsum("bke,brkd->brked", k, delta)
        return state, einsum("brked,bke->brkd", state, q)

    def by_token(x, *shape):
        return jnp.moveaxis(x.astype(jnp.float32).reshape(batch, -1, *shape), 1, 0)

    tokens = (
        by_token(q, key_heads, dim) * dim**-0.5,
        by_token(k, key_heads, dim),
        by_token(v, *grouped[1:], dim),
        by_token(log_decay_BTH, *grouped[1:]),
        by_token(beta_BTH, *grouped[1:]),
    )
    state, out = jax.lax.scan(step, state.reshape(*grouped, dim, dim), tokens)
    return jnp.moveaxis(out, 0, 1).reshape(v.shape), state.reshape(batch, heads, dim, dim)


def chunked(
    q: Float[Array, "B T K E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T H E"],
    log_decay_BTH: Float[Array, "B T H"],
    beta_BTH: Float[Array, "B T H"],
    state: Float[Array, "B H E E"] | None = None,
    *,
    chunk: int = 64,
    precision: jax.lax.PrecisionLike = "highest",
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H E E"]]:
    """Runs the gated delta rule in parallel within chunks of tokens and in sequence over chunks, in float32.

    Equal to `recurrent` up to rounding, for keys of norm at most 1, log-decays at most 0 and betas in [0, 1]. With L
    the strictly lower triangle of beta_t exp(g_t - g_s) k_t.k_s (g the running sum of log-decays in a chunk), the
    deltas of a chunk that starts from state S are (I + L)^-1 (beta v - beta exp(g) k S): affine in S, like all else.

    `chunk` is a power of two; T need not be a multiple of it. `precision` is that of the matrix products: "highest" for
    float32 results, "default" (TF32 or bfloat16 products with float32 sums) where q, k, v come from a bfloat16 model.
    The triangular inverse always has the highest.

    Returns:
      The outputs and the state after the last token. `state` is zero when it is not given.
    """
    batch, time, key_heads, dim = q.shape
    heads = v.shape[2]
    einsum = functools.partial(jnp.einsum, precision=precision)
    q_NBKCE = _split(q, chunk, key_heads)[:, :, :, 0] * dim**-0.5
    k_NBKCE = _split(k, chunk, key_heads)[:, :, :, 0]
    v_NBKRCE = _split(v, chunk, key_heads)
    beta_NBKRC = _split(beta_BTH[..., None], chunk, key_heads)[..., 0]
    total_NBKRC = jnp.cumsum(_split(log_decay_BTH[..., None], chunk, key_heads)[..., 0], axis=-1)

    # Differences are formed before the exponential and are never positive, so that no decay overflows however strong.
    difference = total_NBKRC[..., :, None] - total_NBKRC[..., None, :]
    decay_NBKRCS = jnp.exp(jnp.where(_triangle(chunk, difference.ndim, 0), difference, -jnp.inf))
    keys_NBK1CS = einsum("nbkce,nbkse->nbkcs", k_NBKCE, k_NBKCE)[:, :, :, None]
    lower = jnp.where(_triangle(chunk, difference.ndim, -1), beta_NBKRC[..., None] * decay_NBKRCS * keys_NBK1CS, 0.0)
    # Scaling the columns of the inverse, not the rows of k, leaves one copy of k for all value heads that read it.
    solve_NBKRCS = _unit_lower_inverse(lower) * beta_NBKRC[..., None, :]
    start_NBKRC = jnp.exp(total_NBKRC)
    fresh_NBKRCE = einsum("nbkrcs,nbkrse->nbkrce", solve_NBKRCS, v_NBKRCE)
    recall_NBKRCE = einsum("nbkrcs,nbkse->nbkrce", solve_NBKRCS * start_NBKRC[..., None, :], k_NBKCE)
    end_NBKRC = jnp.exp(total_NBKRC[..., -1:] - total_NBKRC)

    def next_state(state, step):
        k, fresh, recall, end, through = step
        delta = fresh - einsum("bkrce,bkred->bkrcd", recall, state)
        written = einsum("bkce,bkrcd->bkred", k, delta * end[..., None])
        return state * through[..., None, None] + written, state

    if state is None:
        state = jnp.zeros((batch, heads, dim, dim), jnp.float32)
    # [B, H = R K, E, E] -> [B, K, R, E, E]
    state = state.reshape(batch, heads // key_heads, key_heads, dim, dim).swapaxes(1, 2)
    steps = (k_NBKCE, fresh_NBKRCE, recall_NBKRCE, end_NBKRC, start_NBKRC[..., -1])
    state, starts_NBKREE = jax.lax.scan(next_state, state, steps)

    attend_NBKRCS = einsum("nbkce,nbkse->nbkcs", q_NBKCE, k_NBKCE)[:, :, :, None] * decay_NBKRCS
    read = q_NBKCE[:, :, :, None] * start_NBKRC[..., None] - einsum(
        "nbkrcs,nbkrse->nbkrce", attend_NBKRCS, recall_NBKRCE
    )
    out = einsum("nbkrce,nbkred->nbkrcd", read, starts_NBKREE)
    out = out + einsum("nbkrcs,nbkrse->nbkrce", attend_NBKRCS, fresh_NBKRCE)
    # [N, B, K, R, C, E] -> [B, T, H = R K, E]
    out = out.transpose(1, 0, 4, 3, 2, 5).reshape(batch, -1, heads, dim)[:, :time]
    return out, state.swapaxes(1, 2).reshape(batch, heads, dim, dim)


def _split(x: Float[Array, "B T H E"], chunk: int, key_heads: int) -> Float[Array, "N B K R C E"]:
    """Cuts time into chunks, padded with zeros: a token without key, value, beta and decay leaves the state alone."""
    batch, time, heads, dim = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -time % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, heads // key_heads, key_heads, dim)
    return x.transpose(1, 0, 4, 3, 2, 5)


def _triangle(size: int, rank: int, diagonal: int) -> Array:
    return jnp.tri(size, k=diagonal, dtype=bool).reshape((1,) * (rank - 2) + (size, size))


@jax.custom_jvp
def _unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Returns (I + L)^-1 for a strictly lower triangular L, by halves: [[A, 0], [-D M A, D]].

    Stable where the product of powers (I - L)(I + L^2)(I + L^4)... is not: with equal keys those powers grow like
    binomial coefficients and cancel, while every block of the inverse stays bounded.
    """
    return _inverse_by_halves(lower.reshape(-1, *lower.shape[-2:])).reshape(lower.shape)


def _inverse_by_halves(lower: Float[Array, "M C C"]) -> Float[Array, "M C C"]:
    size = lower.shape[-1]
    if size <= 2:
        return jnp.eye(size, dtype=lower.dtype)[None] - lower
    half = size // 2
    # Both halves are inverted at once, as one batch twice as long.
    diagonal = _inverse_by_halves(jnp.concatenate([lower[:, :half, :half], lower[:, half:, half:]]))
    top, bottom = jnp.split(diagonal, 2)
    corner = -_matmul(bottom, _matmul(lower[:, half:, :half], top))
    return jnp.concatenate([jnp.pad(top, ((0, 0), (0, 0), (0, half))), jnp.concatenate([corner, bottom], -1)], -2)


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    # Two products of the full size instead of the derivative of every level of the recursion.
    inverse = _unit_lower_inverse(*primals)
    return inverse, -_matmul(inverse, _matmul(tangents[0], inverse))


def _matmul(a: Array, b: Array) -> Array:
    if a.shape[-1] <= 4:
        # Blocks this small fuse into one elementwise kernel; as matrix products they would be a million tiny calls.
        return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)
    return jnp.matmul(a, b, precision="highest")
