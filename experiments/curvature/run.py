"""Are power-iterated Kronecker factors of the Fisher a better curvature than independent Grams?

python experiments/curvature/run.py MODEL --calibration POOL.jsonl --text heldout_c4.jsonl ... --tokens 262144
    --out results.jsonl
"""

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import sqjax
from sqjax import calibration, evaluation, gguf_file, making, measuring, quantizer, sources, statistics
from sqjax.config import tensor_name
from sqjax.model import Qwen35

PLAIN = ("sequential=false", "equalize=false")


@functools.partial(jax.jit, donate_argnums=1, static_argnames="chunk")
def accumulate_sketch(
    model: Qwen35,
    sums: list[dict[str, dict[str, Array]]],
    factors: list[dict[str, dict[str, Array]]],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Float[Array, "B T"],
    key: Array,
    *,
    chunk: int = 1024,
) -> list[dict[str, dict[str, Array]]]:
    """Adds one batch to a power iteration for the Kronecker factors of the Fisher information of each matrix.

    With D the gradient of one sequence's log-likelihood with respect to a matrix, "input" grows by the sum over
    sequences of D^T G D and "output" by that of D A D^T, where A and G are the previous `factors`. Unlike independent
    Grams this counts how inputs and gradients go together, and the tokens of a sequence with each other.

    References:
      Tseng et al., Model-Preserving Adaptive Rounding (YAQA), 2025. https://arxiv.org/abs/2505.22988
    """

    def loss(probes):
        def tap(probe, x, y):
            accumulators, previous = probe
            return observe_sketch(
                accumulators, jax.lax.stop_gradient(previous), x * mask_BT[..., None].astype(x.dtype), y
            )

        pairs = [{name: (block[name], kinds[name]) for name in block} for block, kinds in zip(probes, factors)]
        hidden_BTD = model.trunk(model.embed(tokens_BT), observe=tap, probes=pairs, remat=True)
        return statistics._sampled_loss(model, hidden_BTD, mask_BT, key, chunk)[0]

    return jax.tree.map(jnp.add, sums, jax.grad(loss)(jax.tree.map(jnp.zeros_like, sums)))


@jax.custom_vjp
def observe_sketch(accumulators, factors, x_BTI, y_BTO):
    """Returns y; the cotangent of `accumulators` is one step of the power iteration of `accumulate_sketch`."""
    return y_BTO


def _sketch_forward(accumulators, factors, x_BTI, y_BTO):
    return y_BTO, (factors, x_BTI)


def _sketch_backward(residuals, cotangent_BTO):
    factors, x_BTI = residuals
    product = functools.partial(jnp.einsum, precision="highest")
    gradient_BOI = product("bto,bti->boi", cotangent_BTO.astype(jnp.float32), x_BTI.astype(jnp.float32))
    weighted_BOI = product("op,bpi->boi", factors["output"], gradient_BOI)
    sums = {
        "input": product("boi,boj->ij", gradient_BOI, weighted_BOI),
        "output": product("boi,bpi->op", product("boj,ij->boi", gradient_BOI, factors["input"]), gradient_BOI),
    }
    return sums, jax.tree.map(jnp.zeros_like, factors), jnp.zeros_like(x_BTI), cotangent_BTO


observe_sketch.defvjp(_sketch_forward, _sketch_backward)


class OwnInputs(statistics.Statistics):
    """Statistics in which every matrix has an input factor of its own."""

    def input_gram(self, tensor: str) -> Array:
        """Returns the input factor of a matrix."""
        return self.inputs[tensor]


def stacked(config, measured) -> list[dict[str, dict[str, Array]]]:
    """Independent Grams in the layout of the model, as the first factors."""
    blocks = []
    for position in range(config.period):
        layers = range(position, config.num_hidden_layers, config.period)
        names = [name for name in statistics.PROJECTIONS if tensor_name(position, name) in measured.outputs]
        blocks.append(
            {
                name: {
                    "input": jnp.stack([measured.input_gram(tensor_name(layer, name)) for layer in layers]),
                    "output": jnp.stack([measured.outputs[tensor_name(layer, name)] for layer in layers]),
                }
                for name in names
            }
        )
    return blocks


def power_iteration(model, factors, windows_WT, batch: int, seed: int):
    """One pass over the text; factors come back with a mean eigenvalue of one."""
    sums = jax.tree.map(jnp.zeros_like, factors)
    for start in range(0, len(windows_WT), batch):
        tokens_BT = jnp.asarray(windows_WT[start : start + batch])
        key = jax.random.fold_in(jax.random.key(seed), start)
        mask_BT = jnp.ones(tokens_BT.shape, jnp.float32)
        sums = accumulate_sketch(model, sums, factors, tokens_BT, mask_BT, key)
    return jax.tree.map(lambda x: x * x.shape[-1] / jnp.trace(x, axis1=-2, axis2=-1)[:, None, None], sums)


def with_factors(config, measured, factors, *, inputs: bool):
    """Statistics with the factors for output Grams and, if asked for, for input Grams."""
    named = {
        kind: {
            tensor_name(layer, name): kinds[kind][layer // config.period]
            for layer in range(config.num_hidden_layers)
            for name, kinds in factors[layer % config.period].items()
        }
        for kind in ("input", "output")
    }
    if not inputs:
        return dataclasses.replace(measured, outputs=named["output"])
    fields = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)}
    return OwnInputs(**fields | {"inputs": named["input"], "outputs": named["output"]})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", default=[sources.CALIBRATION_SUITE])
    parser.add_argument("--text", nargs="+", default=[sources.DEFAULT_SUITE])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--windows", type=int, default=None, help="windows of each text; all unless given")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", default="results.jsonl")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sqjax.calibrate(args.model, folder / "grams", text=args.calibration, tokens=args.tokens, batch=args.batch)
        measured, _ = calibration.load(folder / "grams")
        checkpoint = sources.open_model(args.model)
        config, model = checkpoint.config, sources.load_model(checkpoint)
        windows_WT = measured.windows_WT[np.all(measured.windows_WT >= 0, axis=1)]
        once = power_iteration(model, stacked(config, measured), windows_WT, args.batch, 1)
        twice = power_iteration(model, once, windows_WT, args.batch, 2)
        candidates = {
            "independent Grams": (measured, ()),
            "output factor": (with_factors(config, measured, once, inputs=False), ()),
            "output factor, gamma_out 0.75": (with_factors(config, measured, once, inputs=False), ("gamma_out=0.75",)),
            "both factors": (with_factors(config, measured, once, inputs=True), ()),
            "both factors, two passes": (with_factors(config, measured, twice, inputs=True), ()),
        }
        sequences = {Path(text).stem: measuring.prepare(checkpoint, text, windows=args.windows) for text in args.text}
        sqjax.convert(args.model, folder / "plain.gguf")
        plain: dict[str, float] = {}
        for name, (curvature, settings) in {"plain": (None, ())} | candidates.items():
            start, file = time.monotonic(), folder / "plain.gguf"
            if curvature is not None:
                file = folder / "student.gguf"
                recipe = making.read_recipe("spectral", (*PLAIN, *settings))
                tensors = quantizer.quantize(config, checkpoint.tensors, curvature, recipe)
                tensors = {tensor: jax.tree.map(np.asarray, value) for tensor, value in tensors.items()}
                gguf_file.write_gguf(file, checkpoint, tensors, file_type="q4_k")
            row = {"model": checkpoint.name, "curvature": name, "seconds": time.monotonic() - start, "ratio": {}}
            for text, sequence in sequences.items():
                scores = measuring.score_file(file, checkpoint, sequence, reference=model)
                kl = evaluation.summarize(scores, sequence)["kl"]
                row["ratio"][text] = kl / plain.setdefault(text, kl)
            with open(args.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
