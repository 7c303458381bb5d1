"""Studies: a search over dotted settings whose trials are shared by any number of workers through one database.

Optuna draws the trials and keeps them, in SQLite or PostgreSQL. Workers take trials under a lock of that database, so
that no trial is drawn or run twice, and send a heartbeat while they run them: trials of a worker that was killed wait
for another one again.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from sqjax.run import InputError, uninterrupted
from sqjax.search_space import Point, Search, Space

_GRACE = 4


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Optuna marks heartbeats and its constant liar as experimental, and warns of heartbeats outside of its loop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(url: str, search: Search) -> optuna.storages.RDBStorage:
    """Opens, or creates, the database at a URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.

    Raises:
      InputError: it is of another kind, or cannot be opened.
    """
    address = sqlalchemy.make_url(url)
    # No connection outlives what it was opened for: a trial takes minutes, and servers close idle ones.
    options: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}
    if address.drivername == "sqlite":
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        options["connect_args"] = {"timeout": 60}
    elif address.drivername.partition("+")[0] in ("postgresql", "postgres"):
        address = address.set(drivername="postgresql+psycopg")
    else:
        raise InputError(f"a study is kept in sqlite:///FILE or postgresql://HOST/NAME, not in {address.drivername}")
    try:
        # Two that find an empty database would both make its tables.
        engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.pool.NullPool)
        with _quietly(), _exclusively(engine, "tables"):
            return optuna.storages.RDBStorage(
                address.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=search.heartbeat,
                grace_period=_GRACE * search.heartbeat,
                heartbeat_stale_trial_callback=functools.partial(_retry, most=search.retries),
            )
    except ImportError as error:
        raise InputError(f"{address.drivername} needs a driver: pip install 'sqjax[postgresql]'") from error
    except (OSError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(f"cannot open the study's database {address!r}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _exclusively(engine: sqlalchemy.Engine, name: str) -> Iterator[None]:
    """One worker of a study at a time, on whatever host; a worker that is killed lets go."""
    if engine.url.get_backend_name() == "sqlite":
        with open(f"{engine.url.database}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": key})
        try:
            yield
        finally:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), {"key": key})


def open_study(
    storage: optuna.storages.RDBStorage, search: Search, space: Space, identity: Mapping[str, Any]
) -> optuna.Study:
    """Opens a study, or creates it with all points of a grid waiting.

    Raises:
      InputError: the database has a study of that name with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    points = space.points() if search.sampler == "grid" else []
    is_other = InputError(f"the database has a study {search.name} with other settings; give sweep.name another name")
    with _exclusively(storage.engine, search.name):
        try:
            study = optuna.create_study(
                study_name=search.name,
                storage=storage,
                directions=["minimize"] * len(search.objectives),
                pruner=_pruner(search),
                load_if_exists=True,
            )
        except ValueError as error:
            raise is_other from error
        if study.user_attrs.setdefault("identity", digest) != digest:
            raise is_other
        study.set_user_attr("identity", digest)
        # A study whose creator was killed has some of them.
        if not study.user_attrs.get("is_filled"):
            for point in points[len(study.get_trials(deepcopy=False)) :]:
                study.enqueue_trial(point)
            study.set_user_attr("is_filled", True)
    return study


def _pruner(search: Search) -> optuna.pruners.BasePruner:
    return optuna.pruners.MedianPruner() if search.prune_median else optuna.pruners.NopPruner()


def _sampler(search: Search, started: int) -> optuna.samplers.BaseSampler:
    # Seeded by the number of trials: workers draw different points, and a study that is taken up again goes on alike.
    seed = _seed(search.seed, started)
    if search.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if search.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(8, min(50, search.trials // 4)))
    return optuna.samplers.RandomSampler(seed=seed)


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")


# ---------------------------------------------------------------------------------------------------------------------
# Workers


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: the values of the objectives, or None where it was pruned, and facts to be kept."""

    values: tuple[float, ...] | None
    facts: Mapping[str, Any] = field(default_factory=dict)


# Whether a trial, known by its index in the batch, is to end, given a step and what it reports there.
Report = Callable[[int, int, float], bool]
# Gives the outcome of each point of a batch, with its index, as soon as it is known.
Objective = Callable[[Sequence[Point], Report], Iterable[tuple[int, Outcome]]]


def work(study: optuna.Study, search: Search, space: Space, objective: Objective) -> int:
    """Takes trials and runs them until all of the study are finished, by whomever; returns how many it ran.

    A trial that raises is recorded with its error. When this worker is interrupted its trials wait again.
    """
    done = 0
    while True:
        trials: list[optuna.Trial] = []
        try:
            _take(study, search, space, trials)
            if trials:
                with _heartbeat(study._storage, search.heartbeat, [trial._trial_id for trial in trials]):
                    _run(study, search, space, objective, trials)
        except BaseException:
            for trial in trials:
                _release(study, trial._trial_id)
            raise
        if trials:
            done += len(trials)
        elif _is_open(study):
            # Trials of others, who may yet be killed.
            time.sleep(min(search.heartbeat, 2.0))
        else:
            return done


# Functions that use the database are not interrupted: a statement that is left half done locks a file of SQLite for all
# workers, for as long as the exception that tells of it is alive.


@uninterrupted()
def _is_open(study: optuna.Study) -> bool:
    """Whether any trial runs or waits."""
    return any(study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)))


@uninterrupted()
def _take(study: optuna.Study, search: Search, space: Space, taken: list[optuna.Trial]) -> None:
    """Adds up to a batch of trials to those taken: those of dead workers and waiting ones first, then new ones."""
    storage = study._storage
    with _quietly(), _exclusively(_database(storage).engine, study.study_name):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "worker" not in trial.user_attrs:
                # Its worker was killed between taking it, under this lock, and the first heartbeat.
                _release(study, trial._trial_id)
        optuna.storages.fail_stale_trials(study)
        while len(taken) < search.batch_trials:
            trials = study.get_trials(deepcopy=False)
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not waiting and (search.sampler == "grid" or _started(trials) >= search.trials):
                break
            study.sampler = _sampler(search, len(trials))
            trial = study.ask(fixed_distributions=space.distributions)
            storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            taken.append(trial)


def _database(storage: Any) -> optuna.storages.RDBStorage:
    """Optuna wraps a database into a cache."""
    return getattr(storage, "_backend", storage)


def origin(trial: optuna.trial.FrozenTrial) -> int:
    """Number of the trial of which this is another attempt, or its own."""
    return trial.system_attrs.get("failed_trial", trial.number)


def _started(trials: Sequence[optuna.trial.FrozenTrial]) -> int:
    return len({origin(trial) for trial in trials})


def _retry(study: optuna.Study, trial: optuna.trial.FrozenTrial, most: int | None = None) -> None:
    """Lets another attempt at a trial wait, unless there have been more than `most`."""
    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if most is None or len(history) <= most:
        attributes = {**trial.system_attrs, "failed_trial": origin(trial), "retry_history": history}
        study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=attributes,
            )
        )


@uninterrupted()
def _release(study: optuna.Study, trial_id: int) -> None:
    """Marks a trial as failed and lets another attempt wait."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        if study._storage.set_trial_state_values(trial_id, state=TrialState.FAIL):
            _retry(study, study._storage.get_trial(trial_id))


@contextlib.contextmanager
def _heartbeat(storage: Any, seconds: int, trial_ids: Sequence[int]) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(seconds):
            for trial_id in trial_ids:
                # A database that does not answer for a while costs a beat, not the trial.
                with contextlib.suppress(optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
                    storage.record_heartbeat(trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _run(
    study: optuna.Study, search: Search, space: Space, objective: Objective, trials: Sequence[optuna.Trial]
) -> None:
    """Runs trials together; where that fails, one by one, so that only those at fault fail."""
    trials = [trial for trial in trials if not _repeat(study, trial)]
    if not trials:
        return
    left = dict(enumerate(trials))
    try:
        points = [space.settings(trial.params) for trial in trials]
        for index, outcome in objective(points, lambda *said: _is_hopeless(search, trials[said[0]], *said[1:])):
            _tell(study, left.pop(index), outcome)
    except Exception as error:
        if len(trials) == 1:
            _tell(study, trials[0], error)
            return
        for trial in left.values():
            _run(study, search, space, objective, [trial])


@uninterrupted()
def _is_hopeless(search: Search, trial: optuna.Trial, step: int, value: float) -> bool:
    trial.set_user_attr("watched", {**trial.user_attrs.get("watched", {}), str(step): value})
    if len(search.objectives) == 1:
        trial.report(value, step)
    above = 0 < search.prune_above < value
    return above or (search.prune_median and trial.should_prune())


@uninterrupted()
def _repeat(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Gives a trial the values of a finished one with the same parameters, should a sampler draw them twice."""
    for other in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if other.params == trial.params:
            facts = {key: value for key, value in other.user_attrs.items() if key != "worker"}
            _tell(study, trial, Outcome(tuple(other.values), facts | {"same_as": other.number}))
            return True
    return False


@uninterrupted()
def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome | Exception) -> None:
    try:
        if isinstance(outcome, Exception):
            print(f"trial {trial.number} failed: {outcome!r}", file=sys.stderr, flush=True)
            trial.set_user_attr("error", f"{type(outcome).__name__}: {outcome}")
            trial.set_user_attr("traceback", "".join(traceback.format_exception(outcome))[-4000:])
            study.tell(trial, state=TrialState.FAIL)
            return
        for key, value in outcome.facts.items():
            trial.set_user_attr(key, value)
        if outcome.values is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [float(value) for value in outcome.values])
    except optuna.exceptions.UpdateFinishedTrialError:
        # This worker seemed dead, and another one has its trial.
        print(f"trial {trial.number} was given to another worker meanwhile", file=sys.stderr, flush=True)


def is_finished(study: optuna.Study, search: Search) -> bool:
    """Whether no trial runs or waits, and no further one is asked for."""
    return not _is_open(study) and (
        search.sampler == "grid" or _started(study.get_trials(deepcopy=False)) >= search.trials
    )


def records(study: optuna.Study, space: Space) -> list[dict[str, Any]]:
    """Returns one record for each trial, its last attempt: number, state, settings, values, facts and seconds."""
    last = {origin(trial): trial for trial in study.get_trials(deepcopy=False)}
    rows = []
    for number, trial in sorted(last.items()):
        parameters = trial.params or trial.system_attrs.get("fixed_params", {})
        row = {"trial": number, "state": trial.state.name.lower(), "settings": space.settings(parameters)}
        row |= {"values": trial.values if trial.state == TrialState.COMPLETE else None}
        row |= {"attempts": 1 + len(trial.system_attrs.get("retry_history", []))}
        if trial.state == TrialState.FAIL and "error" not in trial.user_attrs:
            row["error"] = f"its worker was killed {row['attempts']} times"
        rows.append(row | {key: value for key, value in trial.user_attrs.items() if key != "traceback"})
    return rows
