"""The loop of refinement: updates by gradient, a watch that keeps the best state, checkpoints, resumption.

Letters: W windows, A micro-batches of an update, B windows of a micro-batch, T tokens of a window.

A run folder holds `run.json` (what the run is made of), `checkpoints/` (by Orbax; each has the state, the best student
and the position) and `metrics.jsonl` (a line an update). The windows of an update depend on the seed and the update
alone, so that a run that was killed goes on to the same bits.

References:
  Kingma, Ba, Adam: A Method for Stochastic Optimization, 2015.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Float32, Int32, Int64

from sqjax import calibration, evaluation
from sqjax import mesh as meshes
from sqjax.checkpoint import Checkpoint
from sqjax.config import ModelConfig, is_matrix
from sqjax.evaluation import Sequences
from sqjax.folding import refold
from sqjax.gguf_file import GGUFTensors
from sqjax.mesh import BATCH, COPIED, to_host
from sqjax.model import Qwen35, abstract
from sqjax.q4_k import Q4K
from sqjax.refinement import (
    REMATS,
    Refinement,
    Student,
    harden_student,
    initial,
    kinds,
    model_loss,
    model_of,
    settled,
    start_of,
)
from sqjax.run import InputError, interruption
from sqjax.run_folder import metrics
from sqjax.snapshots import Snapshots, snapshots
from sqjax.statistics import PROJECTIONS

PADDING = -1
_MOST_ROLLBACKS = 6
# Tokens of a micro-batch: where the device does not say how much memory it has, and below which more of them are worth
# more than what less recomputation saves.
_UNKNOWN_TOKENS, _LEAST_TOKENS = 2048, 16384
# Logits of a chunk at a time: how many where the device does not say, and bytes of each, its slopes and exponentials.
_UNKNOWN_CHUNK, _LOGITS = 1024, 24
# Activations of a micro-batch, counted generously: Qwen3.5-0.8B stays under 30 GiB however large the device is.
_MOST_BYTES = 24 << 30
# Enough for Grams of a few thousand rows; they only weigh directions.
_GRAM_WINDOWS = 128


# ---------------------------------------------------------------------------------------------------------------------
# An update


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
    """Returns the specs of `residual_grams`, whose rows are spread as those of the blocks' matrices are."""
    return meshes.rows({"blocks": grams}, mesh)["blocks"]


_SPREAD = (*(meshes.rows,) * 3, gram_rows, *(BY_WINDOW,) * 2, *(COPIED,) * 3)


@functools.cache
def make_update(
    config: ModelConfig, settings: Refinement, mesh: jax.sharding.Mesh | None = None
) -> Callable[..., tuple[State, jax.Array]]:
    """Returns update(state, teacher, start, grams, tokens_ABT, weight_ABT, *pace) -> (state, KL).

    It is jitted. `grams` are those of the residual stream, as `residual_grams` returns them, or none; the pace is the
    factor on the rates, the temperature of the codes and the share of the stream in the loss. The weights are formed
    once and gradients summed over micro-batches in float32, and then over devices, before they are pulled back to the
    latent values; the state's buffers are reused.
    """
    optimizer, dtype = optimizer_of(settings), settings.compute_dtype
    loss_of = functools.partial(model_loss, chunk=settings.chunk, remat=settings.remat)

    def update(state, teacher, start, grams, tokens_ABT, weight_ABT, multiplier, temperature, share):
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
        # Adam's bias correction raises a float to an integer power.
        with jax.numpy_dtype_promotion("standard"):
            changes, moments = optimizer.update(pull_back(gradient)[0], state.moments)
        student = jax.tree.map(lambda leaf, change: leaf + multiplier * change, state.student, changes)
        return State(student, moments), kl

    update = meshes.over(mesh, update, _SPREAD, lambda specs: (specs[0], COPIED))
    return jax.jit(update, donate_argnums=0, compiler_options=meshes.one_order())


def residual_grams(
    teacher: Qwen35, windows_WT: Int32[np.ndarray, "W T"], settings: Refinement, seed: int = 0
) -> list[Float[jax.Array, "R D D"]]:
    """Returns the Gram per token of gradients at the residual stream after each block, a stack for each position.

    What `ffn_down` writes is added to the stream: its output Gram is the stream's.
    """
    options = {"shard": settings.shard, "chunk": settings.chunk, "seed": seed}
    sums = calibration.collect(teacher, windows_WT[:_GRAM_WINDOWS], names=("ffn_down",), **options)
    return [(kinds["ffn_down"]["output"] / sums.tokens).astype(settings.compute_dtype) for kinds in sums.blocks]


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


# ---------------------------------------------------------------------------------------------------------------------
# A run


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run is: watched KLs, updates done, the factor on its rates and since when, looks without a new best."""

    start_kl: float
    best_kl: float
    step: int = 0
    factor: float = 1.0
    restarted: int = 0
    best_step: int = 0
    stale: int = 0
    rollbacks: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same in a run; `update` and `watch` are functions on the device."""

    config: ModelConfig
    settings: Refinement
    seed: int
    windows_WT: Int32[np.ndarray, "W T"]
    multiplier_U: Float32[np.ndarray, "U"]
    temperature_U: Float32[np.ndarray, "U"]
    share_U: Float32[np.ndarray, "U"]
    start: Student
    begin: Callable[[], Student]
    mesh: jax.sharding.Mesh
    update: Callable[..., tuple[State, jax.Array]]
    watch: Callable[[Student], float]

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return len(self.multiplier_U)

    def fresh(self, student: Student) -> State:
        """Returns a student, or one that has settled, with moments of zero."""
        student = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), student)
        return State(student, optimizer_of(self.settings).init(student))

    def state_of(self, student: Student) -> State:
        """The same on the devices."""
        student = meshes.place(student, self.mesh, meshes.rows(student, self.mesh))
        state = jax.jit(self.fresh)(student)
        # Placed like what an update returns, or the second update would be compiled again.
        return meshes.place(state, self.mesh, meshes.rows(state, self.mesh))

    def batch(self, step: int) -> tuple[jax.Array, jax.Array]:
        """Returns tokens and weights [A, B, T] of an update; weights sum to one, those of padding are zero."""
        rows = self.windows_WT[rows_of_update(self.seed, step, self.settings.batch, len(self.windows_WT))]
        rows = rows.reshape(self.settings.accumulate, -1, rows.shape[-1])
        mask = (rows != PADDING).astype(np.float32)
        batch = (np.maximum(rows, 0), mask / max(float(mask.sum()), 1.0))
        return meshes.place(batch, self.mesh, BY_WINDOW)

    def finished(self, position: Position) -> bool:
        """Whether all updates are done, or further ones have no prospect."""
        patience = self.settings.patience
        hopeless = position.rollbacks > _MOST_ROLLBACKS or (patience and position.stale >= patience)
        return position.step >= self.updates or bool(hopeless)


def hold_out(windows_WT: Int32[np.ndarray, "W T"], count: int) -> tuple[Int32[np.ndarray, "W T"], Sequences]:
    """Splits windows into those to train on and the last `count` (0 for a sixteenth), to watch.

    Raises:
      InputError: nothing would be left to train on.
    """
    count = count or max(1, len(windows_WT) // 16)
    if count >= len(windows_WT):
        raise InputError(f"{count} of {len(windows_WT)} windows are to be held out; give more text")
    rows = [row[row != PADDING] for row in windows_WT[-count:]]
    return windows_WT[:-count], Sequences(tuple(rows), ("heldout",) * count, (None,) * count)


def start_tensors(file: Checkpoint, config: ModelConfig) -> dict[str, Q4K | np.ndarray]:
    """Reads what refinement starts from: the codes and scales of a file's matrices, and its vectors.

    Raises:
      InputError: it is no pure Q4_K file, or one of another model.
    """
    if not isinstance(file.tensors, GGUFTensors) or file.config.tensor_shapes() != config.tensor_shapes():
        raise InputError(f"{file.name} has other tensors than the model; give a Q4_K file that was made from it")
    matrices = {name for name, shape in config.tensor_shapes().items() if is_matrix(name, shape)}
    return {name: file.tensors.codes(name) if name in matrices else file.tensors[name] for name in file.tensors}


def prepare(
    checkpoint: Checkpoint,
    file: Checkpoint,
    windows_WT: Int32[np.ndarray, "W T"],
    watched: Sequences | None,
    *,
    settings: Refinement,
    tokens: int = 0,
    seed: int = 0,
) -> Run:
    """Puts the teacher and the file's tensors on the devices of all hosts, which will share each batch.

    Args:
      checkpoint: the teacher.
      file: pure Q4_K file of it.
      windows_WT: what to distil on, padded with -1.
      watched: what the best state is chosen by; some of the windows are held out where it is None.
      settings: how.
      tokens: to distil on, where the settings do not state a number of updates.
      seed: of the order of windows.

    Raises:
      InputError: the file belongs to another model, or the windows cannot be shared as the settings ask.
    """
    config, dtype = checkpoint.config, settings.compute_dtype
    if watched is None:
        windows_WT, watched = hold_out(windows_WT, settings.watch_windows)
    updates = settings.updates or max(1, -(-tokens // (settings.batch * settings.length)))
    settings = fitted(config, settings)
    mesh = meshes.create(settings.shard)
    start = start_of(config, start_tensors(file, config))
    teacher = Qwen35.from_tensors(config, checkpoint.tensors, dtype=dtype)
    teacher, start = (meshes.place(tree, mesh, meshes.rows(tree, mesh)) for tree in (teacher, start))
    update = make_update(config, settings, mesh)
    grams = residual_grams(teacher, windows_WT, settings, seed) if settings.reads_stream else []
    grams = meshes.place(grams, mesh, gram_rows(grams, mesh))
    hidden = evaluation.hidden_states(teacher, watched, mesh=mesh)
    materialize = jax.jit(lambda student, start: model_of(config, student, start, dtype))

    def watch(student: Student) -> float:
        scores = evaluation.score(teacher, materialize(student, start), watched, hidden=hidden, mesh=mesh)
        return float(scores.kl.astype(np.float64).mean())

    def step(state, *rest):
        return update(state, teacher, start, grams, *rest)

    def begin() -> Student:
        if not settings.softness:
            return jax.jit(initial)(start)
        # The weights themselves, under the channel scales that the file has folded into its norms.
        target = start_of(config, refold(config, checkpoint.tensors, start_tensors(file, config)))
        return jax.jit(functools.partial(initial, displacement=settings.displacement))(start, target)

    schedules = settings.multipliers(updates), settings.temperatures(updates), settings.shares(updates)
    return Run(config, settings, seed, windows_WT, *schedules, start, begin, mesh, step, watch)


def advance(
    run: Run, state: State, best: Student, position: Position
) -> tuple[State, Student, Position, dict[str, Any]]:
    """Does one update, looks at the watched text when that is due, and rolls back what went wrong.

    Returns the new state, the best student, settled, the position and the line for the metrics. A KL that is not
    finite, or beyond `divergence` times the best, brings the best student back, with half the rates, moments of zero
    and a new warm-up; the data goes on.
    """
    settings = run.settings
    warm = min(1.0, (position.step - position.restarted + 1) / max(settings.warmup, 1)) if position.restarted else 1.0
    multiplier = float(run.multiplier_U[position.step]) * position.factor * warm
    temperature = float(run.temperature_U[position.step])
    # Placed like all else, or the program that was compiled for shapes and places would not be the one that runs.
    pace = meshes.place([np.float32(v) for v in (multiplier, temperature, run.share_U[position.step])], run.mesh)
    state, loss = run.update(state, *run.batch(position.step), *pace)
    loss = float(loss)
    position = dataclasses.replace(position, step=position.step + 1)
    record = {"step": position.step, "kl": loss if math.isfinite(loss) else None}
    record |= {"multiplier": multiplier, "temperature": temperature}
    fault = None if math.isfinite(loss) else f"the KL of update {position.step} is {loss}"
    if fault is None and (position.step % settings.watch_every == 0 or position.step >= run.updates):
        kl = run.watch(state.student)
        record["watched_kl"] = kl if math.isfinite(kl) else None
        # While codes are soft, what they round to is only on its way.
        if not temperature and not kl <= settings.divergence * position.best_kl + 1e-6:
            fault = f"the watched KL is {kl:.5g} after {position.step} updates, its best {position.best_kl:.5g}"
        elif kl < position.best_kl:
            best = jax.jit(settled)(state.student)
            position = dataclasses.replace(position, best_kl=kl, best_step=position.step, stale=0)
        elif not temperature:
            position = dataclasses.replace(position, stale=position.stale + 1)
    if fault is not None:
        print(f"{fault}: going back to update {position.best_step} with half the rates", file=sys.stderr, flush=True)
        record["rolled_back_to"] = position.best_step
        state = run.state_of(best)
        position = dataclasses.replace(
            position, factor=position.factor / 2, restarted=position.step, rollbacks=position.rollbacks + 1
        )
    return state, best, position, record


def distill(
    run: Run,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[..., None] = lambda done, total, note="": None,
) -> tuple[dict[str, Q4K | np.ndarray], Position]:
    """Carries a run through, or on from its last checkpoint, and returns the tensors of the file.

    `progress` is called after each update with the updates done, their total and a line about the state. An
    interruption (SIGINT) ends the update, saves a checkpoint and raises KeyboardInterrupt.

    Raises:
      InputError: the watched KL of the start is not finite.
    """
    settings = run.settings
    student = jax.eval_shape(initial, run.start)
    like = {"state": jax.eval_shape(run.fresh, student), "best": jax.eval_shape(settled, student)}
    with snapshots(folder / "checkpoints", like, keep=settings.checkpoints) as saved, interruption() as is_asked:
        state, best, position = _begin(run, saved if resume else None)
        with metrics(folder, position.step) if meshes.is_first() else contextlib.nullcontext(lambda _: None) as write:
            began, first = time.monotonic(), position.step
            while not run.finished(position):
                state, best, position, record = advance(run, state, best, position)
                if position.step == first + 1:
                    # The first update of a process compiles; the rate is that of the others.
                    began = time.monotonic()
                speed = (position.step - first - 1) / max(time.monotonic() - began, 1e-9)
                record["tokens"] = position.step * settings.batch * run.windows_WT.shape[1]
                record["tokens_per_second"] = speed * settings.batch * run.windows_WT.shape[1]
                write(record)
                stop = is_asked()
                due = position.step % settings.checkpoint_every == 0 and saved.due()
                if stop or run.finished(position) or due:
                    saved.save(position.step, {"state": state, "best": best}, dataclasses.asdict(position))
                if stop:
                    print(f"stopped after {position.step} of {run.updates} updates; --resume goes on", file=sys.stderr)
                    raise KeyboardInterrupt
                progress(position.step, run.updates, _note(record, position))
    chosen = best if settings.keep_best else state.student
    harden = jax.jit(functools.partial(harden_student, run.config))
    return to_host(harden(chosen, run.start)), position


def _note(record: Mapping[str, Any], position: Position) -> str:
    kl = "not finite" if record["kl"] is None else f"{record['kl']:.5f}"
    parts = [f"KL {kl}", f"watched {position.best_kl:.5f} at {position.best_step}"]
    if record["tokens_per_second"]:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if used := (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use"):
        parts.append(f"{used / (1 << 30):.1f} GiB")
    return ", ".join(parts)


def _begin(run: Run, saved: Snapshots | None) -> tuple[State, Student, Position]:
    """The start, or the last checkpoint."""
    start = jax.jit(initial)(run.start)
    if saved is None or saved.latest is None:
        kl = run.watch(start)
        if not math.isfinite(kl):
            raise InputError(f"the KL of the file that is to be refined is {kl}; give one that works")
        return run.state_of(run.begin()), jax.jit(settled)(start), Position(start_kl=kl, best_kl=kl)
    state = run.state_of(start)
    trees, position = saved.restore({"state": state, "best": jax.jit(settled)(state.student)})
    return trees["state"], trees["best"], Position(**position)
