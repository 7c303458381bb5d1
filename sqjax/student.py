"""The student of refinement: a model of latent values, trained as exactly what a Q4_K file holds.

Letters: O out features, I in features, S super-blocks of a row, G sub-blocks of a super-block, R repeats of the period.

Its matrices are latent values (latent.py). Their codes begin soft, on their way from the code to the weight that was
rounded; the temperature falls until the stair is that of the file, and each code that settles is made good by those
that have not. Then gradients pass straight through, at the rates that are left.

On a stair alone some codes rest between two values to the end, where chance rounds them and nothing makes good for it.
So the loss is robbed of more and more of its own curvature in each code: one after the other finds no minimum between
its values any more, and takes a side while others are soft.

References:
  Gong et al., Differentiable Soft Quantization, 2019. https://arxiv.org/abs/1908.05033
  Blake, Zisserman, Visual Reconstruction, 1987 (graduated non-convexity).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from sqjax.config import ModelConfig, tensor_name
from sqjax.latent import Latent, between, harden, latent, settle, weights
from sqjax.model import BLOCKS, Qwen35
from sqjax.q4_k import Q4K, steps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Student:
    """A model's tensors in the layout of the model: of latent values, or of the Q4K and float32 leaves they began as.

    `blocks[p][name]` holds the stack [R, ...] of layers p, p + period, ... A vector's latent value is its shift in
    units of its root mean square; that of `ssm_a`, which must stay negative, is the logarithm of a factor.
    """

    token_embd: Any
    blocks: list[dict[str, Any]]
    output_norm: Any
    output: Any


def start_of(config: ModelConfig, tensors: Mapping[str, Any]) -> Student:
    """Returns what refinement starts from: Q4K and float32 tensors in the layout of a student."""

    def stack(names):
        parts = [jax.tree.map(jnp.asarray, tensors[name]) for name in names]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    blocks = []
    for position, kind in enumerate(config.layer_types[: config.period]):
        layers = range(position, config.num_hidden_layers, config.period)
        members = {name: [tensor_name(layer, name) for layer in layers] for name in config.block_shapes(kind)}
        blocks.append({name: stack(names) for name, names in members.items()})
    names = ["token_embd.weight", "output_norm.weight"] + ["output.weight"] * (not config.tie_word_embeddings)
    token_embd, output_norm, *output = (jax.tree.map(jnp.asarray, tensors[name]) for name in names)
    return Student(token_embd, blocks, output_norm, output[0] if output else None)


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda leaf: isinstance(leaf, kind)


def initial(start: Student, target: Student | None = None, displacement: float = 0.0) -> Student:
    """Returns the student whose hardened values are `start`, its codes displaced towards the weights of `target`."""

    def begin(leaf, weight=None):
        return latent(leaf, weight, displacement) if isinstance(leaf, Q4K) else jnp.zeros_like(leaf)

    return jax.tree.map(begin, *((start,) if target is None else (start, target)), is_leaf=_is(Q4K))


def settled(student: Student) -> Student:
    """Returns a copy that hardens alike, its codes in the centres of their cells and a byte each."""
    copy = lambda leaf: jax.tree.map(jnp.copy, settle(leaf) if isinstance(leaf, Latent) else leaf)  # noqa: E731
    return jax.tree.map(copy, student, is_leaf=_is(Latent))


def kinds(student: Student) -> Student:
    """Returns the kind of every leaf of a student, one of `refinement.KINDS`."""
    matrix = Latent("codes", "scales", "scales", "d", "d")
    return jax.tree.map(lambda leaf: matrix if isinstance(leaf, Latent) else "vectors", student, is_leaf=_is(Latent))


def _values(matrix: Callable[[Latent, Q4K], Any], student: Student, start: Student) -> Student:
    """Applies `matrix` to every matrix, and gives every vector its value."""

    def value(path, leaf, start_leaf):
        if isinstance(leaf, Latent):
            return matrix(leaf, start_leaf)
        if getattr(path[-1], "key", None) == "ssm_a":
            return start_leaf * jnp.exp(leaf)
        return start_leaf + jnp.sqrt(jnp.mean(jnp.square(start_leaf), axis=-1, keepdims=True)) * leaf

    return jax.tree_util.tree_map_with_path(value, student, start, is_leaf=_is(Latent))


def model_of(
    config: ModelConfig, student: Student, start: Student, dtype=jnp.float32, temperature: Array | None = None
) -> Qwen35:
    """Returns the model that the file would hold, its matrices in `dtype`, differentiable in the student."""
    tree = _values(lambda leaf, start_leaf: weights(leaf, start_leaf, temperature).astype(dtype), student, start)
    blocks = [BLOCKS[kind](config, stacked) for kind, stacked in zip(config.layer_types[: config.period], tree.blocks)]
    return Qwen35(config, tree.token_embd, blocks, tree.output_norm, tree.output)


def indecision(
    student: Student, start: Student, curvature: Student, temperature: Float32[Array, ""]
) -> Float32[Array, ""]:
    """Sum over codes of 1/2 h f (1 - f), in nats, f being how far a code is on its way from one value to the next.

    h is the second derivative of the loss in a code, its weight's times the square of a step: along one code the loss
    and this are a straight line together. A file's codes have f = 0, so that no file's loss is changed. Each matrix of
    `curvature` has the second derivative in its weights as pairs ([*, O, 1], [*, 1, I]) whose products are summed; its
    vectors are None.
    """

    def one(leaf, start_leaf, pairs):
        if not isinstance(leaf, Latent):
            return jnp.float32(0.0)
        step_OSG1 = jax.lax.stop_gradient(steps(start_leaf)[0])[..., None]
        second_OI = sum(row_O1 * column_1I for row_O1, column_1I in pairs)
        between_OI = between(leaf.codes_OI, temperature)
        blocks = lambda x_OI: x_OI.reshape(*step_OSG1.shape[:-1], -1)  # noqa: E731
        return 0.5 * jnp.sum(jnp.square(step_OSG1) * blocks(second_OI * between_OI))

    return sum(jax.tree.leaves(jax.tree.map(one, student, start, curvature, is_leaf=_is(Latent))))


def harden_student(config: ModelConfig, student: Student, start: Student) -> dict[str, Array | Q4K]:
    """Returns the tensors of the file: every matrix as Q4K, every vector as float32."""
    tree = _values(harden, student, start)
    tensors = {"token_embd.weight": tree.token_embd, "output_norm.weight": tree.output_norm}
    if tree.output is not None:
        tensors["output.weight"] = tree.output
    for layer in range(config.num_hidden_layers):
        repeat = layer // config.period
        for name, stacked in tree.blocks[layer % config.period].items():
            tensors[tensor_name(layer, name)] = jax.tree.map(lambda leaf: leaf[repeat], stacked)  # noqa: B023
    return tensors
