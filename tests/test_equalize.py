"""Channel scales: free in function, worth a lot where channels differ."""

import jax
import jax.numpy as jnp
import numpy as np

from sqjax.equalize import equalizing_scale, expected_error
from sqjax.q4_k import dequantize
from sqjax.scales import round_to_nearest


def test_expected_error_predicts_plain_rounding():
    weight = jax.random.normal(jax.random.key(0), (64, 512)) * 0.1
    ones = jnp.ones(64), jnp.ones(512)
    measured = float(jnp.sum(jnp.square(jnp.asarray(dequantize(round_to_nearest(weight))) - weight)))
    # The search of scales gains some tenths over the minimum and maximum that the estimate assumes.
    assert 0.6 * float(expected_error(weight, *ones)) < measured < float(expected_error(weight, *ones))


def test_scales_undo_what_made_channels_unequal():
    key = jax.random.key(1)
    weight = jax.random.normal(key, (64, 512)) * 0.1
    planted = 2.0 ** jnp.round(jax.random.normal(jax.random.key(2), (512,)))
    cost = jnp.square(planted)
    scale = equalizing_scale([(weight / planted[None, :], jnp.ones(64))], cost, jnp.arange(512))
    error = lambda scale: float(expected_error(weight / planted[None] * scale[None], jnp.ones(64), cost / scale**2))  # noqa: E731
    even = float(expected_error(weight, jnp.ones(64), jnp.ones(512)))
    assert error(jnp.ones(512)) > 1.5 * even
    assert error(scale) <= 1.01 * even


def test_tied_columns_share_one_scale():
    weight = jax.random.normal(jax.random.key(3), (16, 512))
    tie = jnp.tile(jnp.arange(128), 4)
    scale = equalizing_scale([(weight, jnp.ones(16))], jnp.ones(512), tie, updates=20)
    np.testing.assert_array_equal(np.asarray(scale[:128]), np.asarray(scale[384:]))
