"""The whole way of a model in one TOML file: calibration, recipe, refinement and evaluation, each skipped once done.

[calibration] -> statistics/   [recipe] -> rounded file   [refine] -> refined file   [evaluation] -> evaluation.json
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqjax import calibration, making
from sqjax.checkpoint import Checkpoint
from sqjax.fingerprints import Seen
from sqjax.measuring import evaluate, look_up, prepare
from sqjax.quantizer import Recipe
from sqjax.refinement import Refinement
from sqjax.run import InputError, atomic_path
from sqjax.settings import build, overridden, parse_overrides, read_toml, to_toml
from sqjax.sources import CALIBRATION_SUITE, DEFAULT_SUITE, file_facts, find_config, open_model, open_texts

OTHER_TEXT = "--set evaluation.text to other text, or evaluation.allow_overlap=true and the result says so"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What statistics are measured on; arguments of `making.calibrate`."""

    text: tuple[str, ...] = (CALIBRATION_SUITE,)
    tokens: int = 1_000_000
    length: int = 512
    batch: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refining(Refinement):
    """What a rounded file is refined on, and how; no tokens and no `updates` leave it as it was rounded."""

    text: tuple[str, ...] = (CALIBRATION_SUITE,)
    tokens: int = 0

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.tokens > 0 or self.updates > 0

    @property
    def overrides(self) -> list[str]:
        """The settings of refinement itself as `key=value`."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Refinement)}
        return [f"{key}={json.dumps(value)}" for key, value in own.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the written file is measured on, beside plain rounding; no windows score all of the text.

    With `allow_overlap` text that the file is made on may be watched and measured on; the result says so.
    """

    text: tuple[str, ...] = (DEFAULT_SUITE,)
    length: int = 512
    windows: int = 0
    allow_overlap: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides what becomes of a model.

    Attributes:
      recipe: how it is rounded; in TOML, `base` names a recipe whose settings the others of the table replace.
      calibration, refine, evaluation: the other stages.
      seed: of the calibration and of the order of the text of refinement.
    """

    recipe: Recipe
    calibration: Calibration = Calibration()
    refine: Refining = Refining()
    evaluation: Evaluation = Evaluation()
    seed: int = 0


def plan_of(values: Mapping[str, Any], origin: str) -> Plan:
    """Builds a plan from nested values, the named recipe and the defaults of refinement filled in.

    Raises:
      InputError: a setting is unknown or of the wrong kind.
    """
    values = dict(values)
    recipe = dict(values.get("recipe", {}))
    if base := recipe.pop("base", None):
        recipe = read_toml(find_config(base)) | recipe
    defaults = read_toml(find_config("refine", "refinement"))
    return build(Plan, values | {"recipe": recipe, "refine": defaults | dict(values.get("refine", {}))}, origin)


def read_plan(config: str | Path, settings: Sequence[str] = ()) -> Plan:
    """Reads a plan by its name in configs/ or by its path, with `table.key=value` overrides.

    Raises:
      InputError: there is no such plan, or a setting is wrong.
    """
    path = find_config(config, "plan")
    return plan_of(overridden(read_toml(path), parse_overrides(settings)), path.name)


def make(config: str | Path, model: str | Path, out: str | Path, *, settings: Sequence[str] = ()) -> dict[str, Any]:
    """Makes a quantized file of a model as a plan says, and measures it; a stage whose output is there is skipped.

    Args:
      config: name of a plan in configs/, or path of a TOML file.
      model: Hugging Face folder, hub id or GGUF file.
      out: folder; it will hold plan.json, statistics/, plain.gguf, rounded.gguf, MODEL-Q4_K_M.gguf and evaluation.json.
      settings: `table.key=value` overrides of the plan.

    Returns `file`, its facts, `evaluation` (metrics of the file and of plain rounding), `stages` (seconds; 0 where
    skipped) and `seconds`.

    Raises:
      InputError: an input is at fault, the folder was made by another plan, or what is measured on is what is made on.
    """
    start = time.monotonic()
    out, plan = Path(out), read_plan(config, settings)
    checkpoint = open_model(model)
    name = checkpoint.name
    making_of = dataclasses.asdict(plan)
    settled = {"evaluation": making_of.pop("evaluation")}
    _claim(out, {"model": name, "plan": making_of})
    final = out / f"{name}-Q4_K_M.gguf"
    rounded = out / "rounded.gguf" if plan.refine.is_wanted else final
    if not (final.exists() or rounded.exists()):
        keep_apart(plan, checkpoint)
    plain, measured, scored = out / "plain.gguf", out / "statistics" / "statistics.json", out / "evaluation.json"
    stages = {
        "calibrate": _unless((measured, rounded, final), lambda: _calibrate(plan, model, out)),
        "quantize": _unless((rounded, final), lambda: _quantize(plan, model, out, rounded)),
        "refine": _unless((final,), lambda: _refine(plan, model, rounded, final)),
        "plain": _unless((plain,), lambda: making.convert(model, plain, type="q4_k")),
        "evaluate": _unless((scored,), lambda: _evaluate(plan, model, {"quantized": final, "plain": plain}, scored)),
    }
    found = json.loads(scored.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(settled["evaluation"])):
        scored.unlink()
        return make(config, model, out, settings=settings)
    result = {"file": str(final)} | file_facts(final) | {"stages": stages}
    return result | {"evaluation": found, "seconds": time.monotonic() - start}


def keep_apart(plan: Plan, checkpoint: Checkpoint) -> None:
    """Looks for evaluated text in what a file will be made on, before hours are spent on it.

    Raises:
      InputError: it is there, and that is not allowed.
    """
    settings, seen = plan.evaluation, {}
    if settings.allow_overlap:
        return
    wanted = {"calibration": plan.recipe.needs_statistics, "refine": plan.refine.is_wanted}
    for stage in (stage for stage, is_wanted in wanted.items() if is_wanted):
        part = getattr(plan, stage)
        texts = open_texts(part.text, seed=plan.seed)
        _, prints = calibration.calibration_windows(texts, checkpoint.tokenizer, part.length, part.tokens)
        seen[f"the stage {stage}"] = Seen(prints)
    if seen:
        text = prepare(checkpoint, settings.text, length=settings.length, windows=settings.windows or None)
        look_up(seen, {", ".join(settings.text): text}, checkpoint.tokenizer, remedy=OTHER_TEXT)


def _claim(out: Path, identity: Mapping[str, Any]) -> None:
    record, text = out / "plan.json", json.dumps(identity, indent=1, sort_keys=True)
    if not record.exists():
        with atomic_path(record) as path:
            path.write_text(text, encoding="utf-8")
    elif record.read_text(encoding="utf-8") != text:
        raise InputError(f"{out} was made of another model or plan (its plan.json); choose another folder or remove it")


def _unless(outputs: Sequence[Path], stage: Callable[[], Any]) -> float:
    """Runs a stage, unless one of these outputs is there; returns seconds."""
    if any(output.exists() for output in outputs):
        return 0.0
    start = time.monotonic()
    stage()
    return time.monotonic() - start


def _calibrate(plan: Plan, model: str | Path, out: Path) -> None:
    if plan.recipe.needs_statistics:
        making.calibrate(model, out / "statistics", seed=plan.seed, **dataclasses.asdict(plan.calibration))


def _quantize(plan: Plan, model: str | Path, out: Path, rounded: Path) -> None:
    with atomic_path(out / "recipe.toml") as path:
        path.write_text(to_toml(dataclasses.asdict(plan.recipe)), encoding="utf-8")
    making.quantize(model, rounded, recipe=out / "recipe.toml", statistics=out / "statistics", seed=plan.seed)


def _refine(plan: Plan, model: str | Path, rounded: Path, final: Path) -> None:
    making.refine(
        model,
        rounded,
        final,
        text=plan.refine.text,
        tokens=plan.refine.tokens,
        run=final.parent / "refine",
        resume=True,
        settings=plan.refine.overrides,
        allow_overlap=plan.evaluation.allow_overlap,
        seed=plan.seed,
    )


def _evaluate(plan: Plan, model: str | Path, files: Mapping[str, Path], out: Path) -> None:
    settings = plan.evaluation
    options = {"text": settings.text, "length": settings.length, "windows": settings.windows or None}
    options |= {"allow_overlap": settings.allow_overlap}
    results = {name: evaluate(file, reference=model, **options) for name, file in files.items()}
    ratio = results["quantized"]["kl"] / results["plain"]["kl"]
    with atomic_path(out) as path:
        path.write_text(json.dumps(results | {"ratio": ratio, "settings": dataclasses.asdict(settings)}, indent=1))
