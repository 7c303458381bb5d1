"""One trial of a sweep: a model rounded, and perhaps refined, in memory under a plan, and its KL divergence measured.

What trials have in common is computed once and kept in the sweep's folder: statistics for each text, number of tokens
and seed, behind a lock between workers, and the KL divergence of plain rounding.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sqjax import calibration, distillation, evaluation, gguf_file, making, run_folder
from sqjax.checkpoint import Checkpoint
from sqjax.fingerprints import Seen
from sqjax.measuring import look_up, prepare
from sqjax.model import Qwen35
from sqjax.plans import Plan, plan_of
from sqjax.quantizer import Recipe, dequantized, quantize
from sqjax.run import InputError, atomic_path, progress, sha256
from sqjax.settings import overridden
from sqjax.sources import SUITES, load_model, open_model, open_texts, usage
from sqjax.statistics import Statistics
from sqjax.studies import Outcome, Report
from sqjax.variants import quantize_variants, shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What trials are judged by; never the text that final figures are measured on.

    Attributes:
      inside: texts of the calibration's kind.
      outside: texts of another kind; none leave that out.
      first: the text that is measured first, and repeatedly while a trial refines: pruning goes by it. Empty takes the
        first of `inside`.
      length: tokens of a window.
      windows: windows, or conversations, of each text; 0 for all.
    """

    inside: tuple[str, ...] = ("convergence60",)
    outside: tuple[str, ...] = (str(SUITES / "demo.txt"),)
    first: str = "convergence60"
    length: int = 512
    windows: int = 0

    def __post_init__(self):
        distinct = {*filter(None, (self.first,)), *self.inside, *self.outside}
        if len(self.texts) < len(distinct):
            raise InputError(f"of the watched texts {', '.join(sorted(distinct))} two have one name; rename one")

    @property
    def texts(self) -> dict[str, str]:
        """Every text by its name, the first one first."""
        texts = filter(None, (self.first, *self.inside, *self.outside))
        return {_name_of(text): text for text in texts}

    def names(self, side: str) -> list[str]:
        """Names of the texts of a side, `inside` or `outside`."""
        return [_name_of(text) for text in getattr(self, side)]


def _name_of(text: str) -> str:
    return Path(text).name.split(".")[0]


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """One process at a time; one that is killed lets go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint(checkpoint: Checkpoint) -> str:
    """Tells models apart, wherever they lie, by their shape and the last of their weights."""
    last = hashlib.sha256(np.asarray(checkpoint.tensors["output_norm.weight"]).tobytes()).hexdigest()
    return f"{checkpoint.name} {checkpoint.config} {last}"


def statistics_folder(out: Path, checkpoint: Checkpoint, plan: Plan) -> Path:
    """Returns where a sweep keeps the statistics of a model, a text, a number of tokens and a seed."""
    identity = {"model": fingerprint(checkpoint), "seed": plan.seed} | dataclasses.asdict(plan.calibration)
    return out / "statistics" / _key(identity)


class Bench:
    """Where trials of one model are carried out: the model, the watched texts and what was measured already."""

    def __init__(
        self, model: str | Path, values: Mapping[str, Any], watch: Watch, objectives: Sequence[str], out: Path
    ):
        """Opens the model and the texts.

        Args:
          model: what is quantized.
          values: nested settings of the plan that trials change.
          watch: what they are judged by.
          objectives: sides of `watch`.
          out: folder for statistics and unfinished refinements.

        Raises:
          InputError: one of them cannot be read, or an objective has no text.
        """
        if lacking := [side for side in objectives if not watch.names(side)]:
            raise InputError(f"the objective {lacking[0]} has no text; set watch.{lacking[0]}")
        self.model, self.values, self.watch, self.objectives, self.out = model, values, watch, objectives, out
        self.checkpoint = open_model(model)
        windows = watch.windows or None
        self.sequences = {
            name: prepare(self.checkpoint, text, length=watch.length, windows=windows)
            for name, text in watch.texts.items()
        }

    @functools.cached_property
    def reference(self) -> Qwen35:
        """The model itself, on the device."""
        return load_model(self.checkpoint)

    @functools.cached_property
    def hidden(self) -> dict[str, list[np.ndarray]]:
        """Its final hidden states on each text."""
        return {name: evaluation.hidden_states(self.reference, text) for name, text in self.sequences.items()}

    def divergence(self, tensors: Mapping[str, Any], name: str) -> float:
        """KL divergence from the model on a text, mean in nats per token, of tensors that may be Q4K."""
        student = Qwen35.from_tensors(self.checkpoint.config, dequantized(tensors))
        scores = evaluation.score(self.reference, student, self.sequences[name], hidden=self.hidden[name])
        return float(scores.kl.astype(np.float64).mean())

    @functools.cached_property
    def plain(self) -> dict[str, float]:
        """KL divergence of plain rounding on each text."""
        identity = {"model": fingerprint(self.checkpoint), "watch": dataclasses.asdict(self.watch)}
        path = self.out / f"plain-{_key(identity)}.json"
        with lock(path.with_suffix(".lock")):
            if not path.exists():
                config, tensors = self.checkpoint.config, self.checkpoint.tensors
                tensors = quantize(config, tensors, None, Recipe(steps=("nearest",)))
                found = {name: self.divergence(tensors, name) for name in self.sequences}
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(found), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def plan(self, point: Mapping[str, Any]) -> Plan:
        """Returns the plan of a trial.

        Raises:
          InputError: there is no such setting, or its value is of the wrong kind.
        """
        return plan_of(overridden(self.values, point), "the sweep")

    def measure(self, plan: Plan) -> Path:
        """Returns the folder with statistics of a plan's calibration, which the first to ask makes, or makes complete.

        Raises:
          InputError: the text cannot be read, or is watched.
        """
        folder = statistics_folder(self.out, self.checkpoint, plan)
        with lock(folder.with_suffix(".lock")):
            if not (folder / "statistics.json").exists():
                making.calibrate(self.model, folder, seed=plan.seed, **dataclasses.asdict(plan.calibration))
        about = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        self.keep_apart(plan, calibration.seen_by(folder, about))
        return folder

    def keep_apart(self, plan: Plan, seen: Seen) -> None:
        """Raises InputError where a trial is made on what it is judged by, unless the plan allows that."""
        remedy = "watch other text, or --set evaluation.allow_overlap=true"
        if not plan.evaluation.allow_overlap:
            look_up({"a trial": seen}, self.sequences, self.checkpoint.tokenizer, remedy=remedy)

    @functools.lru_cache(maxsize=1)  # noqa: B019, a worker has one bench
    def statistics(self, folder: Path) -> Statistics:
        """Statistics on the device; those last asked for are kept there."""
        return calibration.load(folder)[0]

    def __call__(self, points: Sequence[Mapping[str, Any]], report: Report) -> Iterator[tuple[int, Outcome]]:
        """Carries out trials; those whose recipes can be rounded together are."""
        plans = [self.plan(point) for point in points]
        groups: dict[Any, list[int]] = {}
        for index, plan in enumerate(plans):
            shape = shape_of(plan.recipe)
            groups.setdefault((plan.calibration, plan.seed, shape) if shape else index, []).append(index)
        for members in groups.values():
            start = time.monotonic()
            rounded = self.round([plans[index] for index in members])
            seconds = (time.monotonic() - start) / len(members)
            for index, tensors in zip(members, rounded):
                facts = {"batch": len(members), "rounding_seconds": seconds}
                yield index, self.judge(plans[index], tensors, functools.partial(report, index), facts)

    def round(self, plans: Sequence[Plan]) -> list[dict[str, Any]]:
        """Rounds the model by recipes that go together, or by one."""
        config, tensors, recipe = self.checkpoint.config, self.checkpoint.tensors, plans[0].recipe
        measured = self.statistics(self.measure(plans[0])) if recipe.needs_statistics else None
        with progress(f"rounding {len(plans)} trials") as show:
            if len(plans) == 1:
                rounded = [quantize(config, tensors, measured, recipe, show)]
            else:
                rounded = quantize_variants(config, tensors, measured, [plan.recipe for plan in plans], show)
        return jax.block_until_ready(rounded)

    def judge(
        self, plan: Plan, tensors: Mapping[str, Any], report: Callable[[int, float], bool], facts: dict[str, Any]
    ) -> Outcome:
        """Measures a trial's tensors, refined first where the plan says so, until it is hopeless or done."""
        start = time.monotonic()
        first = next(iter(self.watch.texts))
        if plan.refine.is_wanted:
            tensors = self.refine(plan, tensors, report)
        kl = {} if tensors is None else {first: self.divergence(tensors, first)}
        is_hopeless = tensors is None or report(plan.refine.updates, kl[first] / self.plain[first])
        if not is_hopeless:
            kl |= {name: self.divergence(tensors, name) for name in self.sequences if name != first}
        ratio = {name: kl[name] / self.plain[name] for name in kl}
        facts |= {"kl": kl, "ratio": ratio, "judging_seconds": time.monotonic() - start, "device": usage()["device"]}
        if is_hopeless:
            return Outcome(None, facts)
        return Outcome(
            tuple(float(np.mean([ratio[name] for name in self.watch.names(side)])) for side in self.objectives), facts
        )

    def refine(
        self, plan: Plan, tensors: Mapping[str, Any], report: Callable[[int, float], bool]
    ) -> dict[str, Any] | None:
        """Distils on; a trial that was interrupted goes on from its last checkpoint. None where it is hopeless."""
        # A batch that is not stated follows from the devices, too: what goes on elsewhere must not be another run.
        settings = plan.refine.planned(plan.refine.tokens)
        plan = dataclasses.replace(plan, refine=settings)
        folder = self.out / "refine" / _key(dataclasses.asdict(plan))
        folder.mkdir(parents=True, exist_ok=True)
        start = folder / "start.gguf"
        if not start.exists():
            gguf_file.write_gguf(start, self.checkpoint, jax.tree.map(np.asarray, dict(tensors)), file_type="q4_k")
        texts = open_texts(settings.text, seed=plan.seed)
        windows_WT, prints = calibration.calibration_windows(
            texts, self.checkpoint.tokenizer, settings.length, settings.tokens or settings.updates * settings.length
        )
        self.keep_apart(plan, Seen(prints))
        watched = self.sequences[next(iter(self.watch.texts))]
        run_folder.claim(folder, {"start": sha256(start), "plan": dataclasses.asdict(plan)}, resume=True)
        begin = gguf_file.read_gguf(start)
        run = distillation.prepare(self.checkpoint, begin, windows_WT, watched, settings=settings, seed=plan.seed)
        plain, looks = self.plain[next(iter(self.watch.texts))], []

        def watch(student) -> float:
            kl = run.watch(student)
            looks.append(kl)
            if report(len(looks), kl / plain):
                raise _Hopeless
            return kl

        try:
            with progress("refining") as show:
                return distillation.distill(dataclasses.replace(run, watch=watch), folder, resume=True, progress=show)[
                    0
                ]
        except _Hopeless:
            return None


class _Hopeless(Exception):
    """A trial is to end."""


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
