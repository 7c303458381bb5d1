"""Scales, mins, d and dmin of Q4_K that fit given codes best: least squares on the grid that the format can hold.

Let O denote output features, I input features, S super-blocks, G sub-blocks in a super-block (8), N weights in a
sub-block (32) and B in a super-block (256). For fixed codes a weight is linear in the step d * scale and the offset
dmin * min of its sub-block, and the squared error a quadratic of the two; d and dmin are float16, scales and mins
integers, and its least value is searched among them. A move is taken only when it lowers the error.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sqjax.q4_k import MAX_SCALE, Q4K, SUB_BLOCK, SUB_BLOCKS, SUPER_BLOCK, dequantize

# Below this share of the product of its diagonal a determinant is rounding noise.
_SINGULAR = np.float32(1e-6)
_LARGEST_HALF = np.float32(65504)

# Rows that are fitted at once: bounds the temporaries.
_ROWS = 4096


def _safe(denominator: Array) -> Array:
    return jnp.where(denominator > 0, denominator, jnp.float32(1))


_matmul = functools.partial(jnp.matmul, precision="highest")


class Quadratic(NamedTuple):
    """How much a squared error grows when the step grows by u and the offset by v, for fixed codes:

    change(u, v) = 2 (slope_u u + slope_v v) + curve_uu u^2 + 2 curve_uv u v + curve_vv v^2.
    """

    slope_u: Array
    slope_v: Array
    curve_uu: Array
    curve_uv: Array
    curve_vv: Array

    def change(self, u: Array, v: Array) -> Array:
        bend = self.curve_uu * u * u + 2 * self.curve_uv * u * v + self.curve_vv * v * v
        return 2 * (self.slope_u * u + self.slope_v * v) + bend

    def moved(self, u: Array, v: Array) -> "Quadratic":
        """The same error seen from the point (u, v)."""
        slope_u = self.slope_u + self.curve_uu * u + self.curve_uv * v
        return self._replace(slope_u=slope_u, slope_v=self.slope_v + self.curve_uv * u + self.curve_vv * v)

    def best_v(self, u: Array) -> Array:
        return -(self.slope_v + self.curve_uv * u) / _safe(self.curve_vv)


def _better_six_bits(error: Quadratic, d: Array, dmin: Array, scales: Array, mins: Array) -> tuple[Array, Array]:
    """Returns the scale and min, of all 64 x 64, with the least error for fixed codes, d and dmin.

    For every scale the error is a parabola in the min, whose best integer is the one nearest to its vertex.
    """

    def attempt(best: tuple[Array, Array, Array], scale: Array) -> tuple[tuple[Array, Array, Array], None]:
        u = d * (scale - scales)
        min_ = jnp.clip(mins + jnp.round(error.best_v(u) / _safe(dmin)), 0, MAX_SCALE)
        candidate = (jnp.broadcast_to(scale, scales.shape), min_, error.change(u, dmin * (min_ - mins)))
        return tuple(jnp.where(candidate[2] < best[2], new, old) for new, old in zip(candidate, best)), None

    start = (scales, mins, jnp.zeros_like(scales))
    (scales, mins, _), _ = jax.lax.scan(attempt, start, jnp.arange(MAX_SCALE + 1, dtype=jnp.float32))
    return scales, mins


def half(x: Array) -> Array:
    return jnp.clip(x, 0, _LARGEST_HALF).astype(jnp.float16).astype(jnp.float32)


def _better_steps(error: Quadratic, d: Array, dmin: Array) -> tuple[Array, Array]:
    """Returns d and dmin, both float16 and non-negative, of less error for fixed codes, scales and mins.

    Tries the float16 numbers around the least-squares d, with the best dmin for each, and the best dmin for d itself.
    """
    determinant = error.curve_uu * error.curve_vv - error.curve_uv * error.curve_uv
    sound = determinant > _SINGULAR * error.curve_uu * error.curve_vv
    numerator = error.curve_uv * error.slope_v - error.curve_vv * error.slope_u
    vertex = half(d + jnp.where(sound, numerator / _safe(determinant), 0)).astype(jnp.float16)
    below, above = (jnp.nextafter(vertex, jnp.full_like(vertex, end)) for end in (0, _LARGEST_HALF))
    best = (d, dmin, jnp.zeros_like(d))
    for trial in (d, *(number.astype(jnp.float32) for number in (below, vertex, above))):
        dmin_trial = half(dmin + error.best_v(trial - d))
        candidate = (trial, dmin_trial, error.change(trial - d, dmin_trial - dmin))
        best = tuple(jnp.where(candidate[2] < best[2], new, old) for new, old in zip(candidate, best))
    return best[:2]


class Grid(NamedTuple):
    """The leaves of Q4K but for the codes, as float32 arrays with the sub-blocks first: [S], [S], [G, S] and [G, S]."""

    d: Array
    dmin: Array
    scales: Array
    mins: Array

    def moves(self, new: "Grid") -> tuple[Array, Array]:
        """Growth of the steps and of the offsets from this grid to another."""
        u = new.d[None] * new.scales - self.d[None] * self.scales
        return u, new.dmin[None] * new.mins - self.dmin[None] * self.mins

    def steps(self) -> tuple[Array, Array]:
        return self.d[None] * self.scales, self.dmin[None] * self.mins


def fit(x_NGS: Array, importance_NGS: Array, codes_NGS: Array, grid: Grid, rounds: int) -> Grid:
    """Alternates between d and dmin on one side and scales and mins on the other; never raises the error.

    Only the sums over N meet the weights; the alternation moves on the quadratics that they define.
    """
    step_GS, offset_GS = grid.steps()
    error_NGS = step_GS[None] * codes_NGS - offset_GS[None] - x_NGS
    terms = (codes_NGS * error_NGS, -error_NGS, codes_NGS * codes_NGS, -codes_NGS, jnp.ones_like(codes_NGS))
    error = Quadratic(*((importance_NGS * term).sum(0) for term in terms))

    def step(_: int, state: tuple[Quadratic, Grid]) -> tuple[Quadratic, Grid]:
        error, old = state
        s, m = old.scales, old.mins
        parts = (error.slope_u * s, error.slope_v * m, error.curve_uu * s * s)
        total = Quadratic(*(a.sum(0) for a in (*parts, error.curve_uv * s * m, error.curve_vv * m * m)))
        d, dmin = _better_steps(total, old.d, old.dmin)
        middle = Grid(d, dmin, s, m)
        error = error.moved(*old.moves(middle))
        new = Grid(d, dmin, *_better_six_bits(error, d[None], dmin[None], s, m))
        return error.moved(*middle.moves(new)), new

    return jax.lax.fori_loop(0, rounds, step, (error, grid))[1]


def grid_of(q: Q4K) -> Grid:
    return Grid(*(a.astype(jnp.float32).T for a in (q.d_OS, q.dmin_OS, q.scales_OSG, q.mins_OSG)))


def on_grid(grid: Grid, codes_OSGN: Array) -> Q4K:
    d, dmin = (a.T.astype(jnp.float16) for a in (grid.d, grid.dmin))
    return Q4K(d, dmin, grid.scales.T.astype(jnp.uint8), grid.mins.T.astype(jnp.uint8), codes_OSGN)


@functools.partial(jax.jit, static_argnames="rounds")
def least_squares_scales(
    weight_OI: Float[Array, "O I"], q: Q4K, importance_I: Float[Array, "*O I"], *, rounds: int = 4
) -> Q4K:
    """Returns `q` with d, dmin, scales and mins refitted to its codes, whose importance-weighted error never rises.

    Args:
      weight_OI: the matrix that `q` stands for.
      q: codes, and the grid to start from.
      importance_I: non-negative weight of every squared error, by column or by weight.
      rounds: alternations between (d, dmin) and (scales, mins); every half of one is exact but for the search of d,
        which tries the float16 numbers around the least-squares solution.
    """

    def row(leaves: tuple[Array, Array, Q4K]) -> Q4K:
        *rows, q = leaves
        x_NGS, importance_NGS = (a.astype(jnp.float32).reshape(-1, SUB_BLOCKS, SUB_BLOCK).T for a in rows)
        grid = fit(x_NGS, importance_NGS, q.codes_OSGN.T.astype(jnp.float32), grid_of(q), rounds)
        return on_grid(grid, q.codes_OSGN)

    importance_OI = jnp.broadcast_to(importance_I, weight_OI.shape)
    return jax.lax.map(row, (weight_OI, importance_OI, q), batch_size=_ROWS)


def _form(slopes: Array, gram: Array, basis: Array) -> Quadratic:
    slopes, curves = _matmul(basis, slopes), _matmul(basis, _matmul(gram, basis.T))
    return Quadratic(slopes[0], slopes[1], curves[0, 0], curves[0, 1], curves[1, 1])


def _fit_super_block(residual_I: Array, leaves: tuple[Array, Q4K], gram_II: Array) -> tuple[Array, Q4K]:
    """Refits one super-block of one row, sub-block by sub-block and then d and dmin; residual is error @ gram."""
    index, q = leaves
    start = index * SUPER_BLOCK
    rows_BI = jax.lax.dynamic_slice_in_dim(gram_II, start, SUPER_BLOCK)
    gram_BB = jax.lax.dynamic_slice_in_dim(rows_BI, start, SUPER_BLOCK, 1)
    d, dmin, scales_G, mins_G = grid_of(q)
    codes_GN = q.codes_OSGN.astype(jnp.float32)

    def sub_block(residual_I: Array, leaves: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        g, codes_N, scale, min_ = leaves
        rows_NI = jax.lax.dynamic_slice_in_dim(rows_BI, g * SUB_BLOCK, SUB_BLOCK)
        gram_NN = jax.lax.dynamic_slice_in_dim(rows_NI, start + g * SUB_BLOCK, SUB_BLOCK, 1)
        here_N = jax.lax.dynamic_slice_in_dim(residual_I, start + g * SUB_BLOCK, SUB_BLOCK)
        error = _form(here_N, gram_NN, jnp.stack([codes_N, -jnp.ones_like(codes_N)]))
        new_scale, new_min = _better_six_bits(error, d, dmin, scale, min_)
        move_N = d * (new_scale - scale) * codes_N - dmin * (new_min - min_)
        return residual_I + _matmul(move_N, rows_NI), (new_scale, new_min)

    leaves = (jnp.arange(SUB_BLOCKS), codes_GN, scales_G, mins_G)
    residual_I, (scales_G, mins_G) = jax.lax.scan(sub_block, residual_I, leaves)
    here_B = jax.lax.dynamic_slice_in_dim(residual_I, start, SUPER_BLOCK)
    mins_GN = jnp.broadcast_to(mins_G[:, None], codes_GN.shape)
    basis = jnp.stack([(scales_G[:, None] * codes_GN).ravel(), -mins_GN.ravel()])
    new_d, new_dmin = _better_steps(_form(here_B, gram_BB, basis), d, dmin)
    residual_I += _matmul((new_d - d) * basis[0] + (new_dmin - dmin) * basis[1], rows_BI)
    return residual_I, on_grid(Grid(new_d, new_dmin, scales_G, mins_G), q.codes_OSGN)


@functools.partial(jax.jit, static_argnames="sweeps")
def least_squares_scales_under_gram(
    weight_OI: Float[Array, "O I"], q: Q4K, gram_II: Float[Array, "I I"], *, sweeps: int = 2
) -> Q4K:
    """Returns `q` with d, dmin, scales and mins refitted to its codes, so that trace(E gram E^T) never rises.

    E is the error of the dequantized matrix. A sweep goes through the super-blocks of all rows at once, from left to
    right, and costs about four products of the matrix with the Gram; scales and mins are the exact best of a sub-block
    given everything else.

    Args:
      weight_OI: the matrix that `q` stands for.
      q: codes, and the grid to start from.
      gram_II: symmetric positive semi-definite input Gram, float32.
      sweeps: how often every super-block is visited.
    """

    def row(leaves: tuple[Array, Q4K]) -> Q4K:
        weight_I, q = leaves
        residual_I = _matmul(dequantize(q) - weight_I.astype(jnp.float32), gram_II)
        visit = functools.partial(_fit_super_block, gram_II=gram_II)
        blocks = jnp.arange(q.d_OS.shape[0])
        for _ in range(sweeps):
            residual_I, q = jax.lax.scan(visit, residual_I, (blocks, q))
        return q

    return jax.lax.map(row, (weight_OI, q), batch_size=_ROWS)
