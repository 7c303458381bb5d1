"""The gated delta rule: its definition against NumPy in float64, its chunked form against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import delta_rule

BATCH, TIME, DIM = 2, 150, 32
# Compiled once a shape for all tests; 150 tokens are two chunks and a part of a third.
RECURRENT = jax.jit(delta_rule.recurrent)
CHUNKED = jax.jit(delta_rule.chunked, static_argnames=("chunk", "dtype"))


def draw(time=TIME, key_heads=2, heads=4, *, cosine=0.99, decay=0.05, seed=0):
    """Unit queries and keys, keys with a mean cosine near `cosine`, betas near 1, mean log-decay -`decay`."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    common = unit(rng.standard_normal((BATCH, 1, key_heads, DIM)))
    own = unit(rng.standard_normal((BATCH, time, key_heads, DIM)))
    q, k = unit(rng.standard_normal(own.shape)), unit(cosine**0.5 * common + (1 - cosine) ** 0.5 * own)
    v = rng.standard_normal((BATCH, time, heads, DIM))
    log_decay = -decay * rng.exponential(size=(BATCH, time, heads))
    beta = rng.uniform(0.8, 1.0, (BATCH, time, heads))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta))


def by_definition(q, k, v, log_decay, beta):
    """One matrix a head, one token at a time, in float64."""
    q, k, v, log_decay, beta = (np.asarray(x, np.float64) for x in (q, k, v, log_decay, beta))
    out, state = np.zeros(v.shape), np.zeros((BATCH, v.shape[2], DIM, DIM))
    for b, h in np.ndindex(BATCH, v.shape[2]):
        key_head = h % k.shape[2]
        for t in range(v.shape[1]):
            key, query = k[b, t, key_head], q[b, t, key_head]
            state[b, h] *= np.exp(log_decay[b, t, h])
            delta = beta[b, t, h] * (v[b, t, h] - state[b, h].T @ key)
            state[b, h] += np.outer(key, delta)
            out[b, t, h] = state[b, h].T @ query / np.sqrt(DIM)
    return out, state


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, inputs):
    weight = jax.random.normal(jax.random.key(9), inputs[2].shape)
    return jax.grad(lambda inputs: jnp.sum(function(*inputs)[0] * weight))(inputs)


@pytest.mark.parametrize("function", [RECURRENT, CHUNKED])
@pytest.mark.parametrize(("key_heads", "heads"), [(2, 2), (2, 4)])
def test_agrees_with_the_definition(function, key_heads, heads):
    inputs = draw(key_heads=key_heads, heads=heads)
    for found, expected in zip(function(*inputs), by_definition(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("time", "chunk"), [(1, 64), (64, 64), (65, 64), (TIME, 16)])
def test_chunks_change_nothing(time, chunk):
    inputs = draw(time)
    for found, expected in zip(CHUNKED(*inputs, chunk=chunk), RECURRENT(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("cosine", [0.0, 0.99, 1.0])
def test_gradients_agree_and_are_finite(cosine):
    inputs = draw(cosine=cosine)
    expected = gradients(delta_rule.recurrent, inputs)
    for found, exact in zip(gradients(delta_rule.chunked, inputs), expected, strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, exact, atol=1e-5 * float(jnp.abs(exact).max()))


def test_equal_keys_without_decay_stay_bounded():
    # The case in which an inverse by powers of L overflows: every entry of L is 1.
    q, k, v, log_decay, beta = draw(cosine=1.0, decay=0.0)
    inputs = (q, k, v, log_decay, jnp.ones_like(beta))
    np.testing.assert_allclose(CHUNKED(*inputs)[0], RECURRENT(*inputs)[0], atol=1e-5)
    assert all(np.isfinite(x).all() for x in gradients(delta_rule.chunked, inputs))


def test_strong_decay_neither_overflows_nor_loses_gradients():
    # The running sum of log-decays reaches thousands, of which float32 keeps about 1e-4.
    q, k, v, log_decay, beta = draw()
    inputs = (q, k, v, log_decay.at[:, ::7].set(-300.0), beta)
    np.testing.assert_allclose(CHUNKED(*inputs)[0], RECURRENT(*inputs)[0], atol=1e-4)
    expected = gradients(delta_rule.recurrent, inputs)
    for found, exact in zip(gradients(delta_rule.chunked, inputs), expected, strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, exact, atol=3e-4 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("function", [RECURRENT, CHUNKED])
def test_state_carries_a_sequence_on(function):
    inputs = draw()
    whole, final = function(*inputs)
    half = TIME // 2
    first, state = function(*(x[:, :half] for x in inputs))
    second, last = function(*(x[:, half:] for x in inputs), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(last, final, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    inputs = draw()
    found = gradients(jax.checkpoint(delta_rule.chunked), inputs)
    for a, b in zip(found, gradients(delta_rule.chunked, inputs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_bfloat16_factors_stay_close():
    inputs = draw()
    for found, expected in zip(CHUNKED(*inputs, dtype=jnp.bfloat16), RECURRENT(*inputs), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=0.02 * float(jnp.abs(expected).max()))


def test_a_written_value_is_read_back():
    # With beta = 1 a unit key answers with exactly the value last written to it, whatever was there.
    _, k, v, log_decay, beta = draw(heads=2)
    out, _ = CHUNKED(k, k, v, log_decay, jnp.ones_like(beta))
    np.testing.assert_allclose(out * DIM**0.5, v, atol=2e-5)


def test_inverse_of_the_worst_triangle():
    # (I + L)^-1 is the difference operator where L is all ones; its powers would reach 1e18.
    lower_CC = jnp.tri(64, k=-1, dtype=jnp.float32)
    difference_CC = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(delta_rule._unit_lower_inverse(lower_CC), difference_CC)


def test_inverse_of_random_triangles():
    lower_MCC = np.tril(np.random.default_rng(0).uniform(-0.3, 0.3, (3, 64, 64)), -1).astype(np.float32)
    exact_MCC = np.linalg.inv(np.eye(64)[None] + lower_MCC.astype(np.float64))
    found_MCC = delta_rule._unit_lower_inverse(jnp.asarray(lower_MCC))
    np.testing.assert_allclose(found_MCC, exact_MCC, atol=1e-6 * np.abs(exact_MCC).max())
