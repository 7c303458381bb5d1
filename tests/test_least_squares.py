"""Refitting the grid to given codes: never worse, exact where it says so, undisturbed by the limits of the format."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import least_squares, q4_k, scales

RNG = np.random.default_rng(11)


def error(q, weight_OI, gram_II) -> np.ndarray:
    """Squared error of every row under a Gram, in float64."""
    difference_OI = np.asarray(q4_k.dequantize(q), np.float64) - weight_OI
    return np.einsum("oi,ij,oj->o", difference_OI, gram_II, difference_OI)


def problem(kind: str, rows: int = 24, columns: int = 512):
    draw = {"normal": RNG.standard_normal, "heavy": lambda shape: RNG.standard_t(2, shape)}[kind]
    weight_OI = np.asarray(0.03 * draw((rows, columns)), np.float32)
    # Codes that nearest rounding would not choose, as error feedback makes them.
    q = scales.round_to_nearest(weight_OI + 0.01 * RNG.standard_normal(weight_OI.shape).astype(np.float32))
    inputs_TI = RNG.standard_normal((700, columns)) @ (RNG.standard_normal((columns, columns)) * 0.05 + np.eye(columns))
    inputs_TI *= RNG.lognormal(0, 1, columns)
    return weight_OI, jax.tree.map(jnp.asarray, q), np.asarray(inputs_TI.T @ inputs_TI / 700, np.float32)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
def test_refitting_never_raises_the_error_and_keeps_the_codes(kind):
    weight_OI, q, gram_II = problem(kind)
    importance_I = np.diag(gram_II)
    for fitted, gram in (
        (least_squares.least_squares_scales(weight_OI, q, importance_I), np.diag(importance_I)),
        (least_squares.least_squares_scales_under_gram(weight_OI, q, gram_II), gram_II),
    ):
        before, after = error(q, weight_OI, gram), error(fitted, weight_OI, gram)
        assert q4_k.valid(fitted)
        np.testing.assert_array_equal(fitted.codes_OSGN, q.codes_OSGN)
        assert np.all(after <= before * (1 + 1e-6)) and after.sum() < 0.95 * before.sum()


def test_a_diagonal_gram_is_an_importance():
    weight_OI, q, gram_II = problem("normal")
    diagonal_I = np.diag(gram_II)
    by_importance = least_squares.least_squares_scales(weight_OI, q, diagonal_I, rounds=8)
    by_gram = least_squares.least_squares_scales_under_gram(weight_OI, q, np.diag(diagonal_I), sweeps=8)
    reached = [error(a, weight_OI, np.diag(diagonal_I)).sum() for a in (by_importance, by_gram)]
    np.testing.assert_allclose(reached[0], reached[1], rtol=1e-2)


def test_scales_and_mins_are_the_best_of_all_pairs():
    weight_OI, q, _ = problem("normal", 1, 256)
    importance_I = RNG.lognormal(0, 1, 256).astype(np.float32)
    fitted = jax.tree.map(np.asarray, least_squares.least_squares_scales(weight_OI, q, importance_I, rounds=6))
    best = error(fitted, weight_OI, np.diag(importance_I))
    for g, scale, min_ in itertools.product(range(8), range(64), range(0, 64, 3)):
        other = dataclasses.replace(fitted, scales_OSG=fitted.scales_OSG.copy(), mins_OSG=fitted.mins_OSG.copy())
        other.scales_OSG[0, 0, g], other.mins_OSG[0, 0, g] = scale, min_
        assert error(other, weight_OI, np.diag(importance_I)) >= best * (1 - 1e-6)


def test_a_matrix_that_the_grid_holds_is_found_again():
    _, q, _ = problem("normal")
    weight_OI = np.asarray(q4_k.dequantize(q))
    disturbed = dataclasses.replace(q, d_OS=(q.d_OS * np.float16(1.03)).astype(np.float16))
    ones_I = np.ones(weight_OI.shape[1], np.float32)
    fitted = least_squares.least_squares_scales(weight_OI, disturbed, ones_I, rounds=8)
    gram = np.eye(weight_OI.shape[1])
    assert error(fitted, weight_OI, gram).sum() < 1e-3 * error(disturbed, weight_OI, gram).sum()


@pytest.mark.parametrize("leaf", ["d_OS", "dmin_OS", "scales_OSG", "mins_OSG", "codes_OSGN"])
def test_empty_grids_and_importance_stay_valid(leaf):
    weight_OI, q, gram_II = problem("heavy", 4, 256)
    q = dataclasses.replace(q, **{leaf: jnp.zeros_like(getattr(q, leaf))})
    for importance_I in (np.diag(gram_II), np.zeros(256, np.float32)):
        before, gram = error(q, weight_OI, np.diag(importance_I)), np.diag(importance_I)
        for fitted in (
            least_squares.least_squares_scales(weight_OI, q, importance_I),
            least_squares.least_squares_scales_under_gram(weight_OI, q, gram),
        ):
            assert q4_k.valid(fitted) and np.all(error(fitted, weight_OI, gram) <= before * (1 + 1e-6))
