"""The gated delta rule in chunks as kernels for NVIDIA GPUs, with bfloat16 factors; `delta_rule.chunked` defines it.

Let B denote batch, T time, H value heads, K key heads, E head dim, N chunks, and C, S positions in a chunk. Value head
h reads key head h mod K. Queries, keys and values lie in one array, qkv [B, T, 2 K + H, E], in this order. g is the
running sum of log-decays in a chunk, X the state [E, E] that a chunk starts from.

What of a chunk depends on no state is made for all chunks at once (D is exp(g_c - g_s) for s <= c, else 0):

    inverse = (I + strict(beta_c D k_c.k_s))^-1       solve = inverse beta_s         attend = q k^T D
    fresh = solve v                                   recall = solve exp(g_s) k      read = exp(g_c) q - attend recall

Then one program for some columns of a head's state runs over the chunks, keeping them in registers:

    out = (read X + attend fresh) / sqrt(E)           X <- exp(g_last) X + k^T exp(g_last - g) (fresh - recall X)

The backward pass runs the transpose of this recursion over the chunks in reverse, for the cotangents of the states,
and then everything else for all chunks at once. Sums, decays, the inverse and the state are float32; no result depends
on the order in which programs run.

References:
  Yang, Kautz, Hatamizadeh, Gated Delta Networks, 2025. https://arxiv.org/abs/2412.06464
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX means to drop this backend one day
    triton = None

CHUNK = 64
DIM = 128
# A program runs over this many columns of a state.
_COLUMNS = 64
# A product of float32 factors by three of bfloat16: about 16 bits, where more would cost more than all else.
_SPLIT = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
# Warps of a program, and stages of the pipeline that loads ahead.
_PREPARE, _RECUR, _BACKWARD = (4, 1), (4, 2), (4, 1)


def serve(dim: int, chunk: int, dtype) -> bool:
    """Whether the kernels compute the delta rule of such heads, chunks and factors on the default device, a Hopper."""
    return chunk == CHUNK and serve_heads(dim, dtype)


def serve_heads(dim: int, dtype) -> bool:
    """Whether kernels for heads of this size and type run on the default device, a Hopper."""
    return triton is not None and (dim, jnp.dtype(dtype)) == (DIM, jnp.bfloat16) and capability() == 9.0


def capability() -> float:
    """Returns the compute capability of the default device, 0 where that is no NVIDIA GPU."""
    # AMD's GPUs have names there, as gfx90a.
    name = getattr(jax.local_devices()[0], "compute_capability", "")
    return float(name) if name.replace(".", "").isdigit() else 0.0


def chunked(
    q: Float[Array, "B T K E"],
    k: Float[Array, "B T K E"],
    v: Float[Array, "B T H E"],
    log_decay_BTH: Float[Array, "B T H"],
    beta_BTH: Float[Array, "B T H"],
    state: Float[Array, "B H E E"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H E E"]]:
    """Runs the gated delta rule in chunks of 64 tokens, for heads of 128, as `delta_rule.chunked` does in bfloat16.

    Returns:
      The outputs and the state after the last token, in float32. `interpret` runs the kernels on any backend, slowly.
    """
    batch, time, heads, _ = v.shape
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -time % CHUNK)) + ((0, 0),) * (x.ndim - 2))  # noqa: E731
    # Where the three are slices of one array that lie side by side, XLA takes that array: the kernels need no copies.
    qkv = pad(jnp.concatenate([x.astype(jnp.bfloat16) for x in (q, k, v)], axis=2))
    log_decay_BHT, beta_BHT = (pad(x.astype(jnp.float32)).swapaxes(1, 2) for x in (log_decay_BTH, beta_BTH))
    total_BHT = jnp.cumsum(log_decay_BHT.reshape(batch, heads, -1, CHUNK), axis=-1).reshape(log_decay_BHT.shape)
    out, state = _chunked(qkv, total_BHT, beta_BHT, state.astype(jnp.float32), interpret)
    return out[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(qkv, total_BHT, beta_BHT, state, interpret):
    prepared = _prepared(qkv, total_BHT, beta_BHT, False, interpret)
    out, state, _ = _run(qkv, *prepared, total_BHT, state, False, interpret)
    return out, state


def _forward(qkv, total_BHT, beta_BHT, state, interpret):
    *prepared, inverse_BHTC = _prepared(qkv, total_BHT, beta_BHT, True, interpret)
    out, state, starts_BHNEE = _run(qkv, *prepared, total_BHT, state, True, interpret)
    return (out, state), (qkv, total_BHT, beta_BHT, inverse_BHTC, *prepared[:3], starts_BHNEE)


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def kernel_call(kernel, grid, inputs, outputs, how, interpret):
    """Calls a kernel; inputs are (array, spec), outputs (shape, dtype, spec), `how` is its warps and stages."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for *_, spec in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        compiler_params=triton.CompilerParams(num_warps=how[0], num_stages=how[1]),
        interpret=interpret,
        name=getattr(kernel, "func", kernel).__name__,
    )(*(array for array, _ in inputs))


# Programs that start together read what lies together: heads come first in grids, columns of one head before them.


def _tokens(heads: int, chunks: int | None = None, first: int = 0) -> pl.BlockSpec:
    """Tokens [B, T, any, E] of one of `heads` heads from the `first`: of a chunk, or some columns of all `chunks`."""
    if chunks is None:
        return pl.BlockSpec((None, CHUNK, None, DIM), lambda h, n, b: (b, n, first + lax.rem(h, heads), 0))
    return pl.BlockSpec((None, chunks * CHUNK, None, DIM), lambda c, h, b: (b, 0, first + lax.rem(h, heads), 0))


def _views(qkv, heads: int, chunks: int | None = None) -> list:
    """One head's queries, keys and values as inputs of a call."""
    keys = (qkv.shape[2] - heads) // 2
    return [(qkv, _tokens(*view)) for view in ((keys, chunks), (keys, chunks, keys), (heads, chunks, 2 * keys))]


def _columns(chunks: int) -> pl.BlockSpec:
    """Some columns of all tokens [B, T, H, E] of one head."""
    return pl.BlockSpec((None, chunks * CHUNK, None, _COLUMNS), lambda c, h, b: (b, 0, h, c))


_SCALARS = pl.BlockSpec((None, None, CHUNK), lambda h, n, b: (b, h, n))
_SQUARES = pl.BlockSpec((None, None, CHUNK, CHUNK), lambda h, n, b: (b, h, n, 0))
_STATES = pl.BlockSpec((None, None, None, DIM, DIM), lambda h, n, b: (b, h, n, 0, 0))


def _some_columns(*rows: int) -> pl.BlockSpec:
    """Some columns of the states [B, H, *rows, E] of one head."""
    zeros = (0,) * len(rows)
    return pl.BlockSpec((None, None, *rows, _COLUMNS), lambda c, h, b: (b, h, *zeros, c))


def _prepared(qkv, total_BHT, beta_BHT, keep, interpret):
    """Returns fresh, recall, read [B, T, H, E], attend and, where `keep` says so, inverse [B, H, T, C]."""
    batch, heads, time = total_BHT.shape
    tokens, square = (batch, time, heads, DIM), (batch, heads, time, CHUNK)
    inputs = [*_views(qkv, heads), (total_BHT, _SCALARS), (beta_BHT, _SCALARS)]
    outputs = [(tokens, qkv.dtype, _tokens(heads))] * 3 + [(square, qkv.dtype, _SQUARES)]
    outputs += [(square, jnp.float32, _SQUARES)] * keep
    return kernel_call(_prepare_kernel, (heads, time // CHUNK, batch), inputs, outputs, _PREPARE, interpret)


def _run(qkv, fresh, recall, read, attend_BHTC, total_BHT, state, keep, interpret):
    """Returns the outputs, the last state, and, where `keep` says so, the states that chunks start from."""
    batch, time, heads, _ = fresh.shape
    chunks = time // CHUNK
    whole, columns = _tokens(heads, chunks), _columns(chunks)
    totals = pl.BlockSpec((None, None, time), lambda c, h, b: (b, h, 0))
    squares = pl.BlockSpec((None, None, time, CHUNK), lambda c, h, b: (b, h, 0, 0))
    inputs = [_views(qkv, heads, chunks)[1], (recall, whole), (read, whole), (fresh, columns)]
    inputs += [(attend_BHTC, squares), (total_BHT, totals), (state, _some_columns(DIM))]
    outputs = [(fresh.shape, jnp.float32, columns), (state.shape, jnp.float32, _some_columns(DIM))]
    outputs += [((batch, heads, chunks, DIM, DIM), fresh.dtype, _some_columns(chunks, DIM))] * keep
    found = kernel_call(_recur_kernel, (DIM // _COLUMNS, heads, batch), inputs, outputs, _RECUR, interpret)
    return (*found, None)[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels of the forward pass


def _dot(a, b, contract=(1, 0), precision=None):
    """Contracts axis contract[0] of a with contract[1] of b, with float32 sums."""
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _positions(size: int):
    return (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _decay(total_C):
    """exp(g_c - g_s) for s <= c, else 0: a difference before the exponential, and never positive."""
    rows, columns = _positions(CHUNK)
    return jnp.exp(jnp.where(rows >= columns, total_C[:, None] - total_C[None, :], -jnp.inf))


def _narrow(x):
    return x.astype(jnp.bfloat16)


def _inverse(k, total_C, beta_C):
    """(I + L)^-1: each step joins pairs of inverted diagonal blocks, [[A, 0], [-D M A, D]]; entries stay bounded."""
    rows, columns = _positions(CHUNK)
    lower_CS = jnp.where(rows > columns, beta_C[:, None] * _decay(total_C) * _dot(k, k, (1, 1)), 0.0)

    def corners(x_CS, i):
        # Of blocks of 2^i, those beside the diagonal within blocks of twice the size; masks kept would fill registers.
        block_C = lax.broadcasted_iota(jnp.int32, (CHUNK,), 0) >> i
        return jnp.where(block_C[:, None] ^ block_C[None, :] == 1, x_CS, 0.0)

    def join(i, inverse_CS):
        corner_CS = corners(_dot(lower_CS, inverse_CS, precision=_SPLIT), i)
        return inverse_CS - _dot(inverse_CS, corner_CS, precision=_SPLIT)

    pairs_CS = jnp.where(rows == columns, 1.0, -corners(lower_CS, 0))
    return lax.fori_loop(1, CHUNK.bit_length() - 1, join, pairs_CS)


def _prepare_kernel(
    q_ref, k_ref, v_ref, total_ref, beta_ref, fresh_ref, recall_ref, read_ref, attend_ref, *inverse_ref
):  # fmt: skip
    """What reads and writes of a chunk need and depends on no state."""
    q, k, total_C, beta_C = q_ref[:], k_ref[:], total_ref[:], beta_ref[:]
    attend_CS = _narrow(_dot(q, k, (1, 1)) * _decay(total_C))
    attend_ref[:] = attend_CS
    inverse_CS = _inverse(k, total_C, beta_C)
    if inverse_ref:
        inverse_ref[0][:] = inverse_CS
    solve_CS, start_C = inverse_CS * beta_C[None, :], jnp.exp(total_C)
    fresh_ref[:] = _narrow(_dot(_narrow(solve_CS), v_ref[:]))
    recall = _narrow(_dot(_narrow(solve_CS * start_C[None, :]), k))
    recall_ref[:] = recall
    read_ref[:] = _narrow(q.astype(jnp.float32) * start_C[:, None] - _dot(attend_CS, recall))


def _recur_kernel(k_ref, recall_ref, read_ref, fresh_ref, attend_ref, total_ref, state_ref, out_ref, last_ref, *starts):
    """Runs over the chunks with some columns of a head's state, which read and write the same columns of values."""

    def step(n, state):
        part = pl.ds(n * CHUNK, CHUNK)
        start, fresh = _narrow(state), fresh_ref[part]
        if starts:
            starts[0][n] = start
        out_ref[part] = (_dot(read_ref[part], start) + _dot(attend_ref[part], fresh)) * DIM**-0.5
        last, total_C = total_ref[n * CHUNK + CHUNK - 1], total_ref[part]
        delta = fresh.astype(jnp.float32) - _dot(recall_ref[part], start)
        delta = _narrow(delta * jnp.exp(last - total_C)[:, None])
        return state * jnp.exp(last) + _dot(k_ref[part], delta, (0, 0))

    last_ref[:] = lax.fori_loop(0, out_ref.shape[0] // CHUNK, step, state_ref[:])


# ---------------------------------------------------------------------------------------------------------------------
# Backward


def _backward(interpret, saved, grads):
    qkv, total_BHT, beta_BHT, inverse_BHTC, fresh, recall, read, starts_BHNEE = saved
    batch, time, heads, _ = fresh.shape
    grid, spec, (q, k, v) = (heads, time // CHUNK, batch), _tokens(heads), _views(qkv, heads)
    grad_out = _narrow(grads[0] * DIM**-0.5)
    ends_BHNEE, grad_state = _run_back(qkv, recall, read, grad_out, total_BHT, grads[1], interpret)

    tokens, scalars = (fresh.shape, qkv.dtype, spec), (total_BHT.shape, jnp.float32, _SCALARS)
    inputs = [q, k, (fresh, spec), (recall, spec), (grad_out, spec)]
    inputs += [(starts_BHNEE, _STATES), (ends_BHNEE, _STATES), (total_BHT, _SCALARS)]
    grad_q, *partial = kernel_call(_read_back_kernel, grid, inputs, [tokens] * 4 + [scalars], _BACKWARD, interpret)

    inputs = [k, v, (inverse_BHTC, _SQUARES), (total_BHT, _SCALARS), (beta_BHT, _SCALARS)]
    inputs += [*((x, spec) for x in partial[:3]), (partial[3], _SCALARS)]
    outputs = [tokens] * 2 + [scalars] * 2
    grad_k, grad_v, *grad_scalars = kernel_call(_prepare_back_kernel, grid, inputs, outputs, _BACKWARD, interpret)
    keys = (qkv.shape[2] - heads) // 2
    if heads > keys:
        grouped = (x.reshape(batch, time, -1, keys, DIM).astype(jnp.float32) for x in (grad_q, grad_k))
        grad_q, grad_k = (_narrow(jnp.sum(x, axis=2)) for x in grouped)
    return jnp.concatenate([grad_q, grad_k, grad_v], axis=2), *grad_scalars, grad_state


_chunked.defvjp(_forward, _backward)


def _run_back(qkv, recall, read, grad_out, total_BHT, grad_last, interpret):
    """Returns cotangents of the states that chunks end with, and of the first state."""
    batch, time, heads, _ = recall.shape
    chunks = time // CHUNK
    whole = _tokens(heads, chunks)
    totals = pl.BlockSpec((None, None, time), lambda c, h, b: (b, h, 0))
    inputs = [_views(qkv, heads, chunks)[1], (recall, whole), (read, whole), (grad_out, _columns(chunks))]
    inputs += [(total_BHT, totals), (grad_last, _some_columns(DIM))]
    outputs = [
        ((batch, heads, chunks, DIM, DIM), recall.dtype, _some_columns(chunks, DIM)),
        (grad_last.shape, jnp.float32, _some_columns(DIM)),
    ]
    return kernel_call(_recur_back_kernel, (DIM // _COLUMNS, heads, batch), inputs, outputs, _RECUR, interpret)


def _recur_back_kernel(k_ref, recall_ref, read_ref, grad_out_ref, total_ref, grad_last_ref, ends_ref, grad_state_ref):
    """The transpose of `_recur_kernel`, from the last chunk to the first."""
    chunks = ends_ref.shape[0]

    def step(i, grad):
        n = chunks - 1 - i
        part = pl.ds(n * CHUNK, CHUNK)
        end = _narrow(grad)
        ends_ref[n] = end
        last, total_C = total_ref[n * CHUNK + CHUNK - 1], total_ref[part]
        grad_delta = _narrow(_dot(k_ref[part], end) * jnp.exp(last - total_C)[:, None])
        grad = grad * jnp.exp(last) + _dot(read_ref[part], grad_out_ref[part], (0, 0))
        return grad - _dot(recall_ref[part], grad_delta, (0, 0))

    grad_state_ref[:] = lax.fori_loop(0, chunks, step, grad_last_ref[:])


def _halves(body, first):
    """A loop over halves of E: body(half, result so far) -> result."""
    return lax.fori_loop(0, 2, lambda i, x: body(pl.ds(i * (DIM // 2), DIM // 2), x), first)


def _read_back_kernel(
    q_ref, k_ref, fresh_ref, recall_ref, grad_out_ref, start_ref, end_ref, total_ref,
    grad_q_ref, grad_k_ref, grad_fresh_ref, grad_recall_ref, grad_total_ref,
):  # fmt: skip
    """From cotangents of a chunk's outputs and of its last state, those of all but `inverse`, keys' in part.

    Whole or unrolled, factors and sums would not fit the registers; what two loops need is computed in both.
    """
    total_C, last = total_ref[:], total_ref[CHUNK - 1]
    start_C, end_C = jnp.exp(total_C), jnp.exp(last - total_C)

    def grad_read(half):
        return _narrow(_dot(grad_out_ref[:], start_ref[half], (1, 1)))

    def attend(half, grad_CS):
        return grad_CS - _dot(grad_read(half), recall_ref[:, half], (1, 1))

    grad_attend_CS, decay_CS = _halves(attend, _dot(grad_out_ref[:], fresh_ref[:], (1, 1))), _decay(total_C)
    scores_CS = _dot(q_ref[:], k_ref[:], (1, 1)) * decay_CS
    weight_CS, attend_CS = grad_attend_CS * scores_CS, _narrow(scores_CS)
    grad_attend_CS = _narrow(grad_attend_CS * decay_CS)
    grad_total_C = jnp.sum(weight_CS, axis=1) - jnp.sum(weight_CS, axis=0)

    def queries(half, grad_total_C):
        read_CE = grad_read(half).astype(jnp.float32) * start_C[:, None]
        grad_q_ref[:, half] = _narrow(read_CE + _dot(grad_attend_CS, k_ref[:, half]))
        return grad_total_C + jnp.sum(read_CE * q_ref[:, half].astype(jnp.float32), axis=1)

    grad_total_C = _halves(queries, grad_total_C)

    def deltas(half, sums):
        delta = fresh_ref[:, half].astype(jnp.float32) - _dot(recall_ref[:], start_ref[:, half])
        grad_delta = _dot(k_ref[:], end_ref[:, half]) * end_C[:, None]
        grad_fresh_ref[:, half] = _narrow(grad_delta + _dot(attend_CS, grad_out_ref[:, half], (0, 0)))
        return sums + jnp.sum(grad_delta * delta, axis=1)

    weight_C = _halves(deltas, jnp.zeros((CHUNK,), jnp.float32))
    delta = _halves(lambda half, x: x - _dot(recall_ref[:, half], start_ref[half]), fresh_ref[:].astype(jnp.float32))
    delta = _narrow(delta * end_C[:, None])

    def keys(half, _):
        grad_k = _dot(delta, end_ref[half], (1, 1)) + _dot(grad_attend_CS, q_ref[:, half], (0, 0))
        grad_k_ref[:, half] = _narrow(grad_k)

    _halves(keys, None)
    grad_delta = _halves(lambda half, x: x + _dot(k_ref[:, half], end_ref[half]), jnp.zeros((CHUNK, DIM), jnp.float32))
    grad_delta = _narrow(grad_delta * end_C[:, None])

    def recalls(half, through):
        start = start_ref[half]
        grad = _dot(attend_CS, grad_read(half), (0, 0)) + _dot(grad_delta, start, (1, 1))
        grad_recall_ref[:, half] = _narrow(-grad)
        return through + jnp.sum(start.astype(jnp.float32) * end_ref[half].astype(jnp.float32))

    through = _halves(recalls, jnp.zeros((), jnp.float32))
    at_last = jnp.where(_is_last(), jnp.sum(weight_C) + through * jnp.exp(last), 0.0)
    grad_total_ref[:] = grad_total_C - weight_C + at_last


def _is_last():
    return lax.broadcasted_iota(jnp.int32, (CHUNK,), 0) == CHUNK - 1


def _prepare_back_kernel(
    k_ref, v_ref, inverse_ref, total_ref, beta_ref, grad_k_ref, grad_fresh_ref, grad_recall_ref, grad_total_ref,
    whole_k_ref, grad_v_ref, whole_total_ref, grad_beta_ref,
):  # fmt: skip
    """From cotangents of `fresh` and `recall` those of values and betas, and the rest of keys' and totals'."""
    k, inverse_CS, total_C, beta_C = k_ref[:], inverse_ref[:], total_ref[:], beta_ref[:]
    grad_fresh, grad_recall, start_C = grad_fresh_ref[:], grad_recall_ref[:], jnp.exp(total_C)
    solve_CS = inverse_CS * beta_C[None, :]
    grad_v_ref[:] = _narrow(_dot(_narrow(solve_CS), grad_fresh, (0, 0)))
    grad_k = _dot(_narrow(solve_CS * start_C[None, :]), grad_recall, (0, 0))
    by_start_CS = _dot(grad_recall, k, (1, 1)) * start_C[None, :]
    grad_solve_CS = _dot(grad_fresh, v_ref[:], (1, 1)) + by_start_CS
    grad_total_C = grad_total_ref[:] + jnp.sum(by_start_CS * solve_CS, axis=0)
    grad_beta_C = jnp.sum(grad_solve_CS * inverse_CS, axis=0)

    inner_CS = _dot(inverse_CS, grad_solve_CS * beta_C[None, :], (0, 0), _SPLIT)
    grad_lower_CS = -_dot(inner_CS, inverse_CS, (1, 1), _SPLIT)
    rows, columns = _positions(CHUNK)
    # Of the decay, what lies below the diagonal.
    grad_lower_CS = jnp.where(rows > columns, grad_lower_CS * _decay(total_C), 0.0)
    weight_CS = grad_lower_CS * _dot(k, k, (1, 1))
    grad_beta_ref[:] = grad_beta_C + jnp.sum(weight_CS, axis=1)
    weight_CS = weight_CS * beta_C[:, None]
    whole_total_ref[:] = grad_total_C + jnp.sum(weight_CS, axis=1) - jnp.sum(weight_CS, axis=0)
    grad_keys_CS = _narrow(grad_lower_CS * beta_C[:, None])
    grad_k = grad_k + _dot(grad_keys_CS, k) + _dot(grad_keys_CS, k, (0, 0))
    whole_k_ref[:] = _narrow(grad_k + grad_k_ref[:].astype(jnp.float32))
