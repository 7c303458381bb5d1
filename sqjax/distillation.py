"""The loop of refinement: updates by gradient, a watch that keeps the best state, checkpoints, resumption.

Letters: W windows, A micro-batches of an update, B windows of a micro-batch, T tokens of a window.

A run folder holds `run.json` (what the run is made of), `checkpoints/` (by Orbax; each has the state, the best student
and the position) and `metrics.jsonl` (a line an update). The windows of an update depend on the seed and the update
alone, so that a run that was killed goes on to the same bits.
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
from jaxtyping import Float32, Int32

from sqjax import evaluation
from sqjax import mesh as meshes
from sqjax.checkpoint import Checkpoint
from sqjax.config import ModelConfig, is_matrix
from sqjax.evaluation import Sequences
from sqjax.folding import refold
from sqjax.gguf_file import GGUFTensors
from sqjax.mesh import to_host
from sqjax.model import Qwen35
from sqjax.q4_k import Q4K
from sqjax.refinement import Refinement
from sqjax.run import InputError, interruption
from sqjax.run_folder import metrics
from sqjax.snapshots import Snapshots, snapshots
from sqjax.student import Student, harden_student, initial, model_of, settled, start_of
from sqjax.updates import BY_WINDOW, State, fitted, gram_rows, local_forms, make_update, optimizer_of, rows_of_update

PADDING = -1
_MOST_ROLLBACKS = 6


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
    concavity_U: Float32[np.ndarray, "U"]
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
    seed: int = 0,
) -> Run:
    """Puts the teacher and the file's tensors on the devices of all hosts, which will share each batch.

    Args:
      checkpoint: the teacher.
      file: pure Q4_K file of it.
      windows_WT: what to distil on, padded with -1.
      watched: what the best state is chosen by; some of the windows are held out where it is None.
      settings: how, their batch and updates stated.
      seed: of the order of windows.

    Raises:
      InputError: the file belongs to another model, or the windows cannot be shared as the settings ask.
    """
    config, dtype = checkpoint.config, settings.compute_dtype
    if watched is None:
        windows_WT, watched = hold_out(windows_WT, settings.watch_windows)
    settings = fitted(config, settings)
    mesh = meshes.create(settings.shard)
    start = start_of(config, start_tensors(file, config))
    teacher = Qwen35.from_tensors(config, checkpoint.tensors, dtype=dtype)
    teacher, start = (meshes.place(tree, mesh, meshes.rows(tree, mesh)) for tree in (teacher, start))
    update = make_update(config, settings, mesh)
    materialize = jax.jit(lambda student, start: model_of(config, student, start, dtype))
    # Measured on the file's own model, whose channel scales are those of its codes.
    forms = local_forms(materialize(jax.jit(initial)(start), start), windows_WT, settings, seed)
    forms = [meshes.place(form, mesh, rows(form, mesh)) for form, rows in zip(forms, (gram_rows, meshes.rows))]
    hidden = evaluation.hidden_states(teacher, watched, mesh=mesh)

    def watch(student: Student) -> float:
        scores = evaluation.score(teacher, materialize(student, start), watched, hidden=hidden, mesh=mesh)
        return float(scores.kl.astype(np.float64).mean())

    def step(state, *rest):
        return update(state, teacher, start, *forms, *rest)

    def begin() -> Student:
        if not settings.softness:
            return jax.jit(initial)(start)
        # The weights themselves, under the channel scales that the file has folded into its norms.
        target = start_of(config, refold(config, checkpoint.tensors, start_tensors(file, config)))
        return jax.jit(functools.partial(initial, displacement=settings.displacement))(start, target)

    schedules = [
        schedule(settings.updates)
        for schedule in (settings.multipliers, settings.temperatures, settings.shares, settings.concavities)
    ]
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
    pace = multiplier, temperature, run.share_U[position.step], run.concavity_U[position.step]
    pace = meshes.place([np.float32(value) for value in pace], run.mesh)
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
