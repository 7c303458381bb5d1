"""How rates should fall while codes settle, on one matrix with noisy gradients: seconds a run, on any machine.

    python experiments/refinement/schedules.py

A random matrix under a Gram of eigenvalues i^-0.7 starts at plain rounding, its codes displaced towards the weights,
and takes 1,000 updates of Adam on the squared error of 64 random inputs, noise of three times the gradient's size on
top; the temperature falls from 0.3 to 0.002 in nine tenths of them. Prints for each schedule and rate the error of the
hardened matrix under the Gram over that of plain rounding, the mean of two runs.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sqjax import refinement, rounding
from sqjax.latent import harden, latent, weights
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


@jax.jit
def refined(key, weight_OI, root_II, start, multiplier_U, rate):
    """The weights after all updates, hardened."""
    values, adam = latent(start, weight_OI, 0.6), optax.scale_by_adam(0.9, 0.99)
    temperature_U = jnp.asarray(refinement.Refinement().temperatures(UPDATES))

    def loss(codes_OI, x_NI, temperature):
        off_OI = weights(dataclasses.replace(values, codes_OI=codes_OI), start, temperature) - weight_OI
        return jnp.mean(jnp.sum(jnp.square(x_NI @ off_OI.T), axis=-1))

    def update(state, inputs):
        codes_OI, moments = state
        key, multiplier, temperature = inputs
        x_NI = jax.random.normal(key, (INPUTS, COLUMNS)) @ root_II.T
        slope_OI = jax.grad(loss)(codes_OI, x_NI, temperature)
        noise_OI = jax.random.normal(jax.random.fold_in(key, 1), slope_OI.shape)
        slope_OI += NOISE * jnp.sqrt(jnp.mean(jnp.square(slope_OI))) * noise_OI
        change_OI, moments = adam.update(slope_OI, moments)
        return (codes_OI - rate * multiplier * change_OI, moments), None

    keys = jax.random.split(key, UPDATES)
    (codes_OI, _), _ = jax.lax.scan(
        update, (values.codes_OI, adam.init(values.codes_OI)), (keys, multiplier_U, temperature_U)
    )
    return dequantize(harden(dataclasses.replace(values, codes_OI=codes_OI), start))


def main() -> None:
    weight_OI, root_II = problem(jax.random.key(0))
    start = rounding.to_nearest(Problem(weight_OI))
    cost = lambda found_OI: float(jnp.sum(jnp.square((found_OI - weight_OI) @ root_II)))  # noqa: E731
    plain = cost(dequantize(start))
    print("schedule,", ", ".join(map(str, RATES)), ", best")
    for name, multiplier_U in SCHEDULES.items():
        arguments = weight_OI, root_II, start, jnp.asarray(multiplier_U, jnp.float32)
        errors = [
            np.mean([cost(refined(jax.random.key(seed), *arguments, jnp.float32(rate))) / plain for seed in (9, 10)])
            for rate in RATES
        ]
        print(f"{name},", ", ".join(f"{error:.3f}" for error in errors), f", {min(errors):.3f}", flush=True)


if __name__ == "__main__":
    main()
