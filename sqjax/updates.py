"""One update of refinement: what it changes, what it is measured with, and what a device's memory decides of it.

Letters: W windows, A micro-batches of an update, B windows of a micro-batch, T tokens of a window, D model width, R
repeats of the period, O out features, I in features.

References:
  Kingma, Ba, Adam: A Method for Stochastic Optimization, 2015.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int32, Int64

from sqjax import calibration
from sqjax import mesh as meshes
from sqjax.config import ModelConfig
from sqjax.mesh import BATCH, COPIED
from sqjax.model import Qwen35, abstract
from sqjax.refinement import REMATS, Refinement, model_loss
from sqjax.run import InputError
from sqjax.statistics import PROJECTIONS, SHARED_INPUT
from sqjax.student import Student, indecision, kinds, model_of

# Tokens of a micro-batch: where the device does not say how much memory it has, and below which more of them are worth
# more than what less recomputation saves.
_UNKNOWN_TOKENS, _LEAST_TOKENS = 2048, 16384
# Logits of a chunk at a time: how many where the device does not say, and bytes of each, its slopes and exponentials.
_UNKNOWN_CHUNK, _LOGITS = 1024, 24
# Activations of a micro-batch, counted generously: Qwen3.5-0.8B stays under 30 GiB however large the device is.
_MOST_BYTES = 24 << 30
# Enough for Grams of a few thousand rows; they only weigh directions.
_GRAM_WINDOWS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What an update changes: latent values and Adam's moments, float32."""

    student: Student
    moments: Any


def optimizer_of(settings: Refinement) -> optax.GradientTransformation:
    """Adam with a rate for each kind of latent value; kinds whose rate is zero keep no moments."""
    adam = optax.scale_by_adam(settings.beta1, settings.beta2)
    steps = {
        kind: optax.chain(adam, optax.scale(-rate)) if rate else optax.set_to_zero()
        for kind, rate in settings.rates.items()
    }
    return optax.multi_transform(steps, kinds)


# What a device gets of an update's arguments: rows of matrices, rows of windows, or all.
BY_WINDOW = jax.P(None, BATCH)


def gram_rows(grams: Any, mesh: jax.sharding.Mesh) -> Any:
    """Returns the specs of the stream's Grams, whose rows are spread as those of the blocks' matrices are."""
    return meshes.rows({"blocks": grams}, mesh)["blocks"]


_SPREAD = (*(meshes.rows,) * 3, gram_rows, meshes.rows, *(BY_WINDOW,) * 2, *(COPIED,) * 4)


@functools.cache
def make_update(
    config: ModelConfig, settings: Refinement, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., tuple[State, jax.Array]]:
    """Returns update(state, teacher, start, grams, curvature, tokens_ABT, weight_ABT, *pace) -> (state, KL).

    It is jitted. `grams` and `curvature` are what `local_forms` returns; the pace is the factor on the rates, the
    temperature of the codes, the shares of the stream in the loss and of the curvature that it is robbed of. The
    weights are formed once and gradients summed over micro-batches in float32, and then over devices, before they are
    pulled back to the latent values; the state's buffers are reused.
    """
    optimizer, dtype = optimizer_of(settings), settings.compute_dtype
    loss_of = functools.partial(model_loss, chunk=settings.chunk, remat=settings.remat)

    def update(
        state, teacher, start, grams, curvature, tokens_ABT, weight_ABT, multiplier, temperature, share, concavity
    ):
        form = lambda student: model_of(config, student, start, dtype, temperature)  # noqa: E731
        model, pull_back = jax.vjp(form, state.student)

        def add(sums, micro_batch):
            value_and_grad = jax.value_and_grad(functools.partial(loss_of, share=share), has_aux=True)
            (_, kl), gradient = value_and_grad(model, teacher, grams, *micro_batch)
            return jax.tree.map(lambda total, new: total + new.astype(jnp.float32), sums, (kl, gradient)), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model)
        (kl, gradient), _ = jax.lax.scan(add, (jnp.float32(0.0), zeros), (tokens_ABT, weight_ABT))
        if mesh is not None and mesh.size > 1:
            kl, gradient = meshes.total((kl, gradient), (COPIED, meshes.rows(abstract(config), mesh)))
        gradient = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), gradient, model)
        (slopes,) = pull_back(gradient)
        if curvature is not None:
            pull = jax.grad(indecision)(state.student, start, curvature, temperature)
            slopes = jax.tree.map(lambda slope, more: slope + concavity * more, slopes, pull)
        # Adam's bias correction raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            changes, moments = optimizer.update(slopes, state.moments)
        student = jax.tree.map(lambda leaf, change: leaf + multiplier * change, state.student, changes)
        return State(student, moments), kl

    update = meshes.over(mesh, update, _SPREAD, lambda specs: (specs[0], COPIED))
    return jax.jit(update, donate_argnums=0, compiler_options=meshes.one_order())


def local_forms(
    model: Qwen35, windows_WT: Int32[np.ndarray, "W T"], settings: Refinement, seed: int = 0
) -> tuple[list[Float[jax.Array, "R D D"]], Student | None]:
    """Returns the divergence around a model as quadratic forms, in nats per token, as far as the settings ask for them.

    Of errors of the residual stream after each block the Gram of gradients there, a stack for each position (what
    `ffn_down` writes is added to the stream: its output Gram is the stream's). Of errors of each weight alone the
    second derivative, in the form that `student.indecision` takes: the diagonals of its matrix's two Grams.
    """
    if not (settings.reads_stream or settings.reads_curvature):
        return [], None
    names = PROJECTIONS if settings.reads_curvature else ("ffn_down",)
    options = {"shard": settings.shard, "chunk": settings.chunk, "seed": seed, "names": names}
    sums = calibration.collect(model, windows_WT[:_GRAM_WINDOWS], full={("ffn_down", "output")}, **options)
    mean = lambda total: total / sums.tokens  # noqa: E731
    grams = [mean(kinds["ffn_down"]["output"]).astype(settings.compute_dtype) for kinds in sums.blocks]
    if not settings.reads_curvature:
        return grams, None

    def pair(output, input_):
        diagonals = (x if x.ndim < 3 else jnp.diagonal(x, axis1=-2, axis2=-1) for x in (output, input_))
        row_O, column_I = map(mean, diagonals)
        return row_O[..., :, None], column_I[..., None, :]

    def of_block(kind, sums):
        found = {name: [pair(sums[name]["output"], sums[SHARED_INPUT.get(name, name)]["input"])] for name in sums}
        return dict.fromkeys(model.config.block_shapes(kind)) | found

    blocks = [of_block(kind, sums_of) for kind, sums_of in zip(model.config.layer_types, sums.blocks)]
    head = pair(sums.head_weight_V, jnp.diagonal(sums.head_gram_DD))
    lookup = pair(sums.lookup_count_V, jnp.diagonal(sums.lookup_gram_DD))
    tables = ([lookup, head], None) if model.config.tie_word_embeddings else ([lookup], [head])
    return grams if settings.reads_stream else [], Student(tables[0], blocks, None, tables[1])


def rows_of_update(seed: int, step: int, batch: int, total: int) -> Int64[np.ndarray, "B"]:
    """Indices of the windows of an update: pass after pass over all of them, each in an order of its own."""
    passes, places = np.divmod(np.arange(step * batch, (step + 1) * batch), total)
    orders = {number: np.random.default_rng((seed, int(number))).permutation(total) for number in np.unique(passes)}
    return np.array([orders[number][place] for number, place in zip(passes, places)])


def fitted(config: ModelConfig, settings: Refinement) -> Refinement:
    """Returns the settings with what a device's memory decides: chunks, micro-batches, what is computed anew.

    Raises:
      InputError: the batch cannot be shared by the devices, or not in so many micro-batches.
    """
    devices = len(jax.devices())
    if settings.batch % devices:
        raise InputError(f"{settings.batch} windows cannot be shared by {devices} devices; set batch to a multiple")
    rows = settings.batch // devices
    if settings.accumulate and rows % settings.accumulate:
        raise InputError(f"{rows} windows a device are no {settings.accumulate} micro-batches; set another number")
    settings = dataclasses.replace(settings, chunk=settings.chunk or _chunk(config))
    room = {remat: _room(config, settings, remat) for remat in REMATS}
    remat = settings.remat
    if remat == "auto":
        asked = rows // (settings.accumulate or rows) * settings.length
        remat = "between" if room["between"] >= max(asked, min(_LEAST_TOKENS, rows * settings.length)) else "blocks"
    fits = lambda a: rows % a == 0 and rows // a * settings.length <= room[remat]  # noqa: E731
    accumulate = settings.accumulate or next((a for a in range(1, rows) if fits(a)), rows)
    return dataclasses.replace(settings, accumulate=accumulate, remat=remat)


def _chunk(config: ModelConfig) -> int:
    """Tokens whose logits take a fifth of a device's memory at most; more than 2048 bring nothing."""
    limit = meshes.device_memory()
    if limit is None:
        return _UNKNOWN_CHUNK
    return next((c for c in (2048, 1024, 512) if 5 * _LOGITS * c * config.vocab_size <= limit), 256)


def _room(config: ModelConfig, settings: Refinement, remat: str) -> int:
    """Tokens of a micro-batch whose activations fit on a device, and are within what a micro-batch may take."""
    limit = meshes.device_memory()
    if limit is None:
        return _UNKNOWN_TOKENS
    # float32 residuals of all layers of both models and the gradients of their errors, the dozen wide arrays of one
    # block and their gradients, and what is kept of every block.
    wide = config.intermediate_size + config.hidden_size + config.conv_channels
    projected = sum(
        shape[0]
        for kind in config.layer_types
        for name, shape in config.block_shapes(kind).items()
        if name in PROJECTIONS
    )
    kept = {"blocks": 0, "between": 2 * projected, "none": 4 * 12 * wide * config.num_hidden_layers}[remat]
    per_token = 4 * (3 * config.num_hidden_layers * config.hidden_size + 24 * wide) + kept
    state = 32 * sum(math.prod(shape) for shape in config.tensor_shapes().values())
    logits = _LOGITS * settings.chunk * config.vocab_size
    return int(min(0.8 * limit - state - logits, _MOST_BYTES) / per_token)
