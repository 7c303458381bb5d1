"""How rates should fall while codes settle, and what it brings that they must, on one matrix with noisy gradients.

    python experiments/refinement/schedules.py

A random matrix under a Gram of eigenvalues i^-0.7 starts at plain rounding, its codes displaced towards the weights,
and takes 1,000 updates of Adam on the squared error of 64 random inputs, noise of three times the gradient's size on
top; the temperature falls from 0.3 to 0.002 in nine tenths of them. Prints for each schedule and rate the error of the
hardened matrix under the Gram over that of plain rounding, the mean of two runs; then the same for shares of curvature
that the loss is robbed of in each code, under noise of several sizes. Seconds a run, on any machine.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sqjax import refinement, rounding, student
from sqjax.latent import between, harden, latent, weights
from sqjax.objective import Problem
from sqjax.q4_k import dequantize

ROWS, COLUMNS, UPDATES, INPUTS, NOISE = 64, 512, 1000, 64, 3.0
RATES = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.0045, 0.0065, 0.009)
left = 1.0 - np.arange(UPDATES) / UPDATES
# The package's own, and what it does not have.
SCHEDULES = {name: refinement.SCHEDULES[name](UPDATES)(np.arange(UPDATES)) for name in ("linear", "cosine")} | {
    "square": left**2,
    "cube": left**3,
    "exponential": np.exp(-5.0 * (1.0 - left)),
    "exponential, to zero": np.exp(-4.0 * (1.0 - left)) * left,
    "held for a half, then linear": np.minimum(1.0, 2.0 * left),
}


def problem(key):
    """A matrix, and the root of its input Gram."""
    weight_key, turn_key = jax.random.split(key)
    weight_OI = jax.random.normal(weight_key, (ROWS, COLUMNS)) * COLUMNS**-0.5
    spectrum_I = jnp.arange(1.0, COLUMNS + 1) ** -0.7
    turn_II = jnp.linalg.qr(jax.random.normal(turn_key, (COLUMNS, COLUMNS)))[0]
    return weight_OI, turn_II * jnp.sqrt(spectrum_I / spectrum_I.mean())


@functools.partial(jax.jit, static_argnames="updates")
def refined(key, weight_OI, root_II, start, multiplier_U, rate, noise, concavity, *, updates=UPDATES):
    """The latent values after the first `updates`."""
    values, adam = latent(start, weight_OI, 0.6), optax.scale_by_adam(0.9, 0.99)
    temperature_U = jnp.asarray(refinement.Refinement().temperatures(UPDATES))
    # The loss's second derivative in a weight is twice its column's part of the Gram.
    curvature = [(jnp.full((ROWS, 1), 2.0), jnp.sum(jnp.square(root_II), axis=1)[None, :])]

    def loss(codes_OI, x_NI, temperature):
        off_OI = weights(dataclasses.replace(values, codes_OI=codes_OI), start, temperature) - weight_OI
        return jnp.mean(jnp.sum(jnp.square(x_NI @ off_OI.T), axis=-1))

    def indecision(codes_OI, temperature):
        leaves = dataclasses.replace(values, codes_OI=codes_OI), start, curvature
        return student.indecision(*(student.Student(leaf, [], None, None) for leaf in leaves), temperature)

    def update(state, inputs):
        codes_OI, moments = state
        key, multiplier, temperature, share = inputs
        x_NI = jax.random.normal(key, (INPUTS, COLUMNS)) @ root_II.T
        slope_OI = jax.grad(loss)(codes_OI, x_NI, temperature)
        noise_OI = jax.random.normal(jax.random.fold_in(key, 1), slope_OI.shape)
        slope_OI += noise * jnp.sqrt(jnp.mean(jnp.square(slope_OI))) * noise_OI
        slope_OI += concavity * share * jax.grad(indecision)(codes_OI, temperature)
        change_OI, moments = adam.update(slope_OI, moments)
        return (codes_OI - rate * multiplier * change_OI, moments), None

    paces = jax.random.split(key, UPDATES), multiplier_U, temperature_U, jnp.linspace(0.0, 1.0, UPDATES)
    (codes_OI, _), _ = jax.lax.scan(
        update,
        (values.codes_OI, adam.init(values.codes_OI)),
        tuple(pace_U[:updates] for pace_U in paces),
    )
    return dataclasses.replace(values, codes_OI=codes_OI)


def main() -> None:
    weight_OI, root_II = problem(jax.random.key(0))
    start = rounding.to_nearest(Problem(weight_OI))
    cost = lambda found_OI: float(jnp.sum(jnp.square((found_OI - weight_OI) @ root_II)))  # noqa: E731
    plain = cost(dequantize(start))
    hard = lambda values: cost(dequantize(harden(values, start))) / plain  # noqa: E731

    def show(name, schedule, noise, concavity):
        given = weight_OI, root_II, start, jnp.asarray(SCHEDULES[schedule], jnp.float32)
        rest = jnp.float32(noise), jnp.float32(concavity)
        errors = [
            np.mean([hard(refined(jax.random.key(seed), *given, jnp.float32(rate), *rest)) for seed in (9, 10)])
            for rate in RATES
        ]
        print(f"{name},", ", ".join(f"{error:.3f}" for error in errors), f", {min(errors):.3f}", flush=True)

    print("schedule,", ", ".join(map(str, RATES)), ", best")
    for name in SCHEDULES:
        show(name, name, NOISE, 0.0)
    for noise in (1.0, NOISE, 10.0):
        for concavity in (0.0, 0.3, 1.0, 3.0):
            show(f"cosine; noise {noise:g}; robbed of {concavity:g}", "cosine", noise, concavity)
    falling_U = refinement.Refinement().temperatures(UPDATES)
    falling_U = jnp.asarray(falling_U[falling_U > 0])
    for concavity in (0.0, 1.0):
        pace = jnp.asarray(SCHEDULES["cosine"], jnp.float32), *map(jnp.float32, (0.003, NOISE, concavity))
        values = refined(jax.random.key(9), weight_OI, root_II, start, *pace, updates=len(falling_U))
        between_OI = between(values.codes_OI, falling_U[-1])
        errors = cost(weights(values, start, falling_U[-1])) / plain, hard(values)
        share = float(jnp.mean(between_OI > 0.05 * 0.95))
        print(f"when the temperature has fallen, robbed of {concavity:g}: {share:.1%} of the codes between two values,")
        print(f"  the error {errors[0]:.3f} as they are and {errors[1]:.3f} rounded")


if __name__ == "__main__":
    main()
