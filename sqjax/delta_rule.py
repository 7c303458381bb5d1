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

from sqjax import delta_kernels


def recurrent(
    q: Float[Array, "B T K E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T H E"],
    log_decay_BTH: Float[Array, "B T H"],
    beta_BTH: Float[Array, "B T H"],
    state: Float[Array, "B H E E"] | None = None,
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
    einsum = functools.partial(jnp.einsum, precision="highest")

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
    dtype=jnp.float32,
    kernels: bool | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H E E"]]:
    """Runs the gated delta rule in parallel within chunks of tokens and in sequence over chunks.

    Equal to `recurrent` up to rounding, for keys of norm at most 1, log-decays at most 0 and betas in [0, 1]. With L
    the strictly lower triangle of beta_t exp(g_t - g_s) k_t.k_s (g the running sum of log-decays in a chunk), the
    deltas of a chunk that starts from state S are (I + L)^-1 (beta v - beta exp(g) k S): affine in S, like all else.

    `chunk` is a power of two; T need not be a multiple of it. `dtype` is that of the factors of matrix products; sums,
    decays, the triangular inverse, the state and the results are float32 always. `kernels` says whether to compute by
    those of `delta_kernels`; None, where they are made for the device, the shape and the dtype.

    Returns:
      The outputs and the state after the last token. `state` is zero when it is not given.
    """
    batch, time, key_heads, dim = q.shape
    heads = v.shape[2]
    if state is None:
        state = jnp.zeros((batch, heads, dim, dim), jnp.float32)
    if delta_kernels.serve(dim, chunk, dtype) if kernels is None else kernels:
        return delta_kernels.chunked(q, k, v, log_decay_BTH, beta_BTH, state)
    q_NBKCE, k_NBKCE = (_split(x.astype(dtype), chunk, key_heads)[:, :, :, 0] for x in (q, k))
    v_NBKRCE = _split(v.astype(dtype), chunk, key_heads)
    beta_NBKRC = _split(beta_BTH[..., None], chunk, key_heads)[..., 0]
    total_NBKRC = jnp.cumsum(_split(log_decay_BTH[..., None], chunk, key_heads)[..., 0], axis=-1)

    # Differences are formed before the exponential and are never positive, so that no decay overflows however strong.
    difference = total_NBKRC[..., :, None] - total_NBKRC[..., None, :]
    decay_NBKRCS = jnp.exp(jnp.where(_triangle(chunk, difference.ndim, 0), difference, -jnp.inf))
    start_NBKRC = jnp.exp(total_NBKRC)
    fresh_NBKRCE, recall_NBKRCE = _deltas(k_NBKCE, v_NBKRCE, beta_NBKRC, start_NBKRC, decay_NBKRCS)
    state = _regroup(state, heads // key_heads, key_heads)
    state, starts_NBKREE = _states(state, k_NBKCE, fresh_NBKRCE, recall_NBKRCE, total_NBKRC)

    scores_NBK1CS = product("nbkce,nbkse->nbkcs", q_NBKCE, k_NBKCE, jnp.float32)[:, :, :, None]
    attend_NBKRCS = (scores_NBK1CS * decay_NBKRCS).astype(dtype)
    read_NBKRCE = q_NBKCE.astype(jnp.float32)[:, :, :, None] * start_NBKRC[..., None]
    read_NBKRCE = read_NBKRCE - product("nbkrcs,nbkrse->nbkrce", attend_NBKRCS, recall_NBKRCE, jnp.float32)
    out = product("nbkrce,nbkred->nbkrcd", read_NBKRCE.astype(dtype), starts_NBKREE, jnp.float32)
    out = out + product("nbkrcs,nbkrse->nbkrce", attend_NBKRCS, fresh_NBKRCE, jnp.float32)
    # [N, B, K, R, C, E] -> [B, T, H = R K, E]
    out = out.transpose(1, 0, 4, 3, 2, 5).reshape(batch, -1, heads, dim)[:, :time] * dim**-0.5
    return out, _regroup(state, key_heads, heads // key_heads)


def _deltas(k_NBKCE, v_NBKRCE, beta_NBKRC, start_NBKRC, decay_NBKRCS):
    """Returns F and W such that the deltas of a chunk that starts from state S are F - W S."""
    dtype, chunk, rank = k_NBKCE.dtype, k_NBKCE.shape[-2], decay_NBKRCS.ndim
    keys_NBK1CS = product("nbkce,nbkse->nbkcs", k_NBKCE, k_NBKCE, jnp.float32)[:, :, :, None]
    lower = jnp.where(_triangle(chunk, rank, -1), beta_NBKRC[..., None] * decay_NBKRCS * keys_NBK1CS, 0.0)
    # Scaling the columns of the inverse, not the rows of k, leaves one copy of k for all value heads that read it.
    solve_NBKRCS = _unit_lower_inverse(lower) * beta_NBKRC[..., None, :]
    recall_NBKRCS = (solve_NBKRCS * start_NBKRC[..., None, :]).astype(dtype)
    fresh_NBKRCE = product("nbkrcs,nbkrse->nbkrce", solve_NBKRCS.astype(dtype), v_NBKRCE, dtype)
    return fresh_NBKRCE, product("nbkrcs,nbkse->nbkrce", recall_NBKRCS, k_NBKCE, dtype)


def _states(state_BHEE, k_NBKCE, fresh_NBKRCE, recall_NBKRCE, total_NBKRC):
    """Runs over the chunks; returns the last state [B, H, E, E] and the states that chunks start from."""
    dtype, (*_, chunk, dim) = k_NBKCE.dtype, k_NBKCE.shape
    end_NBKRC = jnp.exp(total_NBKRC[..., -1:] - total_NBKRC)

    def next_state(state_BHEE, step):
        k, fresh, recall, end, through = step
        # Heads are k * R + r here: products whose axes need no transposing, at the price of copies of k where R > 1.
        k = jnp.broadcast_to(k[:, :, None], fresh.shape)
        k, fresh, recall = (x.reshape(*state_BHEE.shape[:2], chunk, dim) for x in (k, fresh, recall))
        start_BHEE = state_BHEE.astype(dtype)
        delta = fresh.astype(jnp.float32) - product("bhce,bhed->bhcd", recall, start_BHEE, jnp.float32)
        delta = (delta * end.reshape(*delta.shape[:3], 1)).astype(dtype)
        state_BHEE = state_BHEE * through.reshape(*state_BHEE.shape[:2], 1, 1)
        return state_BHEE + product("bhce,bhcd->bhed", k, delta, jnp.float32), start_BHEE

    steps = (k_NBKCE, fresh_NBKRCE, recall_NBKRCE, end_NBKRC, jnp.exp(total_NBKRC[..., -1]))
    state_BHEE, starts = jax.lax.scan(next_state, state_BHEE, steps)
    return state_BHEE, starts.reshape(*fresh_NBKRCE.shape[:4], dim, dim)


def product(spec: str, a: Array, b: Array, dtype) -> Array:
    """Contracts two arrays of one dtype as einsum does, with float32 sums and a result of type `dtype`."""
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, precision="highest").astype(dtype)
    return _narrow_product(spec, a, b, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _narrow_product(spec, a, b, dtype):
    return jnp.einsum(spec, a, b, preferred_element_type=dtype)


def _narrow_product_forward(spec, a, b, dtype):
    return _narrow_product(spec, a, b, dtype), (a, b)


def _narrow_product_backward(spec, dtype, saved, grad):
    # A float32 result has a float32 cotangent; multiplied as such, the backward pass would lose most of its speed.
    a, b = saved
    grad = grad.astype(a.dtype)
    inputs, out = spec.split("->")
    first, second = inputs.split(",")
    grad_a = jnp.einsum(f"{out},{second}->{first}", grad, b, preferred_element_type=a.dtype)
    return grad_a, jnp.einsum(f"{first},{out}->{second}", a, grad, preferred_element_type=b.dtype)


_narrow_product.defvjp(_narrow_product_forward, _narrow_product_backward)


def _split(x: Float[Array, "B T H E"], chunk: int, key_heads: int) -> Float[Array, "N B K R C E"]:
    """Cuts time into chunks, padded with zeros: a token without key, value, beta and decay leaves the state alone."""
    batch, time, heads, dim = x.shape
    x = jnp.pad(x, ((0, 0), (0, -time % chunk), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, chunk, heads // key_heads, key_heads, dim)
    return x.transpose(1, 0, 4, 3, 2, 5)


def _regroup(state: Float[Array, "B H E E"], first: int, second: int) -> Float[Array, "B H E E"]:
    """Reorders heads f * second + s to s * first + f."""
    return state.reshape(len(state), first, second, *state.shape[2:]).swapaxes(1, 2).reshape(state.shape)


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
