"""Scales, mins and codes of Q4_K: llama.cpp's own two searches, and better ones under a diagonal importance.

Let O denote output features, I input features, S super-blocks, G sub-blocks in a super-block (8), N weights in a
sub-block (32). Searches run on arrays [N, G, S]: every operation is elementwise over the last two axes, and the sums
over N that decide between candidates are taken in the order of the C loops.

Source: make_qkx2_quants, make_qkx3_quants, make_qp_quants, quantize_row_q4_K_ref and quantize_row_q4_K_impl in
ggml/src/ggml-quants.c of llama.cpp.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize as gguf_quantize
from jaxtyping import Array, Float, UInt8

from sqjax.least_squares import Grid, fit, grid_of, half, on_grid
from sqjax.q4_k import MAX_CODE, MAX_SCALE, Q4K, SUB_BLOCK, SUB_BLOCKS, SUPER_BLOCK

# Super-blocks that are searched at once: one compilation for all matrices, and temporaries of a few megabytes.
CHUNK = 1024

_LARGE = np.float32(3e38)
_LARGEST_HALF = np.float32(65504)
_REACH = _LARGEST_HALF * MAX_SCALE * MAX_CODE


def _rounded(product: Array) -> Array:
    """Returns `product`; XLA contracts a * b + c into one rounding, C without FMA does not: a bound stands between."""
    return jnp.where(product > _LARGE, _LARGE, product)


# XLA would replace x / 63 by x * (1 / 63) and 1 / (a / b) by b / a, and round otherwise than C.
_kept = jax.lax.optimization_barrier


def _ordered_sum(terms: list[Array]) -> Array:
    """Sums from the first term to the last, as a C loop does, where jnp.sum would build a tree."""
    return functools.reduce(lambda total, term: total + _rounded(term), terms[1:], _rounded(terms[0]))


def _sum_of_squares(x: Array) -> Array:
    """Sums over the first axis in order, in a loop: as an expression XLA would repeat the sum for every weight."""
    return jax.lax.scan(lambda total, x: (total + _rounded(x * x), None), jnp.zeros_like(x[0]), x, unroll=8)[0]


def _nearest_code(inverse: Array, x: Array, low: Array) -> Array:
    return jnp.clip(jnp.round(inverse * (x - low)), 0, MAX_CODE)


def _safe(denominator: Array) -> Array:
    return jnp.where(denominator > 0, denominator, jnp.float32(1))


def _apart(always: Array, function: Callable, *arguments: Array) -> Array | tuple[Array, ...]:
    """Returns function(*arguments) where `always` is true, which XLA cannot know and so computes once, in one place.

    Fused into each of its readers, a long sum would be repeated by every one of them: a third of the speed.
    """
    shapes = jax.eval_shape(function, *arguments)
    never = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.cond(always, function, lambda *_: never, *arguments)


def _code_sums(xs: list[Array], ws: list[Array], inverse: Array, low: Array) -> tuple[Array, Array, Array]:
    codes = [_nearest_code(inverse, x, low) for x in xs]
    terms = [(w * l, w * l * l, w * l * x) for w, l, x in zip(ws, codes, xs)]
    return tuple(_ordered_sum(list(column)) for column in zip(*terms))


def _code_error(xs: list[Array], ws: list[Array], scale: Array, offset: Array, inverse: Array, low: Array) -> Array:
    differences = [_rounded(scale * _nearest_code(inverse, x, low)) + offset - x for x in xs]
    return _ordered_sum([w * (e * e) for w, e in zip(ws, differences)])


def _regress(sum_w: Array, sum_x: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Returns scale and offset (<= 0) that fit scale * codes + offset to the weights, and the determinant to be > 0."""
    sum_l, sum_l2, sum_xl = sums
    determinant = _rounded(sum_w * sum_l2) - _rounded(sum_l * sum_l)
    scale = (_rounded(sum_w * sum_xl) - _rounded(sum_x * sum_l)) / _safe(determinant)
    offset = (_rounded(sum_l2 * sum_x) - _rounded(sum_l * sum_xl)) / _safe(determinant)
    scale = jnp.where(offset > 0, sum_xl / _safe(sum_l2), scale)
    return scale, jnp.minimum(offset, 0), determinant


def _search_sub_blocks(x_NGS: Array, importance_NGS: Array, numerators: np.ndarray) -> tuple[Array, Array, Array]:
    """Returns scale, min (>= 0) and codes of every sub-block, by make_qkx2_quants and make_qkx3_quants, which are one.

    Tries the inverse scales numerators / (max - min), refits scale and min to the codes of each by weighted least
    squares, and keeps the best. As in C the kept min replaces the running one, so that later candidates round from it
    and divide by the span that it leaves.
    """
    xs, ws = list(x_NGS), list(importance_NGS)
    low, high = functools.reduce(jnp.minimum, xs), functools.reduce(jnp.maximum, xs)
    low = jnp.minimum(low, 0)
    flat = high <= low
    high = jnp.where(flat, low + 1, high)
    sum_w, sum_x = _ordered_sum(ws), _ordered_sum([w * x for w, x in zip(ws, xs)])
    sums, error = functools.partial(_code_sums, xs, ws), functools.partial(_code_error, xs, ws)

    def step(best: tuple[Array, ...], numerator: Array) -> tuple[tuple[Array, ...], None]:
        low, _, least, _, _ = best
        inverse = numerator / (high - low)
        scale, offset, determinant = _regress(sum_w, sum_x, _apart(numerator > 0, sums, inverse, low))
        now = _apart(numerator > 0, error, scale, offset, inverse, low)
        better = (determinant > 0) & (now < least)
        candidate = (offset, scale, now, inverse, low)
        return tuple(jnp.where(better, new, old) for new, old in zip(candidate, best)), None

    inverse = _kept(jnp.float32(MAX_CODE) / (high - low))
    scale = 1 / inverse
    start = (low, scale, error(scale, low, inverse, low), inverse, low)
    (offset, scale, _, inverse, low), _ = jax.lax.scan(step, start, jnp.asarray(numerators))
    codes_NGS = jnp.where(flat[None], 0, _nearest_code(inverse[None], x_NGS, low[None]))
    return jnp.where(flat, 0, scale), -offset, codes_NGS


def _numerators(first: float, delta: float, count: int) -> np.ndarray:
    return np.float32(first) + np.float32(delta) * np.arange(count, dtype=np.float32) + np.float32(MAX_CODE)


_PLAIN_NUMERATORS = _numerators(-1.0, 0.1, 21)
_IMPORTANCE_NUMERATORS = _numerators(-0.9, 0.05, 37)
_SIX_BIT_NUMERATORS = np.float32(0.1) * np.float32([0, -4, -3, -2, -1, 1, 2, 3, 4]) + np.float32(MAX_SCALE)
# Below this llama.cpp takes a group of values for zeros.
_NOTHING = np.float32(1e-15)
_LEAST_SHARE = np.float32(1e-5)


def _six_bits(values_GS: Array) -> tuple[Array, Array]:
    """Returns step and 6-bit integers of non-negative values: the largest becomes 63, the others the nearest."""
    largest_S = values_GS.max(0)
    inverse_S = jnp.where(largest_S > 0, MAX_SCALE / _safe(largest_S), 0)
    step_S = largest_S / _kept(jnp.full_like(largest_S, MAX_SCALE))
    return step_S, jnp.clip(jnp.round(inverse_S[None] * values_GS), 0, MAX_SCALE)


def _weighted_six_bits(values_GS: Array, weight_GS: Array) -> tuple[Array, Array]:
    """Returns step and 6-bit integers of non-negative values that nearly minimise the weighted error (make_qp_quants).

    The best of nine steps, then five rounds of coordinate ascent of the correlation that least squares leaves.
    """
    largest_S = values_GS.max(0)
    zero_S = largest_S < _NOTHING
    bound_S = jnp.where(zero_S, jnp.float32(1), largest_S)

    def nearest(inverse_S: Array) -> Array:
        return jnp.clip(jnp.round(inverse_S[None] * values_GS), 0, MAX_SCALE)

    def attempt(best: tuple[Array, Array], numerator: Array) -> tuple[tuple[Array, Array], None]:
        inverse_S = _kept(numerator / bound_S)
        difference_GS = values_GS - _rounded((1 / inverse_S)[None] * nearest(inverse_S))
        now = _ordered_sum(list(weight_GS * difference_GS * difference_GS))
        return tuple(jnp.where(now < best[1], new, old) for new, old in zip((inverse_S, now), best)), None

    def ascend(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        integers_GS, sum_lx, sum_l2 = state
        i = step % SUB_BLOCKS
        x, w, l = values_GS[i], weight_GS[i], integers_GS[i]
        rest_lx, rest_l2 = sum_lx - _rounded(w * x * l), sum_l2 - _rounded(w * l * l)
        new = jnp.minimum(jnp.round(x * rest_l2 / _safe(rest_lx)), MAX_SCALE)
        new_lx, new_l2 = rest_lx + _rounded(w * x * new), rest_l2 + _rounded(w * new * new)
        better = (rest_lx > 0) & (rest_l2 > 0) & (new != l)
        better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        integers_GS = integers_GS.at[i].set(jnp.where(better, new, l))
        return integers_GS, jnp.where(better, new_lx, sum_lx), jnp.where(better, new_l2, sum_l2)

    nothing = (jnp.zeros_like(bound_S), jnp.full_like(bound_S, jnp.inf))
    (inverse_S, _), _ = jax.lax.scan(attempt, nothing, jnp.asarray(_SIX_BIT_NUMERATORS))
    integers_GS = nearest(inverse_S)
    sum_lx = _ordered_sum(list(weight_GS * values_GS * integers_GS))
    sum_l2 = _ordered_sum(list(weight_GS * integers_GS * integers_GS))
    integers_GS, sum_lx, sum_l2 = jax.lax.fori_loop(0, 5 * SUB_BLOCKS, ascend, (integers_GS, sum_lx, sum_l2))
    step_S = jnp.where(zero_S | (sum_l2 <= 0), 0, sum_lx / _safe(sum_l2))
    return step_S, jnp.where(zero_S[None], 0, integers_GS)


def _finish(x_NGS: Array, codes_NGS: Array, steps_S: tuple[Array, Array], sixes_GS: tuple[Array, Array]) -> Q4K:
    """Rounds the steps to float16 and chooses the nearest codes; a sub-block without scale keeps its first ones."""
    # Where C would write an infinity, which no reader accepts, the largest float16 stands.
    d_S, dmin_S = (jnp.clip(step, 0, _LARGEST_HALF).astype(jnp.float16) for step in steps_S)
    step_GS, offset_GS = (a.astype(jnp.float32)[None] * b for a, b in zip((d_S, dmin_S), sixes_GS))
    # Weight by weight, since XLA turns the division by a broadcast array into a multiplication by its rounded inverse.
    nearest_NGS = jnp.stack([jnp.clip(jnp.round((x + offset_GS) / _safe(step_GS)), 0, MAX_CODE) for x in x_NGS])
    codes_NGS = jnp.where(step_GS[None] > 0, nearest_NGS, codes_NGS)
    scales_GS, mins_GS = sixes_GS
    return Q4K(d_S, dmin_S, *(a.T.astype(jnp.uint8) for a in (scales_GS, mins_GS, codes_NGS)))


def _lanes(weight_SI: Array) -> Array:
    # Beyond the reach of the format nothing but the largest step can stand, and sums of squares would overflow.
    return jnp.clip(weight_SI, -_REACH, _REACH).reshape(-1, SUB_BLOCKS, SUB_BLOCK).T


def _importance_lanes(importance_SI: Array) -> Array:
    """Returns the importance divided by a power of two for each super-block.

    Sums scale exactly and choices stay, except where the third powers that C compares leave the range of float32.
    """
    _, exponent_S = jnp.frexp(importance_SI.max(1))
    return jnp.ldexp(importance_SI, -exponent_S[:, None]).reshape(-1, SUB_BLOCKS, SUB_BLOCK).T


@jax.jit
def _plain(weight_SI: Array) -> Q4K:
    x_NGS = _lanes(weight_SI)
    importance_NGS = jnp.sqrt(_sum_of_squares(x_NGS) / SUB_BLOCK)[None] + jnp.abs(x_NGS)
    scale_GS, min_GS, codes_NGS = _search_sub_blocks(x_NGS, importance_NGS, _PLAIN_NUMERATORS)
    (d_S, scales_GS), (dmin_S, mins_GS) = _six_bits(scale_GS), _six_bits(min_GS)
    return _finish(x_NGS, codes_NGS, (d_S, dmin_S), (scales_GS, mins_GS))


@jax.jit
def _with_importance(weight_SI: Array, importance_SI: Array) -> Q4K:
    x_NGS, importance_NGS = _lanes(weight_SI), _importance_lanes(importance_SI)
    x_IS = x_NGS.swapaxes(0, 1).reshape(SUPER_BLOCK, -1)
    variance_S = 2 * _sum_of_squares(x_IS) / SUPER_BLOCK
    importance_NGS = importance_NGS * jnp.sqrt(variance_S[None, None] + _rounded(x_NGS * x_NGS))
    scale_GS, min_GS, codes_NGS = _search_sub_blocks(x_NGS, importance_NGS, _IMPORTANCE_NUMERATORS)
    sum_GS = _ordered_sum(list(importance_NGS))
    steps, sixes = _weighted_six_bits(jnp.concatenate([scale_GS, min_GS], 1), jnp.concatenate([sum_GS, sum_GS], 1))
    return _finish(x_NGS, codes_NGS, jnp.split(steps, 2), jnp.split(sixes, 2, 1))


def _in_chunks(function: Callable[..., Q4K], *arrays_SI: np.ndarray) -> Q4K:
    """Applies `function` to CHUNK super-blocks at a time, the last ones filled up with zeros, into numpy leaves.

    The first array says how many super-blocks there are; a shorter one is repeated.
    """
    count = arrays_SI[0].shape[0]
    result = Q4K(
        *(np.empty(count, np.float16) for _ in range(2)),
        *(np.empty((count, SUB_BLOCKS), np.uint8) for _ in range(2)),
        np.empty((count, SUB_BLOCKS, SUB_BLOCK), np.uint8),
    )

    def convert(start: int) -> None:
        here = min(CHUNK, count - start)
        chunk = [a.take(range(start, start + here), axis=0, mode="wrap").astype(np.float32) for a in arrays_SI]
        part = function(*(np.pad(a, ((0, CHUNK - here), (0, 0))) for a in chunk))
        for whole, new in zip(jax.tree.leaves(result), jax.tree.leaves(part)):
            whole[start : start + here] = np.asarray(new)[:here]

    # One alone, which compiles; a search occupies one core of a host, so that as many run at once as there are.
    convert(0)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(convert, range(CHUNK, count, CHUNK)))
    return result


def _super_blocks(weight_OI: np.ndarray) -> np.ndarray:
    if weight_OI.ndim != 2 or weight_OI.shape[1] % SUPER_BLOCK:
        raise ValueError(f"Q4_K needs a matrix whose rows are multiples of {SUPER_BLOCK} long, not {weight_OI.shape}")
    return np.asarray(weight_OI).reshape(-1, SUPER_BLOCK)


def _importance_blocks(weight_OI: np.ndarray, importance_I: np.ndarray) -> np.ndarray:
    if importance_I.shape not in (weight_OI.shape, weight_OI.shape[1:]):
        raise ValueError(f"importance of shape {importance_I.shape} for a matrix of shape {weight_OI.shape}")
    return np.asarray(importance_I).reshape(-1, SUPER_BLOCK)


def _as_matrix(q: Q4K, rows: int) -> Q4K:
    return jax.tree.map(lambda a: a.reshape(rows, -1, *a.shape[1:]), q)


def round_to_nearest(weight_OI: Float[Array | np.ndarray, "O I"]) -> Q4K:
    """Returns the Q4_K matrix that llama.cpp's plain rounding (quantize_row_q4_K_ref) makes, as numpy leaves.

    Raises:
      ValueError: the rows are not a multiple of 256 long.
    """
    return _as_matrix(_in_chunks(_plain, _super_blocks(weight_OI)), weight_OI.shape[0])


def round_with_importance(
    weight_OI: Float[Array | np.ndarray, "O I"], importance_I: Float[Array | np.ndarray, " I"]
) -> Q4K:
    """Returns the Q4_K matrix that llama.cpp makes with an importance matrix (quantize_row_q4_K_impl), as numpy leaves.

    Args:
      weight_OI: the matrix.
      importance_I: mean square of every input, as an importance-matrix file holds it; only ratios within a row matter.

    Raises:
      ValueError: the rows are not a multiple of 256 long, or the importance has another length.
    """
    blocks = _super_blocks(weight_OI), _importance_blocks(weight_OI, importance_I)
    return _as_matrix(_in_chunks(_with_importance, *blocks), weight_OI.shape[0])


def round_q5_0(weight_OI: Float[np.ndarray, "O I"]) -> UInt8[np.ndarray, "O B"]:
    """Returns the packed Q5_0 rows that stand in for Q4_K where a row is a multiple of 32 but not of 256 long."""
    return gguf_quantize(np.asarray(weight_OI, np.float32), GGMLQuantizationType.Q5_0)


# The search: starting points of step and offset, as shares of the sub-block's span; d and dmin tried per super-block,
# by what the largest scale or min becomes; how many d are paired with every dmin; moves of a scale and its min.
_SPAN_SHARES = np.array([(u, v) for v in (-0.2, 0.3, 1.0) for u in np.linspace(0.7, 1.05, 12)], np.float32)
_LARGEST_SIX_BITS = np.linspace(32, 64, 64, dtype=np.float32)
_PAIRED = 4
_NEIGHBOURS = np.array([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], np.float32)


def _least(candidates: tuple[Array, ...], best: tuple[Array, ...]) -> tuple[Array, ...]:
    """Takes, element by element, the tuple whose last entry is smaller."""
    return tuple(jnp.where(candidates[-1] < best[-1], new, old) for new, old in zip(candidates, best))


def _best_steps_and_offsets(xs: list[Array], ws: list[Array]) -> tuple[Array, Array]:
    """Returns the real step and offset (>= 0) of every sub-block that the best of many starting points leads to.

    Every start is refitted to its nearest codes twice (Lloyd's algorithm).
    """
    low = jnp.minimum(functools.reduce(jnp.minimum, xs), 0)
    span = jnp.maximum(functools.reduce(jnp.maximum, xs) - low, _NOTHING)
    sum_w, sum_x = _ordered_sum(ws), _ordered_sum([w * x for w, x in zip(ws, xs)])
    sums, error = functools.partial(_code_sums, xs, ws), functools.partial(_code_error, xs, ws)

    def attempt(best: tuple[Array, ...], shares: Array) -> tuple[tuple[Array, ...], None]:
        always = shares[0] > 0
        scale = span * shares[0] / MAX_CODE
        offset = jnp.minimum(low + shares[1] * scale, 0)

        def refit(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
            fitted = _regress(sum_w, sum_x, _apart(always, sums, 1 / state[0], state[1]))
            sound = (fitted[2] > 0) & (fitted[0] > 0)
            return tuple(jnp.where(sound, new, old) for new, old in zip(fitted, state))

        scale, offset = jax.lax.fori_loop(0, 2, refit, (scale, offset))
        now = _apart(always, error, scale, offset, 1 / scale, offset)
        return _least((scale, -offset, now), best), None

    start = (span / MAX_CODE, -low, jnp.full_like(low, jnp.inf))
    return jax.lax.scan(attempt, start, jnp.asarray(_SPAN_SHARES))[0][:2]


def _choose_grid(steps_GS: Array, offsets_GS: Array, sums: tuple[Array, ...]) -> Grid:
    """Returns the grid that comes nearest to real steps and offsets in the metric of the sums of their codes.

    For every d the scales are the nearest and the offsets follow (a parabola); the best few d are then paired with
    every dmin.
    """
    sum_w, sum_l, sum_l2 = sums

    def scales_of(d_S: Array) -> tuple[Array, Array, Array]:
        scales_GS = jnp.clip(jnp.round(steps_GS / _safe(d_S)[None]), 0, MAX_SCALE)
        u_GS = scales_GS * d_S[None] - steps_GS
        return scales_GS, u_GS, jnp.maximum(sum_l * u_GS / _safe(sum_w), -offsets_GS)

    def change(u_GS: Array, v_GS: Array) -> Array:
        return (sum_l2 * u_GS * u_GS - 2 * sum_l * u_GS * v_GS + sum_w * v_GS * v_GS).sum(0)

    def with_dmin(d_S: Array, dmin_S: Array) -> tuple[Array, ...]:
        scales_GS, u_GS, v_GS = scales_of(d_S)
        mins_GS = jnp.clip(jnp.round((offsets_GS + v_GS) / _safe(dmin_S)[None]), 0, MAX_SCALE)
        now_S = change(u_GS, mins_GS * dmin_S[None] - offsets_GS)
        return d_S, dmin_S, scales_GS, mins_GS, now_S

    shares = jnp.asarray(1 / _LARGEST_SIX_BITS)[:, None]
    d_CS, dmin_CS = (half(shares * a.max(0)[None]) for a in (steps_GS, offsets_GS))
    change_CS = jax.lax.map(lambda d_S: change(*scales_of(d_S)[1:]), d_CS)
    best_SC = jax.lax.top_k(-change_CS.T, _PAIRED)[1]
    paired_CS = jnp.take_along_axis(d_CS, best_SC.T, 0)
    pairs = (jnp.repeat(paired_CS, len(dmin_CS), 0), jnp.tile(dmin_CS, (_PAIRED, 1)))

    def attempt(best: tuple[Array, ...], pair: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        return _least(with_dmin(*pair), best), None

    first = with_dmin(pairs[0][0], pairs[1][0])
    return Grid(*jax.lax.scan(attempt, first, pairs)[0][:4])


def _grid_error(xs: list[Array], ws: list[Array], grid: Grid) -> Array:
    step_GS, offset_GS = grid.steps()
    return _code_error(xs, ws, step_GS, -offset_GS, 1 / jnp.where(step_GS > 0, step_GS, jnp.inf), -offset_GS)


def _grid_codes(xs: list[Array], grid: Grid) -> Array:
    step_GS, offset_GS = grid.steps()
    inverse_GS = 1 / jnp.where(step_GS > 0, step_GS, jnp.inf)
    return jnp.stack([_nearest_code(inverse_GS, x, -offset_GS) for x in xs])


def _visit_neighbours(xs: list[Array], ws: list[Array], grid: Grid) -> Grid:
    """Returns the grid whose scales and mins are the best of themselves and their neighbours, with nearest codes."""

    def attempt(best: tuple[Array, ...], move: Array) -> tuple[tuple[Array, ...], None]:
        scales, mins = (jnp.clip(a + by, 0, MAX_SCALE) for a, by in zip((grid.scales, grid.mins), move))
        now = _apart(move[0] < 2, functools.partial(_grid_error, xs, ws), grid._replace(scales=scales, mins=mins))
        return _least((scales, mins, now), best), None

    start = (grid.scales, grid.mins, jnp.full_like(grid.mins, jnp.inf))
    scales, mins, _ = jax.lax.scan(attempt, start, jnp.asarray(_NEIGHBOURS))[0]
    return grid._replace(scales=scales, mins=mins)


@jax.jit
def _improve_on(llama_cpp: Q4K, weight_SI: Array, importance_SI: Array) -> Q4K:
    x_NGS, importance_NGS = _lanes(weight_SI), _importance_lanes(importance_SI)
    share_S = importance_NGS.mean((0, 1)) * _LEAST_SHARE
    # A share of the mean keeps weights without importance, which the calibration never met, on a sensible grid.
    weight_NGS = importance_NGS + jnp.where(share_S > 0, share_S, jnp.float32(1))[None, None]
    xs, ws = list(x_NGS), list(weight_NGS)
    steps_GS, offsets_GS = _best_steps_and_offsets(xs, ws)
    sum_l, sum_l2, _ = _code_sums(xs, ws, 1 / steps_GS, -offsets_GS)
    grid = _choose_grid(steps_GS, offsets_GS, (weight_NGS.sum(0), sum_l, sum_l2))

    def improve(_: int, grid: Grid) -> Grid:
        grid = _visit_neighbours(xs, ws, grid)
        return fit(x_NGS, weight_NGS, _grid_codes(xs, grid), grid, rounds=2)

    grid = jax.lax.fori_loop(0, 2, improve, grid)
    # llama.cpp's own grid stands wherever it is better under the importance as it was given.
    theirs = grid_of(llama_cpp)
    exact_error = functools.partial(_grid_error, xs, list(importance_NGS))
    error_2GS = jax.lax.map(exact_error, jax.tree.map(lambda *a: jnp.stack(a), grid, theirs))
    worse_S = error_2GS[1].sum(0) < error_2GS[0].sum(0)
    grid = jax.tree.map(lambda new, old: jnp.where(worse_S, old, new), grid, theirs)
    return on_grid(grid, _grid_codes(xs, grid).T.astype(jnp.uint8))


def search_super_blocks(weight_SI: Float[Array, "S 256"], importance_SI: Float[Array, "S 256"]) -> Q4K:
    """Searches, on the device, as `search` does; a row is a super-block and the leaves of the result start with S."""
    return _improve_on(_with_importance(weight_SI, importance_SI), weight_SI, importance_SI)


def search(weight_OI: Float[Array | np.ndarray, "O I"], importance_I: Float[Array | np.ndarray, "*O I"]) -> Q4K:
    """Returns, as numpy leaves, a Q4_K matrix of small importance-weighted squared error, below llama.cpp's everywhere.

    Finds the real step and offset of every sub-block, then the d and dmin that stand for all eight, then alternates
    between neighbouring scales and mins, nearest codes and least squares. The codes are the nearest ones, so that the
    grid alone is the result; error feedback may choose other codes on it.

    Args:
      weight_OI: the matrix.
      importance_I: non-negative weight of every squared error, by column or by weight; only ratios within a super-block
        matter.

    Raises:
      ValueError: the rows are not a multiple of 256 long, or the importance has another shape.
    """
    blocks = _super_blocks(weight_OI), _importance_blocks(weight_OI, importance_I)
    return _as_matrix(_in_chunks(search_super_blocks, *blocks), weight_OI.shape[0])
