"""A sweep: a study over the settings of a plan, by workers of one host or of many, and what came of it.

study -> trials, by workers -> results.jsonl, best.toml, plan.toml -> the winner's file, measured -> report
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqjax import cache, fingerprints, plans, studies, study_report, study_results
from sqjax.measuring import look_up, prepare, sampled
from sqjax.run import InputError, atomic_path
from sqjax.search_space import Search, Space
from sqjax.settings import build, overridden, parse_overrides, read_toml, to_toml
from sqjax.sources import DEMO_MODEL, find_config, open_model
from sqjax.trials import Bench, Watch, lock, statistics_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep's TOML file says: the tables of a plan, and [sweep], [search] and [watch].

    Attributes:
      model: what is quantized; the package's own model unless given.
      search: how.
      space: what is searched.
      watch: what trials are judged by.
      values: nested settings of the plan that trials change.
    """

    model: str
    search: Search
    space: Space
    watch: Watch
    values: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What makes two sweeps one study; it may be taken up again with other numbers of trials and workers."""
        search = dataclasses.asdict(self.search)
        settled = {key: search[key] for key in ("sampler", "objectives", "seed")}
        ranges = {name: repr(value) for name, value in self.space.ranges.items()}
        space = {"choices": self.space.choices, "ranges": ranges}
        watch = dataclasses.asdict(self.watch)
        return {"model": Path(self.model).name, "values": self.values, **settled, "space": space, "watch": watch}


def read_sweep(config: str | Path, settings: Sequence[str] = (), model: str | Path | None = None) -> Sweep:
    """Reads a sweep by its name in configs/ or by its path, with `table.key=value` overrides.

    Raises:
      InputError: there is no such sweep, or a setting, searched or not, is unknown or wrong.
    """
    path = find_config(config, "sweep")
    values = overridden(read_toml(path), parse_overrides(settings))
    space = Space.read(values.pop("search", {}))
    search = build(Search, {"name": path.stem} | dict(values.pop("sweep", {})), f"sweep in {path.name}")
    watch = build(Watch, values.pop("watch", {}), f"watch in {path.name}")
    model = str(model or values.pop("model", DEMO_MODEL))
    values.pop("model", None)
    # Every name and kind is looked at before anything is computed.
    for name, choices in space.choices.items():
        for choice in choices:
            plans.plan_of(overridden(values, {name: choice}), path.name)
    for name, distribution in space.ranges.items():
        plans.plan_of(overridden(values, {name: distribution.low}), path.name)
    return Sweep(model=model, search=search, space=space, watch=watch, values=values)


def sweep(
    config: str | Path,
    *,
    model: str | Path | None = None,
    workers: int | None = None,
    storage: str | None = None,
    out: str | Path | None = None,
    best: str | Path | None = None,
    settings: Sequence[str] = (),
    verify: bool = True,
) -> dict[str, Any]:
    """Searches the settings of a plan; a sweep that was interrupted goes on, and hosts that share a storage share it.

    Args:
      config: name of a sweep in configs/, or path of a TOML file.
      model: what is quantized; that of the config, else the package's own model.
      workers: processes on this host; one a device unless given.
      storage: sqlite:///FILE or postgresql://HOST/NAME, for workers on several hosts; OUT/study.db unless given.
      out: folder for statistics, results and figures; runs/NAME unless given.
      best: write the winning recipe to this TOML file.
      settings: `table.key=value` overrides of the config.
      verify: also write the winner's file, OUT/best-TRIAL/MODEL-Q4_K_M.gguf, and measure it beside plain rounding.

    Returns `study`, `folder`, `trials` (counts by state), `best` (settings, values, ratio), `ranking`, `recipe`,
    `files`, `report` (paths by kind), `verified`, `seconds` and what the sweep was about.

    Raises:
      InputError: the config is wrong, the winner would be measured on text that trials are judged by, the storage
        cannot be opened or holds another study, or every trial failed.
    """
    start = time.monotonic()
    chosen = read_sweep(config, settings, model)
    out = Path(out or Path("runs") / chosen.search.name)
    out.mkdir(parents=True, exist_ok=True)
    storage = storage or f"sqlite:///{(out / 'study.db').absolute()}"
    if verify:
        _keep_apart(chosen)
    study = _open(chosen, storage)
    count = _devices() if workers is None else workers
    if count < 1:
        raise InputError(f"{count} workers cannot work; ask for 1 or more")
    if not studies.is_finished(study, chosen.search):
        if count == 1:
            work(chosen, storage, out)
        else:
            asked = {"config": str(config), "settings": list(settings), "model": chosen.model}
            _work_in_processes(asked | {"storage": storage, "out": str(out)}, count)
    return _conclude(chosen, study, out, best, verify) | {"seconds": time.monotonic() - start}


def _open(chosen: Sweep, storage: str):
    return studies.open_study(
        studies.open_storage(storage, chosen.search), chosen.search, chosen.space, chosen.identity
    )


# ---------------------------------------------------------------------------------------------------------------------
# Workers


def work(chosen: Sweep, storage: str, out: Path) -> int:
    """Runs trials in this process until the study is finished; returns how many."""
    study = _open(chosen, storage)
    bench = Bench(chosen.model, chosen.values, chosen.watch, chosen.search.objectives, out)
    return studies.work(study, chosen.search, chosen.space, bench)


# A worker reads its standard input, whose end says that it shall give its trials back and go, or that its parent died.
_CHILD = """
import json, os, signal, sys, threading
from pathlib import Path

def mind_parent():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=mind_parent, daemon=True).start()
from sqjax import sweeping
asked = json.loads(sys.argv[1])
try:
    chosen = sweeping.read_sweep(asked["config"], asked["settings"], asked["model"])
    sweeping.work(chosen, asked["storage"], Path(asked["out"]))
except KeyboardInterrupt:
    sys.exit(130)
except sweeping.InputError as error:
    sys.exit(f"sqjax: {error}")
"""


def _work_in_processes(asked: Mapping[str, Any], count: int) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process(asked, environment)) for environment in _environments(count)]
        codes = [process.wait() for process in processes]
    if any(codes):
        print(f"{sum(map(bool, codes))} of {count} workers ended with an error", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _process(asked: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", _CHILD, json.dumps(asked)]
    # In a session of its own a worker is not interrupted by the terminal, and a second time by this process.
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), start_new_session=True
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _probe() -> tuple[str, int]:
    """Kind and number of this host's devices, looked at in a process of its own: workers must find them free."""
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    kind, count = done.stdout.split()
    return kind, int(count)


def _devices() -> int:
    kind, count = _probe()
    return count if kind in ("gpu", "tpu") else 1


def _environments(count: int) -> list[dict[str, str]]:
    """The environment of each worker, in which it sees one device of this host and a share of its memory."""
    kind, devices = _probe()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if kind == "gpu" else []
    numbers = visible if len(visible) == devices and all(visible) else [*map(str, range(devices))]
    result = []
    for worker in range(count):
        own = {"gpu": {"CUDA_VISIBLE_DEVICES": numbers[worker % devices]}}.get(kind, {})
        if kind == "tpu":
            own = {"TPU_VISIBLE_CHIPS": numbers[worker % devices], "TPU_PROCESS_BOUNDS": "1,1,1"}
            own |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1"}
        if kind == "gpu" and count > devices:
            own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-count // devices):.2f}"
        result.append(os.environ | own)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Results


def _conclude(chosen: Sweep, study, out: Path, best: str | Path | None, verify: bool) -> dict[str, Any]:
    """Writes results, recipe, plan and report; with `verify` also the winner's file, and what it comes to."""
    records = studies.records(study, chosen.space)
    study_results.write_records(out / "results.jsonl", records)
    rows = study_results.ranking(records)
    if not rows:
        errors = [record["error"] for record in records if "error" in record]
        raise InputError(f"no trial was completed; the first error of {len(errors)}: {errors[0] if errors else 'none'}")
    winner = rows[0]
    plan = plans.plan_of(overridden(chosen.values, winner["settings"]), "the winner")
    recipe = _recipe_text(chosen, plan, winner)
    for path in filter(None, (out / "best.toml", best)):
        with atomic_path(path) as temporary:
            temporary.write_text(recipe, encoding="utf-8")
    with atomic_path(out / "plan.toml") as temporary:
        temporary.write_text(to_toml(dataclasses.asdict(plan)), encoding="utf-8")
    states = [record["state"] for record in records]
    trials = {state: states.count(state) for state in dict.fromkeys(states)}
    result = {
        "study": chosen.search.name,
        "folder": str(out),
        "trials": trials,
        "best": winner,
        "ranking": rows,
        "recipe": recipe,
    }
    result |= _about(chosen, plan)
    # A large model's file takes long: what is known is told before.
    result = _told(result, records, out)
    if verify:
        result["verified"] = _verify(chosen, plan, out, out / f"best-{winner['trials'][0]}")
        record = next(record for record in records if record["trial"] == winner["trials"][0])
        record["evaluation"] = _by_heldout_text(result["verified"]["evaluation"], result["heldout"][0])
        study_results.write_records(out / "results.jsonl", records)
        result = _told(result, records, out)
    return result


def _about(chosen: Sweep, plan: plans.Plan) -> dict[str, Any]:
    """What a reader must know of a sweep beside its results; texts by their names, wherever they lie."""
    watch, search = chosen.watch, chosen.search
    calibration = dataclasses.asdict(plan.calibration) | {"seed": plan.seed}
    return {
        "model": Path(chosen.model).name,
        "objectives": list(search.objectives),
        "sampler": search.sampler,
        "sampler_seed": search.seed,
        "sides": {side: watch.names(side) for side in ("inside", "outside")},
        "watched": {name: Path(text).name for name, text in watch.texts.items()},
        "windows": watch.windows,
        "calibration": calibration | {"text": [Path(text).name for text in plan.calibration.text]},
        "heldout": [Path(text).name for text in plan.evaluation.text],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": cache.versions(),
    }


def _told(result: dict[str, Any], records: Sequence[study_results.Record], out: Path) -> dict[str, Any]:
    """Writes the report and sweep.json, from which it can be written again; returns the result with their paths."""
    paths = study_report.write(result, records, out)
    files = [*(str(out / name) for name in ("results.jsonl", "best.toml", "plan.toml")), *paths.values()]
    result = result | {"report": paths, "files": files}
    with atomic_path(out / "sweep.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _by_heldout_text(evaluation: Mapping[str, Any], name: str) -> dict[str, dict[str, float]]:
    """What the winner's file came to on each held-out text, as `kl` and `ratio` of a trial are on the watched ones."""
    ours, plain = (evaluation[file].get("domains") or {name: evaluation[file]} for file in ("quantized", "plain"))
    kl = {text: part["kl"] for text, part in ours.items()}
    return {"kl": kl, "ratio": {text: kl[text] / plain[text]["kl"] for text in kl}}


def _keep_apart(chosen: Sweep) -> None:
    """Raises InputError where the winner would be measured on text that trials are made with or judged by."""
    plan, watch = plans.plan_of(chosen.values, "the sweep"), chosen.watch
    settings = plan.evaluation
    if settings.allow_overlap:
        return
    checkpoint = open_model(chosen.model)
    plans.keep_apart(plan, checkpoint)
    read = functools.partial(prepare, checkpoint)
    prints = [
        sampled(read(text, length=watch.length, windows=watch.windows or None), checkpoint.tokenizer).hash_N
        for text in watch.texts.values()
    ]
    seen = {"the choice among trials": fingerprints.Seen(fingerprints.union(*prints))}
    text = read(settings.text, length=settings.length, windows=settings.windows or None)
    look_up(seen, {", ".join(settings.text): text}, checkpoint.tokenizer, remedy=plans.OTHER_TEXT)


def _verify(chosen: Sweep, plan: plans.Plan, out: Path, folder: Path) -> dict[str, Any]:
    """Makes the winner's file and measures what was written, on text that no trial has seen."""
    with lock(folder.with_suffix(".lock")):
        measured, own = statistics_folder(out, open_model(chosen.model), plan), folder / "statistics"
        if measured.exists() and not own.exists():
            folder.mkdir(parents=True, exist_ok=True)
            own.symlink_to(measured.absolute())
        return plans.make(out / "plan.toml", chosen.model, folder)


def _recipe_text(chosen: Sweep, plan: plans.Plan, winner: Mapping[str, Any]) -> str:
    """The winning recipe as TOML, what it is made for in its head."""
    values = ", ".join(f"{side} {value:.4f}" for side, value in zip(chosen.search.objectives, winner["values"]))
    calibration = json.dumps(dataclasses.asdict(plan.calibration), ensure_ascii=False)
    head = [
        f"The best of the study {chosen.search.name} on {Path(chosen.model).name}: KL over plain rounding's, {values},",
        f"mean of {len(winner['trials'])} seeds. Calibrated on {calibration}",
        "sqjax quantize MODEL OUT.gguf --recipe THIS.toml",
    ]
    return "".join(f"# {line}\n" for line in head) + to_toml(dataclasses.asdict(plan.recipe))
