"""Theorems of rounding under a second-order objective, on random matrices and no model."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import objective, rounding
from sqjax.objective import Problem, damp, proxy_loss, shape_gram, truncate_gram, upper_factor
from sqjax.q4_k import Q4K, dequantize

ROWS, COLUMNS = 24, 512


def gram(seed, size, spread=2.0):
    """A Gram of correlated inputs: eigenvalues over several decades in random directions."""
    key = jax.random.key(seed)
    basis, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (size, size)), np.float64))
    values = 10.0 ** np.linspace(-spread, spread, size)
    return jnp.asarray(basis @ np.diag(values / values.mean()) @ basis.T, jnp.float32)


def problem(seed=0, rows=ROWS, columns=COLUMNS, out=False):
    weight = jax.random.normal(jax.random.key(seed), (rows, columns)) * 0.02
    return Problem(weight, gram(seed + 1, columns), gram(seed + 2, rows, 1.0) if out else None)


def same(first, second):
    return all(bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))


def loss(case, solution):
    return float(proxy_loss(case, dequantize(solution)))


def test_upper_factor_reproduces_the_gram():
    matrix = gram(3, 64)
    factor = upper_factor(matrix)
    assert float(jnp.max(jnp.abs(jnp.tril(factor, -1)))) == 0
    np.testing.assert_allclose(np.asarray(factor @ factor.T), np.asarray(matrix), atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_shaping_raises_eigenvalues_to_a_power_and_keeps_the_trace(gamma):
    matrix = gram(4, 64)
    shaped = shape_gram(matrix, gamma, 0.1)
    damped = np.linalg.eigvalsh(np.asarray(matrix, np.float64)) + 0.1
    expected = damped**gamma * damped.sum() / (damped**gamma).sum()
    np.testing.assert_allclose(np.linalg.eigvalsh(np.asarray(shaped, np.float64)), expected, rtol=2e-3, atol=1e-4)


def test_truncation_keeps_the_largest_eigenvalues_and_the_trace():
    matrix = gram(5, 64)
    values = np.linalg.eigvalsh(np.asarray(truncate_gram(matrix, 8), np.float64))
    np.testing.assert_allclose(values[-8:], np.linalg.eigvalsh(np.asarray(matrix, np.float64))[-8:], rtol=1e-3)
    assert np.ptp(values[:-8]) < 1e-3 * values[-1]
    np.testing.assert_allclose(values.sum(), float(jnp.trace(matrix)), rtol=1e-4)


def test_cholesky_in_panels_is_the_cholesky_factor():
    # 700 columns fill the third panel in part; the lower factor of a Gram is unique.
    rows = np.random.default_rng(0).standard_normal((2, 1000, 700)).astype(np.float32)
    grams = np.einsum("bni,bnj->bij", rows, rows) / 1000
    factor = np.asarray(objective.cholesky_in_panels(jnp.asarray(grams)), np.float64)
    np.testing.assert_allclose(factor, np.linalg.cholesky(grams.astype(np.float64)), atol=2e-6)


def test_shaping_on_the_host_is_shaping_on_the_device(monkeypatch):
    matrix = gram(3, COLUMNS)
    expected = [shape_gram(matrix, 0.75, 0.01), truncate_gram(matrix, 16)]
    expected += [jnp.stack([shape_gram(matrix, gamma, 0.01) for gamma in (0.5, 1.0)])]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found = [shape_gram(matrix, 0.75, 0.01), truncate_gram(matrix, 16)]
    # Many exponents of one Gram within a program, as variants of a recipe have them.
    many = jax.jit(jax.vmap(shape_gram, in_axes=(None, 0, None)))
    found += [many(matrix, jnp.array([0.5, 1.0]), 0.01)]
    for result, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, value, atol=1e-4 * float(jnp.max(jnp.abs(value))))


def test_feedback_has_the_larger_weight_error_and_the_smaller_objective():
    case = problem()
    plain = rounding.search_scales(dataclasses.replace(case, gram_in_II=jnp.eye(COLUMNS)))
    kept = rounding.feedback(case, plain, refit=False)
    weight_error = lambda solution: float(jnp.sum(jnp.square(dequantize(solution) - case.weight_OI)))  # noqa: E731
    assert weight_error(kept) > weight_error(plain)
    assert loss(case, kept) < 0.7 * loss(case, plain)


def test_feedback_without_correlation_is_plain_rounding():
    case = dataclasses.replace(problem(), gram_in_II=shape_gram(gram(1, COLUMNS), 0.0, 0.01))
    plain = rounding.search_scales(case)
    assert same(rounding.feedback(case, plain, refit=False), plain)


def test_two_sided_feedback_with_identity_output_is_one_sided():
    case = problem()
    start = rounding.search_scales(case)
    one = rounding.feedback(case, start, refit=False)
    two = rounding.two_sided_feedback(dataclasses.replace(case, gram_out_OO=jnp.eye(ROWS)), start)
    # Sums in another order may send a tie the other way.
    assert float(jnp.mean(one.codes_OSGN == two.codes_OSGN)) > 0.999


def test_two_sided_feedback_lowers_the_two_sided_objective():
    case = problem(out=True)
    start = rounding.search_scales(case)
    one_sided = rounding.feedback(case, start, refit=False)
    assert loss(case, rounding.two_sided_feedback(case, start)) < loss(case, one_sided)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("descent", [rounding.descend_codes, rounding.descend_scales])
def test_descent_never_raises_the_objective(descent, out):
    case = problem(7, out=out)
    solution = rounding.search_scales(case)
    values = [loss(case, solution)]
    for _ in range(3):
        solution = descent(case, solution, sweeps=1)
        values.append(loss(case, solution))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(values)), values
    assert values[-1] < values[0]


def test_independent_rows_can_be_permuted():
    case = problem(8)
    order = jax.random.permutation(jax.random.key(0), ROWS)
    moved = dataclasses.replace(case, weight_OI=case.weight_OI[order])
    for step in (rounding.feedback, functools.partial(rounding.descend_codes, sweeps=1)):
        start = rounding.search_scales(case)
        expected = jax.tree.map(lambda leaf: leaf[order], step(case, start))
        assert same(step(moved, jax.tree.map(lambda leaf: leaf[order], start)), expected)


def test_vmapped_matrices_are_the_same_as_single_ones():
    cases = [problem(seed, out=True) for seed in (1, 5)]
    starts = [rounding.search_scales(case) for case in cases]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    together = jax.vmap(rounding.descend_codes)(stack(cases), stack(starts))
    for index, (case, start) in enumerate(zip(cases, starts)):
        single = rounding.descend_codes(case, start)
        codes = jax.tree.map(lambda leaf: leaf[index], together).codes_OSGN  # noqa: B023
        assert float(jnp.mean(codes == single.codes_OSGN)) > 0.999


def test_descent_is_within_reach_of_brute_force():
    """All codes of four free columns: the descent ends where no single code helps, within 10% of the optimum."""
    columns, free = 256, 4
    case = problem(9, rows=4, columns=columns)
    # Columns but the first four cost so much that they stay where they are.
    weight = np.asarray(case.weight_OI)
    matrix = np.eye(columns, dtype=np.float32) * 1e-6
    matrix[:free, :free] = np.asarray(gram(2, free, 0.7))
    case = Problem(jnp.asarray(weight), jnp.asarray(matrix))
    start = rounding.search_scales(case)
    step, offset = (np.asarray(values)[:, :free] for values in rounding.step_and_offset(start))
    every = np.stack(np.meshgrid(*[np.arange(16)] * free, indexing="ij"), -1).reshape(-1, 1, free)
    errors = every * step[None] - offset[None] - weight[None, :, :free]
    best = np.einsum("kri,ij,krj->kr", errors, matrix[:free, :free], errors).min(0)
    reached = np.asarray(
        dequantize(rounding.descend_codes(case, rounding.feedback(case, start, refit=False), sweeps=4))
    )
    error = (reached - weight)[:, :free]
    got = np.einsum("ri,ij,rj->r", error, matrix[:free, :free], error)
    assert np.all(got >= best * (1 - 1e-3))
    assert got.sum() <= 1.1 * best.sum()


def test_least_squares_d_is_the_optimum_of_a_line():
    """With one super-block and exact codes, the descent on scales recovers a scale that was bent away."""
    case = problem(10, rows=8, columns=256)
    solution = rounding.search_scales(case)
    bent = Q4K(
        (solution.d_OS.astype(jnp.float32) * 1.05).astype(jnp.float16),
        *(solution.dmin_OS, solution.scales_OSG, solution.mins_OSG, solution.codes_OSGN),
    )
    case = dataclasses.replace(case, weight_OI=dequantize(solution), gram_in_II=damp(case.gram_in_II, 0.1))
    repaired = rounding.descend_scales(case, bent, sweeps=8)
    assert loss(case, repaired) < 0.02 * loss(case, bent)
