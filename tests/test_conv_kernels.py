"""The kernels of the short convolution, interpreted on the CPU, beside the plain form in float32 and in bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import conv_kernels
from sqjax.delta_kernels import DIM
from sqjax.model import plain_heads

UNIT, HEADS, TAPS, EPS = 2, 3, 4, 1e-6


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(function, dtype, x, weight):
    """Values and the gradients of a fixed weighting of them."""
    grad = jax.random.normal(jax.random.key(1), x.shape).astype(dtype)
    found, pull = jax.vjp(lambda x, weight: function(x.astype(dtype), weight, UNIT, EPS), x, weight)
    return found, *pull(grad)


@pytest.mark.parametrize("time", [64, 150, 3])
def test_results_and_gradients_are_as_close_to_float32_as_the_plain_form(time):
    rng = np.random.default_rng(time)
    # Numbers that bfloat16 holds, so that all three are given the same.
    x = jnp.asarray(rng.standard_normal((2, time, HEADS, DIM)), jnp.bfloat16).astype(jnp.float32)
    weight = jnp.asarray(rng.standard_normal((TAPS, HEADS, DIM)), jnp.float32)
    kernels = functools.partial(conv_kernels.heads, interpret=True)
    exact = results(plain_heads, jnp.float32, x, weight)
    narrow = [results(function, jnp.bfloat16, x, weight) for function in (kernels, plain_heads)]
    for found, plain, expected in zip(*narrow, exact, strict=True):
        assert found.dtype == plain.dtype and found.shape == expected.shape
        error, allowed = (np.linalg.norm(np.asarray(a, np.float32) - expected) for a in (found, plain))
        # The gradient of x is rounded twice, to where the plain form rounds it once.
        assert error <= 2.0 * allowed + 1e-6 * np.linalg.norm(expected)
        assert error <= 0.01 * np.linalg.norm(expected)
