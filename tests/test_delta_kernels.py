"""The kernels of the delta rule, interpreted on the CPU, against its definition and beside the plain chunked form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import delta_kernels, delta_rule

# Two chunks and a part of a third; two value heads for each key head.
TIME, KEY_HEADS, HEADS, DIM = 150, 2, 4, delta_kernels.DIM
KERNELS = functools.partial(delta_kernels.chunked, interpret=True)
CHUNK = jax.jit(KERNELS)
PLAIN = functools.partial(delta_rule.chunked, dtype=jnp.bfloat16, kernels=False)


def draw(case, time=TIME, batch=1):
    """Unit queries and keys of a mean cosine of 0.5, betas near 1, a state; or equal keys, or strong decays."""
    rng = np.random.default_rng(0)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    own, common = (unit(rng.standard_normal((batch, t, KEY_HEADS, DIM))) for t in (time, 1))
    q, k = unit(rng.standard_normal(own.shape)), unit(common + own)
    v = rng.standard_normal((batch, time, HEADS, DIM))
    log_decay = -0.05 * rng.exponential(size=(batch, time, HEADS))
    beta = rng.uniform(0.8, 1.0, log_decay.shape)
    if case == "equal keys":
        k, log_decay, beta = np.broadcast_to(common, k.shape), 0.0 * log_decay, np.ones_like(beta)
    if case == "strong decays":
        log_decay[:, ::7] = -50.0
    state = 0.1 * rng.standard_normal((batch, HEADS, DIM, DIM))
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta, state))


@functools.partial(jax.jit, static_argnums=0)
def results(function, inputs):
    """Outputs and last state, and the gradients of a fixed weighting of both."""

    def loss(inputs):
        found = function(*inputs)
        weights = (jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(found))
        return sum(jnp.vdot(x, weight) for x, weight in zip(found, weights)), found

    gradients, found = jax.grad(loss, has_aux=True)(inputs)
    return *found, *gradients


@pytest.mark.parametrize("case", ["random", "equal keys", "strong decays"])
def test_results_and_gradients_are_as_close_to_the_definition_as_the_plain_form(case):
    inputs = draw(case)
    trio = zip(*(results(function, inputs) for function in (KERNELS, PLAIN, delta_rule.recurrent)), strict=True)
    for found, plain, exact in trio:
        error, allowed = (np.linalg.norm(x - exact) for x in (found, plain))
        assert np.isfinite(found).all()
        assert error <= 1.25 * allowed + 1e-5 * np.linalg.norm(exact)
        assert error <= 0.02 * np.linalg.norm(exact) + 1e-6


def test_outputs_round_as_those_of_the_plain_form():
    # The same factors in bfloat16, the same sums: what is left is the order of the sums.
    for found, plain in zip(results(KERNELS, draw("random"))[:2], results(PLAIN, draw("random"))[:2]):
        assert np.linalg.norm(found - plain) <= 1e-3 * np.linalg.norm(plain)


def test_a_sequence_comes_apart_between_chunks():
    *tokens, state = inputs = draw("random", time=128)
    exact, last = jax.jit(delta_rule.recurrent)(*inputs)
    first, state = CHUNK(*(x[:, :64] for x in tokens), state)
    second, state = CHUNK(*(x[:, 64:] for x in tokens), state)
    for found, expected in ((jnp.concatenate([first, second], axis=1), exact), (state, last)):
        assert np.linalg.norm(found - expected) <= 0.01 * np.linalg.norm(expected)


def test_vmapped_sequences_are_the_same_as_single_ones():
    inputs = draw("random", time=64, batch=2)
    together = jax.jit(jax.vmap(lambda *x: KERNELS(*(leaf[None] for leaf in x))))(*inputs)
    for index in range(2):
        for found, single in zip(together, CHUNK(*(x[index : index + 1] for x in inputs)), strict=True):
            np.testing.assert_allclose(found[index], single, atol=1e-6)


def test_inverse_of_equal_keys_is_the_difference_operator():
    # Every entry below the diagonal is 1; the powers of such a triangle would reach 1e18.
    qkv = jnp.zeros((1, 64, 3, DIM), jnp.bfloat16).at[..., 0].set(1.0)
    scalars = jnp.zeros((1, 1, 64)), jnp.ones((1, 1, 64))
    *_, inverse_BHTC = jax.jit(lambda *x: delta_kernels._prepared(qkv, *x, True, True))(*scalars)
    np.testing.assert_array_equal(inverse_BHTC[0, 0], np.eye(64) - np.eye(64, k=-1))


def test_the_plain_form_serves_other_devices():
    assert not delta_kernels.serve(DIM, delta_kernels.CHUNK, jnp.bfloat16)
    inputs = draw("random", time=64)
    text = jax.jit(functools.partial(delta_rule.chunked, dtype=jnp.bfloat16)).lower(*inputs).as_text()
    assert "triton" not in text


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this JAX lowers kernels only beside a GPU")
def test_every_kernel_lowers_for_gpus():
    function = functools.partial(delta_rule.chunked, dtype=jnp.bfloat16, kernels=True)
    lowered = results.trace(function, draw("random")).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    names = ("prepare", "recur", "recur_back", "read_back", "prepare_back")
    assert all(f'name = "_{name}_kernel"' in text for name in names)
