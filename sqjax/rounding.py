"""Choosing Q4_K codes and scales under a second-order objective: error feedback and coordinate descent.

Letters: O out features, I in features, S super-blocks in a row (I / 256), G sub-blocks in a super-block (8), N weights
in a sub-block (32), Q sub-blocks in a row, P row groups, R rows of a group.

Every step has the signature `(problem, solution) -> solution`; steps know no model and can be chained, jitted and
vmapped over matrices of one shape. E = solution - target is an error, A the input Gram and G the output Gram of the
problem; the objective is trace(E^T G E A) / 2.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from sqjax import mesh as meshes
from sqjax.objective import Problem, matmul, upper_factor
from sqjax.q4_k import MAX_CODE, MAX_SCALE, Q4K, SUB_BLOCK, SUPER_BLOCK, dequantize, steps
from sqjax.scales import round_to_nearest, round_with_importance, search_super_blocks

FLOAT16_MAX = 65504.0
# Super-blocks whose scales are searched at once: what fits a core's cache, or fills an accelerator.
_SEARCHED = {"cpu": 1024, "gpu": 1 << 15, "tpu": 1 << 15}


def step_and_offset(solution: Q4K) -> tuple[Float[Array, "O I"], Float[Array, "O I"]]:
    """Returns, for every weight, the step and the offset of its sub-block: weight = step * code - offset."""
    return tuple(jnp.repeat(values.reshape(values.shape[0], -1), SUB_BLOCK, axis=1) for values in steps(solution))


def nearest(weight: Array, step: Array, offset: Array) -> Array:
    """Returns the codes, as float32, whose weights are nearest; a step of zero takes code 0."""
    code = jnp.round((weight + offset) / jnp.where(step == 0, 1.0, step))
    return jnp.where(step == 0, 0.0, jnp.clip(code, 0.0, MAX_CODE))


def to_nearest(problem: Problem) -> Q4K:
    """Rounds as llama.cpp does without an importance matrix; the Grams are not looked at."""
    return jax.tree.map(jnp.asarray, round_to_nearest(problem.weight_OI))


def by_importance(problem: Problem) -> Q4K:
    """Rounds as llama.cpp does with an importance matrix: the diagonal of the input Gram."""
    return jax.tree.map(jnp.asarray, round_with_importance(problem.weight_OI, jnp.diagonal(problem.gram_in_II)))


def search_scales(problem: Problem) -> Q4K:
    """Rounds with the best scales that the search finds under the diagonal of the input Gram."""
    shape = problem.weight_OI.shape
    importance_OI = jnp.broadcast_to(jnp.diagonal(problem.gram_in_II, axis1=-2, axis2=-1)[..., None, :], shape)
    return search(problem.weight_OI, importance_OI)


def feedback(problem: Problem, solution: Q4K | None, *, refit: bool = True) -> Q4K:
    """Rounds columns from left to right, each to the value that best makes good the errors before it.

    With A = V V^T, V upper triangular, the objective (G = identity) is |E V|^2 / 2, whose column j reads
    V_jj E_j + sum_{k<j} E_k V_kj: column j is therefore rounded to nearest of W_j - sum_{k<j} E_k V_kj / V_jj.
    With `refit` each super-block first gets new scales, searched on its shifted target under the weights V_jj^2, else
    the solution's scales are kept. A problem of stacked matrices gives a stacked solution.

    References:
      Frantar et al., GPTQ, 2023. https://arxiv.org/abs/2210.17323
      Chee et al., QuIP (LDLQ), 2023. https://arxiv.org/abs/2307.13304
    """
    if problem.weight_OI.ndim == 2:
        one = jax.tree.map(lambda leaf: leaf[None], (problem, solution))
        return jax.tree.map(lambda leaf: leaf[0], feedback(*one, refit=refit))
    weight_MOI = problem.weight_OI
    strict_MII, importance_MI = jax.vmap(_feedback_factors)(problem.gram_in_II)
    error_MOI = jnp.zeros_like(weight_MOI)
    blocks = []
    for s in range(weight_MOI.shape[-1] // SUPER_BLOCK):
        target_MON, importance_MON = _shifted_target(weight_MOI, error_MOI, strict_MII, importance_MI, s)
        if refit or solution is None:
            block = search(target_MON, importance_MON)
        else:
            block = jax.tree.map(lambda leaf: leaf[:, :, s : s + 1], solution)  # noqa: B023, used at once
        error_MOI, block = _round_super_block(weight_MOI, error_MOI, strict_MII, target_MON, block, s)
        blocks.append(block)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=2), *blocks)


@jax.jit
def _feedback_factors(gram_II):
    factor_II = upper_factor(gram_II)
    diagonal_I = jnp.diagonal(factor_II)
    return jnp.triu(factor_II / diagonal_I[None, :], 1), jnp.square(diagonal_I)


def _columns(array, s, axis):
    return jax.lax.dynamic_slice_in_dim(array, s * SUPER_BLOCK, SUPER_BLOCK, axis=axis)


@jax.jit
def _shifted_target(weight_MOI, error_MOI, strict_MII, importance_MI, s):
    # The error is still zero from this super-block on, so that all of it may be multiplied.
    target_MON = _columns(weight_MOI, s, 2) - matmul(error_MOI, _columns(strict_MII, s, 2))
    return target_MON, jnp.broadcast_to(_columns(importance_MI, s, 1)[:, None, :], target_MON.shape)


@functools.partial(jax.jit, donate_argnums=1)
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, None))
def _round_super_block(weight_OI, error_OI, strict_II, target_ON, block, s):
    weight_ON, within_NN = _columns(weight_OI, s, 1), _columns(_columns(strict_II, s, 1), s, 0)
    step_ON, offset_ON = step_and_offset(block)

    def column(error_ON, j):
        target_O = target_ON[:, j] - matmul(error_ON, within_NN[:, j])
        code_O = nearest(target_O, step_ON[:, j], offset_ON[:, j])
        error_O = step_ON[:, j] * code_O - offset_ON[:, j] - weight_ON[:, j]
        return error_ON.at[:, j].set(error_O), code_O.astype(jnp.uint8)

    error_ON, codes_NO = jax.lax.scan(column, jnp.zeros_like(target_ON), jnp.arange(SUPER_BLOCK))
    codes = codes_NO.T.reshape(block.codes_OSGN.shape)
    block = Q4K(block.d_OS, block.dmin_OS, block.scales_OSG, block.mins_OSG, codes)
    return jax.lax.dynamic_update_slice_in_dim(error_OI, error_ON, s * SUPER_BLOCK, axis=1), block


def search(weight_OI: Float[Array, "*O I"], importance_OI: Float[Array, "*O I"]) -> Q4K:
    """Searches scales on the device, so many super-blocks at a time that one program serves all shapes.

    Matrices that are spread over several devices are searched where they are.
    """
    if len(weight_OI.sharding.device_set) > 1:
        return _search_spread(weight_OI, importance_OI, mesh=weight_OI.sharding.mesh)
    shape = (*weight_OI.shape[:-1], weight_OI.shape[-1] // SUPER_BLOCK)
    blocks = [array.reshape(-1, SUPER_BLOCK) for array in (weight_OI, importance_OI)]
    count, size = blocks[0].shape[0], _SEARCHED[jax.default_backend()]
    parts = []
    for start in range(0, count, size):
        chunk = (jnp.pad(a[start : start + size], ((0, max(0, start + size - count)), (0, 0))) for a in blocks)
        parts.append(search_super_blocks(*chunk))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count].reshape(*shape, *leaves[0].shape[1:]), *parts)


@functools.partial(jax.jit, static_argnames="mesh")
def _search_spread(weight_MOI, importance_MOI, mesh):
    def on_device(weight_MOI, importance_MOI):
        shape = (*weight_MOI.shape[:-1], weight_MOI.shape[-1] // SUPER_BLOCK)
        blocks = [array.reshape(-1, SUPER_BLOCK) for array in (weight_MOI, importance_MOI)]
        count = blocks[0].shape[0]
        size = min(count, _SEARCHED[jax.default_backend()])
        chunks = [jnp.pad(a, ((0, -count % size), (0, 0))).reshape(-1, size, SUPER_BLOCK) for a in blocks]
        found = jax.lax.map(lambda chunk: search_super_blocks(*chunk), chunks)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], found)
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), flat)

    run = meshes.over(mesh, on_device, (meshes.BY_BATCH,) * 2, lambda _: meshes.BY_BATCH)
    return run(weight_MOI, importance_MOI)


@jax.jit
def two_sided_feedback(problem: Problem, solution: Q4K) -> Q4K:
    """Error feedback through both Grams: every code makes good the errors to its left and above it.

    With A = V V^T and G = U U^T, both upper triangular, the objective is |U^T E V|^2 / 2, and entry (i, j) of U^T E V
    has E_ij times U_ii V_jj plus terms of rows above i and columns before j alone. Codes on an anti-diagonal do not
    depend on each other and are rounded at once: O + I - 1 steps. The solution's scales are kept.

    References:
      Tseng et al., Model-Preserving Adaptive Rounding (YAQA), 2025. https://arxiv.org/abs/2505.22988
    """
    strict_II, _ = _feedback_factors(problem.gram_in_II)
    strict_OO, _ = _feedback_factors(_gram_out(problem))
    weight_OI = problem.weight_OI
    rows, columns = weight_OI.shape
    step_OI, offset_OI = step_and_offset(solution)
    row_O = jnp.arange(rows)

    def anti_diagonal(state, t):
        error_OI, mixed_IO, codes_OI = state
        column_O = t - row_O
        inside_O = (column_O >= 0) & (column_O < columns)
        column_O = jnp.clip(column_O, 0, columns - 1)
        here = (row_O, column_O)
        # Entries not yet reached are zero in both arrays, hence the sums run over left and above alone.
        left_O = jnp.sum(error_OI * strict_II.T[column_O], axis=1)
        above_O = jnp.sum(mixed_IO[column_O] * strict_OO.T, axis=1)
        code_O = nearest(weight_OI[here] - left_O - above_O, step_OI[here], offset_OI[here])
        error_O = step_OI[here] * code_O - offset_OI[here] - weight_OI[here]
        keep = lambda new, old: jnp.where(inside_O, new, old)  # noqa: E731
        return (
            error_OI.at[here].set(keep(error_O, error_OI[here])),
            mixed_IO.at[here[::-1]].set(keep(error_O + left_O, mixed_IO[here[::-1]])),
            codes_OI.at[here].set(keep(code_O, codes_OI[here])),
        ), None

    start = (jnp.zeros_like(weight_OI), jnp.zeros_like(weight_OI.T), jnp.zeros_like(weight_OI))
    (_, _, codes_OI), _ = jax.lax.scan(anti_diagonal, start, jnp.arange(rows + columns - 1))
    codes = codes_OI.astype(jnp.uint8).reshape(solution.codes_OSGN.shape)
    return Q4K(solution.d_OS, solution.dmin_OS, solution.scales_OSG, solution.mins_OSG, codes)


def _gram_out(problem: Problem) -> Float[Array, "O O"]:
    if problem.gram_out_OO is None:
        return jnp.eye(problem.weight_OI.shape[0], dtype=jnp.float32)
    return problem.gram_out_OO


@functools.partial(jax.jit, static_argnames=("sweeps", "groups"))
def descend_codes(problem: Problem, solution: Q4K, *, sweeps: int = 1, groups: int = 2) -> Q4K:
    """Coordinate descent on the codes: column by column, each code moves to the integer of least objective.

    In a column the rows are independent where G is the identity. Otherwise they are coupled by G, and move in `groups`
    interleaved groups; a group whose joint move would raise the objective moves its best row alone. The objective
    never rises, up to float32 rounding. (Two groups end within 0.1% of eight, in a quarter of the steps.)
    """
    problem, solution, groups, restore = _in_groups(problem, solution, groups)
    step_OI, offset_OI = step_and_offset(solution)
    codes_OI = solution.codes_OSGN.reshape(step_OI.shape).astype(jnp.float32)
    pull_IO = _pull(problem, step_OI * codes_OI - offset_OI - problem.weight_OI)
    # Leaves with the scanned axis first: [S G, N, O].
    codes_QNO, step_QNO = (a.T.reshape(-1, SUB_BLOCK, a.shape[0]) for a in (codes_OI, step_OI))

    def sub_block(pull_IO, inputs):
        q, codes_NO, step_NO = inputs
        gram_NN, slope_NO = _slope(problem, pull_IO, q * SUB_BLOCK, SUB_BLOCK)

        def column(slope_NO, inputs):
            n, code_O, step_O = inputs
            move = Partial(_to_integer, -code_O, MAX_CODE - code_O)
            own = gram_NN[n, n][None, None], slope_NO[n][None], step_O[None]
            _, shift_O, change_NO = _move_rows(*own, problem.gram_out_OO, move, groups)
            return slope_NO + gram_NN[:, n][:, None] * change_NO, (code_O + shift_O, change_NO[0])

        _, (codes_NO, change_NO) = jax.lax.scan(column, slope_NO, (jnp.arange(SUB_BLOCK), codes_NO, step_NO))
        return _add_rows(pull_IO, q * SUB_BLOCK, change_NO), codes_NO

    def sweep(state, _):
        pull_IO, codes_QNO = state
        return jax.lax.scan(sub_block, pull_IO, (jnp.arange(len(codes_QNO)), codes_QNO, step_QNO)), None

    (_, codes_QNO), _ = jax.lax.scan(sweep, (pull_IO, codes_QNO), None, length=sweeps)
    codes = codes_QNO.reshape(codes_OI.T.shape).T.astype(jnp.uint8).reshape(solution.codes_OSGN.shape)
    return restore(Q4K(solution.d_OS, solution.dmin_OS, solution.scales_OSG, solution.mins_OSG, codes))


@functools.partial(jax.jit, static_argnames=("sweeps", "groups"))
def descend_scales(problem: Problem, solution: Q4K, *, sweeps: int = 1, groups: int = 2) -> Q4K:
    """Coordinate descent on 6-bit scales and mins, then on the fp16 d and dmin, at fixed codes.

    Each is moved to the least-squares optimum of the objective along its own direction, rounded to its own grid:
    scale and min of one sub-block in every row, then d and dmin of one super-block. The objective never rises, up to
    float32 rounding.
    """
    problem, solution, groups, restore = _in_groups(problem, solution, groups)
    rows, blocks = solution.d_OS.shape
    pull_IO = _pull(problem, dequantize(solution) - problem.weight_OI)
    # Leaves with the scanned axis first: [S, O] and [S G, O], codes [S G, N, O].
    d_SO, dmin_SO = solution.d_OS.T.astype(jnp.float32), solution.dmin_OS.T.astype(jnp.float32)
    scales_QO, mins_QO = (a.reshape(rows, -1).T.astype(jnp.float32) for a in (solution.scales_OSG, solution.mins_OSG))
    codes_QNO = jnp.moveaxis(solution.codes_OSGN.reshape(rows, -1, SUB_BLOCK).astype(jnp.float32), 0, 2)
    sub_blocks = scales_QO.shape[0] // blocks

    def move_pair(pull_IO, start, directions, moves):
        """Moves two things that act on the same columns, one after the other."""
        gram_NN, slope_NO = _slope(problem, pull_IO, start, len(directions[0]))
        shifts = []
        for direction_NO, move in zip(directions, moves):
            slope_NO, shift_O, change_NO = _move_rows(
                gram_NN, slope_NO, direction_NO, problem.gram_out_OO, move, groups
            )
            pull_IO = _add_rows(pull_IO, start, change_NO)
            shifts.append(shift_O)
        return pull_IO, shifts

    def sub_block(state, inputs):
        pull_IO, d_SO, dmin_SO = state
        q, scale_O, min_O, codes_NO = inputs
        d_O, dmin_O = d_SO[q // sub_blocks], dmin_SO[q // sub_blocks]
        directions = d_O[None, :] * codes_NO, jnp.broadcast_to(-dmin_O[None, :], codes_NO.shape)
        moves = [Partial(_to_integer, -value_O, MAX_SCALE - value_O) for value_O in (scale_O, min_O)]
        pull_IO, shifts = move_pair(pull_IO, q * SUB_BLOCK, directions, moves)
        return (pull_IO, d_SO, dmin_SO), (scale_O + shifts[0], min_O + shifts[1])

    def super_block(pull_IO, inputs):
        s, d_O, dmin_O, scaled_NO, mins_NO = inputs
        moves = Partial(_to_float16, d_O), Partial(_to_float16, dmin_O)
        pull_IO, shifts = move_pair(pull_IO, s * SUPER_BLOCK, (scaled_NO, -mins_NO), moves)
        return pull_IO, (d_O + shifts[0], dmin_O + shifts[1])

    def sweep(state, _):
        pull_IO, d_SO, dmin_SO, scales_QO, mins_QO = state
        (pull_IO, _, _), (scales_QO, mins_QO) = jax.lax.scan(
            sub_block, (pull_IO, d_SO, dmin_SO), (jnp.arange(codes_QNO.shape[0]), scales_QO, mins_QO, codes_QNO)
        )
        scaled_SNO = (scales_QO[:, None, :] * codes_QNO).reshape(blocks, SUPER_BLOCK, rows)
        mins_SNO = jnp.repeat(mins_QO, SUB_BLOCK, axis=0).reshape(blocks, SUPER_BLOCK, rows)
        pull_IO, (d_SO, dmin_SO) = jax.lax.scan(
            super_block, pull_IO, (jnp.arange(blocks), d_SO, dmin_SO, scaled_SNO, mins_SNO)
        )
        return (pull_IO, d_SO, dmin_SO, scales_QO, mins_QO), None

    start = (pull_IO, d_SO, dmin_SO, scales_QO, mins_QO)
    (_, d_SO, dmin_SO, scales_QO, mins_QO), _ = jax.lax.scan(sweep, start, None, length=sweeps)
    shape = solution.scales_OSG.shape
    scales_OSG, mins_OSG = (a.T.astype(jnp.uint8).reshape(shape) for a in (scales_QO, mins_QO))
    d_OS, dmin_OS = d_SO.T.astype(jnp.float16), dmin_SO.T.astype(jnp.float16)
    return restore(Q4K(d_OS, dmin_OS, scales_OSG, mins_OSG, solution.codes_OSGN))


def _in_groups(problem, solution, groups):
    """Rows in an order in which each of the interleaved groups is contiguous, and what brings a solution's rows back.

    A group then reads its own rows of G and no others.
    """
    if problem.gram_out_OO is None:
        return problem, solution, 1, lambda solution: solution
    rows = problem.weight_OI.shape[0]
    groups = math.gcd(rows, groups)
    order_O = np.arange(rows).reshape(-1, groups).T.reshape(-1)
    gram_OO = problem.gram_out_OO[order_O][:, order_O]
    arranged = Problem(problem.weight_OI[order_O], problem.gram_in_II, gram_OO)
    arrange = lambda order_O, solution: jax.tree.map(lambda leaf: leaf[order_O], solution)  # noqa: E731
    return arranged, arrange(order_O, solution), groups, functools.partial(arrange, np.argsort(order_O))


def _pull(problem, error_OI):
    """(G E)^T, which the descents keep up to date: A times it is the gradient of the objective."""
    return (error_OI if problem.gram_out_OO is None else matmul(problem.gram_out_OO, error_OI)).T


def _slope(problem, pull_IO, start, width):
    """The Gram of the `width` columns from `start`, and the gradient of the objective in them."""
    gram_NI = jax.lax.dynamic_slice_in_dim(problem.gram_in_II, start, width, axis=0)
    return jax.lax.dynamic_slice_in_dim(gram_NI, start, width, axis=1), matmul(gram_NI, pull_IO)


def _add_rows(pull_IO, start, change_NO):
    block_NO = jax.lax.dynamic_slice_in_dim(pull_IO, start, len(change_NO), axis=0) + change_NO
    return jax.lax.dynamic_update_slice_in_dim(pull_IO, block_NO, start, axis=0)


def _to_integer(lower_O, upper_O, ideal_O):
    return jnp.clip(jnp.round(ideal_O), lower_O, upper_O)


def _to_float16(value_O, ideal_O):
    # A step once zero stays zero: its codes carry no information that a least-squares fit could use.
    return jnp.clip(value_O + ideal_O, 0.0, FLOAT16_MAX).astype(jnp.float16).astype(jnp.float32) - value_O


def _move_rows(gram_NN, slope_NO, direction_NO, gram_OO, move, groups):
    """Moves every row along its own direction; returns the slope there, the moves and the change of the pull.

    `move` takes the multiples of the directions that are ideal and returns multiples that the format can hold; its
    leaves have a value a row. Each group of rows moves on the slope that the groups before it left.
    """
    rows = direction_NO.shape[1]
    size = rows // groups
    curvature_O = jnp.sum(direction_NO * matmul(gram_NN, direction_NO), axis=0)
    own_O = curvature_O if gram_OO is None else jnp.diagonal(gram_OO) * curvature_O

    def propose(slope_NR, direction_NR, own_R, move):
        along_R = jnp.sum(direction_NR * slope_NR, axis=0)
        movable_R = own_R > 0
        delta_R = jnp.where(movable_R, move(-along_R / jnp.where(movable_R, own_R, 1.0)), 0.0)
        gain_R = delta_R * along_R + 0.5 * jnp.square(delta_R) * own_R
        return jnp.where(gain_R < 0, delta_R, 0.0), jnp.minimum(gain_R, 0.0)

    if gram_OO is None:
        shift_O, _ = propose(slope_NO, direction_NO, own_O, move)
        change_NO = direction_NO * shift_O[None, :]
        return slope_NO + matmul(gram_NN, change_NO), shift_O, change_NO

    def group(state, g):
        slope_NO, change_NO = state
        own_rows = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, g * size, size, axis=-1)  # noqa: E731
        slope_NR, direction_NR = own_rows(slope_NO), own_rows(direction_NO)
        gram_RO = jax.lax.dynamic_slice_in_dim(gram_OO, g * size, size, axis=0)
        delta_R, gain_R = propose(slope_NR, direction_NR, own_rows(own_O), jax.tree.map(own_rows, move))
        moved_NR = direction_NR * delta_R[None, :]
        pulled_NO = matmul(moved_NR, gram_RO)
        joint = jnp.sum(moved_NR * (slope_NR + 0.5 * matmul(gram_NN, own_rows(pulled_NO))))
        best = jnp.argmin(gain_R)
        accept = joint <= 0
        pulled_NO = jnp.where(accept, pulled_NO, moved_NR[:, best][:, None] * gram_RO[best][None, :])
        delta_R = jnp.where(accept | (jnp.arange(size) == best), delta_R, 0.0)
        return (slope_NO + matmul(gram_NN, pulled_NO), change_NO + pulled_NO), delta_R

    start = (slope_NO, jnp.zeros_like(slope_NO))
    (slope_NO, change_NO), shift_PR = jax.lax.scan(group, start, jnp.arange(groups))
    return slope_NO, shift_PR.reshape(rows), change_NO
