"""Studies: every point once, whatever happens to workers; failures, pruning and repetition are recorded."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import optuna
import pytest
import study_worker

from sqjax import study_results
from sqjax.run import InputError
from sqjax.search_space import Search, Space
from sqjax.studies import Outcome, is_finished, open_storage, open_study, records, work

WORKER = [sys.executable, study_worker.__file__]


# ---- storage


def postgres_binary(name):
    found = [*pathlib.Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), *filter(None, [shutil.which(name)])]
    return str(found[0]) if found else None


@contextlib.contextmanager
def postgres():
    """A server of its own in a temporary folder, reached through a socket in it."""
    if postgres_binary("initdb") is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    pytest.importorskip("psycopg")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sqjax-pg-"))
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    if os.geteuid() == 0:
        # The server refuses to run as root; Debian's package brings a user.
        shutil.chown(folder, "postgres")
        options["user"] = "postgres"
    server = None
    try:
        initdb = [postgres_binary("initdb"), "-D", folder / "data", "-U", "sqjax", "--auth=trust", "--no-sync"]
        subprocess.run(initdb, check=True, **options)
        settings = ["-c", "listen_addresses=", "-c", "fsync=off", "-k", str(folder)]
        server = subprocess.Popen([postgres_binary("postgres"), "-D", folder / "data", *settings], **options)
        ready = [postgres_binary("pg_isready"), "-h", str(folder), "-d", "postgres"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, **options).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        yield f"postgresql://sqjax@/postgres?host={folder}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
    else:
        with postgres() as address:
            yield address


def lines(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def found(url):
    study = open_study(open_storage(url, study_worker.SEARCH), study_worker.SEARCH, study_worker.SPACE, {"test": 1})
    assert is_finished(study, study_worker.SEARCH)
    return records(study, study_worker.SPACE)


def test_two_workers_share_a_study_and_run_no_trial_twice(url, tmp_path):
    log = tmp_path / "log"
    workers = [subprocess.Popen([*WORKER, url, str(log), "0.1"]) for _ in range(2)]
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0]
    begun = [float(strength) for word, strength, _ in lines(log) if word == "begin"]
    assert sorted(begun) == study_worker.STRENGTHS
    assert {int(pid) for _, _, pid in lines(log)} == {worker.pid for worker in workers}
    rows = found(url)
    assert [row["settings"]["recipe.gamma_in"] for row in rows] == study_worker.STRENGTHS
    assert {row["state"] for row in rows} == {"complete"} and {row["attempts"] for row in rows} == {1}
    # Scaling columns by their importance helps, up to a point.
    best = study_results.ranking(rows)[0]["settings"]["recipe.gamma_in"]
    assert 0.0 < best < study_worker.STRENGTHS[-1]


def test_a_study_whose_worker_is_killed_twice_is_completed(tmp_path):
    url, log = f"sqlite:///{tmp_path / 'study.db'}", tmp_path / "log"
    for count in (3, 7):
        worker = subprocess.Popen([*WORKER, url, str(log), "0.3"])
        wait_until(lambda: sum(word == "begin" for word, *_ in lines(log)) >= count)  # noqa: B023, used at once
        worker.kill()
        worker.wait()
    assert subprocess.run([*WORKER, url, str(log), "0"], timeout=200).returncode == 0
    rows = found(url)
    assert {row["state"] for row in rows} == {"complete"}
    assert [row["settings"]["recipe.gamma_in"] for row in rows] == study_worker.STRENGTHS
    ended = [strength for word, strength, _ in lines(log) if word == "end"]
    assert len(ended) == len(set(ended)) == 20
    cut = {strength for word, strength, _ in lines(log) if word == "begin"} - set(ended)
    assert not cut and sum(row["attempts"] == 2 for row in rows) == len(lines(log)) - 40 > 0


# ---- in one process


def run_study(tmp_path, objective, space, **settings):
    search = Search(name="test", **settings)
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}", search)
    study = open_study(storage, search, Space.read(space), {})
    work(study, search, Space.read(space), objective)
    assert is_finished(study, search)
    return study, records(study, Space.read(space))


def test_a_trial_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    def objective(points, report):
        if any(point["x"] == 2 for point in points):
            raise RuntimeError("no memory")
        yield from enumerate([Outcome((float(point["x"]),), {"note": point["x"]}) for point in points])

    _, rows = run_study(tmp_path, objective, {"x": [1, 2, 3]}, batch_trials=3)
    assert [row["state"] for row in rows] == ["complete", "fail", "complete"]
    assert rows[1]["error"] == "RuntimeError: no memory" and rows[2]["note"] == 3


def test_an_interrupted_trial_waits_again(tmp_path):
    calls = []

    def objective(points, report):
        calls.append(points)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from enumerate([Outcome((0.0,)) for _ in points])

    with pytest.raises(KeyboardInterrupt):
        run_study(tmp_path, objective, {"x": [1, 2, 3]})
    _, rows = run_study(tmp_path, objective, {"x": [1, 2, 3]})
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert [row["attempts"] for row in rows] == [1, 2, 1] and len(calls) == 4


def test_an_interruption_leaves_no_statement_half_done(tmp_path, monkeypatch):
    """One that arrived in the middle of a statement would lock the file for every worker."""
    storage = optuna.storages.RDBStorage
    interrupted = []

    def told(self, *arguments, _told=storage.set_trial_user_attr, **options):
        if not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)
        _told(self, *arguments, **options)
        interrupted.append("done")

    def objective(points, report):
        yield from enumerate([Outcome((0.0,)) for _ in points])

    monkeypatch.setattr(storage, "set_trial_user_attr", told)
    # Shells start what runs in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(tmp_path, objective, {"x": [1, 2]})
    finally:
        signal.signal(signal.SIGINT, before)
    assert interrupted[:2] == [True, "done"]
    _, rows = run_study(tmp_path, objective, {"x": [1, 2]})
    assert [row["state"] for row in rows] == ["complete"] * 2


@pytest.mark.parametrize("objectives", [("inside",), ("inside", "outside")])
def test_hopeless_trials_are_pruned(tmp_path, objectives):
    def objective(points, report):
        assert len(points) == 1
        x = points[0]["x"]
        yield from enumerate([Outcome(None if report(0, 0, x) else (x,) * len(objectives))])

    _, rows = run_study(tmp_path, objective, {"x": [0.5, 2.0]}, prune_above=1.0, objectives=objectives)
    assert [row["state"] for row in rows] == ["complete", "pruned"] and rows[1]["watched"] == {"0": 2.0}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_samplers_search_ranges_and_take_no_more_than_their_trials(tmp_path, sampler):
    space = {"recipe": {"gamma_in": {"low": 0.0, "high": 1.5}}, "calibration": {"text": [["a"], ["b", "c"]]}}

    def objective(points, report):
        assert all(point["calibration.text"] in (["a"], ["b", "c"]) for point in points)
        yield from enumerate(
            [Outcome((abs(p["recipe.gamma_in"] - 0.5), abs(p["recipe.gamma_in"] - 0.7))) for p in points]
        )

    settings = {"sampler": sampler, "trials": 12, "objectives": ("inside", "outside"), "batch_trials": 5}
    study, rows = run_study(tmp_path, objective, space, **settings)
    assert len(rows) == 12 == len(study.trials)
    front = [row["settings"]["recipe.gamma_in"] for row in study_results.ranking(rows) if row["on_front"]]
    assert front and len({row["settings"]["recipe.gamma_in"] for row in rows}) > 8


def test_a_point_drawn_twice_is_computed_once(tmp_path):
    calls = []

    def objective(points, report):
        calls.extend(points)
        yield from enumerate([Outcome((float(point["x"]),)) for point in points])

    _, rows = run_study(tmp_path, objective, {"x": [1, 2]}, sampler="random", trials=6)
    assert len(rows) == 6 and len(calls) == 2 and sum("same_as" in row for row in rows) == 4


def test_what_a_study_gets_wrong_is_named(tmp_path):
    run_study(tmp_path, lambda points, report: enumerate([Outcome((0.0,)) for _ in points]), {"x": [1]})
    search = Search(name="test")
    storage = open_storage(f"sqlite:///{tmp_path / 'study.db'}", search)
    with pytest.raises(InputError, match="other settings"):
        open_study(storage, search, Space.read({"x": [1, 2]}), {"space": 2})
    with pytest.raises(InputError, match="sqlite:///FILE or postgresql"):
        open_storage("mysql://host/name", search)
    with pytest.raises(InputError, match="needs a number of trials"):
        Search(sampler="tpe")
    with pytest.raises(InputError, match="no sampler 'best'"):
        Search(sampler="best")
    with pytest.raises(InputError, match="one objective"):
        Search(prune_median=True, objectives=("inside", "outside"))
    with pytest.raises(InputError, match="is a range"):
        Space.read({"x": {"low": 0, "high": 1}}).points()
    with pytest.raises(InputError, match="nothing is searched"):
        Space.read({})


# ---- results


def record(trial, settings, values, state="complete"):
    ratio = {"c4": values[0], "slovene": values[1]}
    return {"trial": trial, "state": state, "settings": settings, "values": list(values), "ratio": ratio}


def test_seeds_are_averaged_and_a_lucky_one_wins_nothing(tmp_path):
    rows = [
        record(0, {"seed": 0, "recipe.gamma_in": 0.5, "recipe.gamma_out": 0.0}, (0.8, 0.9)),
        record(1, {"seed": 1, "recipe.gamma_in": 0.5, "recipe.gamma_out": 0.0}, (0.6, 0.9)),
        record(2, {"seed": 0, "recipe.gamma_in": 1.0, "recipe.gamma_out": 0.5}, (0.9, 0.8)),
        record(3, {"seed": 1, "recipe.gamma_in": 1.0, "recipe.gamma_out": 0.5}, (0.9, 0.8)),
        record(4, {"seed": 0, "recipe.gamma_in": 2.0, "recipe.gamma_out": 0.0}, (0.1, 0.1)),
        record(5, {"seed": 0, "recipe.gamma_in": 1.0, "recipe.gamma_out": 0.0}, (0.9, 0.95)),
        record(6, {"seed": 1, "recipe.gamma_in": 1.0, "recipe.gamma_out": 0.0}, (0.9, 0.95)),
    ]
    ranked = study_results.ranking(rows)
    assert ranked[0]["settings"] == {"recipe.gamma_in": 0.5, "recipe.gamma_out": 0.0}
    assert ranked[0]["values"] == pytest.approx([0.7, 0.9]) and ranked[0]["spread"] == pytest.approx([0.1, 0.0])
    assert [row["on_front"] for row in ranked] == [True, True, False, False] and ranked[3]["trials"] == [4]
    assert study_results.ranking([*rows, rows[4] | {"trial": 7, "same_as": 4}]) == ranked
    study_results.write_records(tmp_path / "results.jsonl", [*rows, {"trial": 9, "values": [float("nan")]}])
    back = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert back[:7] == rows and back[7]["values"] == [None]
