"""Jobs that several processes share, and the parts and reports of experiments that are made of them."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments import pool, workers
from experiments.refinement import parts, report
from experiments.workers import Busy, Job

OPTIONS = {"curve": [1, 2, 4], "budget": 2, "most": 4, "uneven": 3, "seeds": [0, 1]}


def texts(ratio):
    figures = {"ratio": ratio, "recovery": {"value": 1 - ratio, "interval": [0.0, 1.0], "label": "recovery"}}
    return {name: figures for name in ("watch", "trained", "c4", "code", "slovene")}


def test_what_has_its_line_is_not_done_again_and_a_failure_costs_no_other_job(tmp_path):
    calls = []

    def run(name):
        calls.append(name)
        if name == "bad":
            raise ValueError("broken")
        return {"value": name}

    jobs = [Job(name, lambda name=name: run(name)) for name in ("first", "bad", "last")]
    assert not workers.work(jobs, tmp_path, 60.0)
    assert not workers.work(jobs, tmp_path, 60.0)
    assert calls == ["first", "bad", "last", "bad"]
    assert {name: row["value"] for name, row in workers.done(tmp_path).items()} == {"first": "first", "last": "last"}


def test_a_run_that_is_out_of_time_stops_and_goes_on(tmp_path):
    assert not workers.work([Job("long", lambda: time.sleep(60))], tmp_path, 0.2)
    assert workers.results(tmp_path) == []
    assert workers.work([Job("long", dict)], tmp_path, 60.0)


def test_a_job_that_waits_for_another_comes_later(tmp_path):
    def second():
        if "first" not in workers.done(tmp_path):
            raise Busy("first")
        return {}

    assert workers.work([Job("second", second), Job("first", dict)], tmp_path, 60.0)
    assert [row["job"] for row in workers.results(tmp_path)] == ["first", "second"]


def test_what_another_process_makes_is_busy(tmp_path):
    with workers.held(tmp_path, "file"), pytest.raises(Busy):
        workers.make_once(tmp_path, tmp_path / "file", lambda: None)
    assert workers.make_once(tmp_path, tmp_path / "file", (tmp_path / "file").touch).exists()


def test_runs_of_all_parts_share_names_only_where_they_are_the_same_run():
    runs = [run for part in parts.PARTS for run in parts.runs(part, **OPTIONS)]
    same = {run.name: (run.start, run.tokens, run.settings, run.text) for run in runs}
    assert all(same[run.name] == (run.start, run.tokens, run.settings, run.text) for run in runs)
    assert len({run.name for run in parts.runs("ablation", **OPTIONS)}) == 1 + sum(map(len, parts.GROUPS.values()))


def test_the_best_of_a_group_is_chosen_where_it_beats_the_defaults():
    watched = {parts.DEFAULTS: 1.0, "codes_rate 0.009": 0.95, "codes_rate 0.018": 0.9}
    assert parts.choose(watched | {"cosine": 0.999}) == ("codes_rate=0.018",)


def test_a_report_of_every_part(tmp_path):
    workers.write(tmp_path, {"job": "plain.even", "part": "plain", "label": "plain", "texts": texts(1.0)})
    workers.write(tmp_path, {"job": "broken", "error": "no figure"})
    for part in parts.PARTS:
        for run in parts.runs(part, **OPTIONS):
            row = {"job": run.name, "part": part, "label": run.label, "start": run.start.name, "asked": run.tokens}
            row |= {"overrides": run.settings, "text": run.text, "step": 1, "seconds": 1.0, "tokens_per_second": 1.0}
            workers.write(tmp_path, row | {"best_kl": 0.1, "texts": texts(0.5)})
    report.write(tmp_path, tmp_path / "report")
    tables = (tmp_path / "report" / "tables.md").read_text()
    assert all(title in tables for title in ("## Tokens", "## Seeds", "## Uneven", "## Settings", "## Prompts"))
    assert "multilingual text twice" in tables
    assert "0.500" in tables and "50% [0%, 100%]" in tables and (tmp_path / "report" / "curve.svg").exists()
    assert "broken" not in (tmp_path / "report" / "results.jsonl").read_text()


def test_no_file_of_a_source_is_on_both_sides(tmp_path):
    rows = [
        {"text": f"text {i}", "domain": "chat" if i % 2 else "books", "source": f"file{i // 4}#{i}"} for i in range(600)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool.split(tmp_path / "pool.jsonl", tmp_path / "split", prompts=5)
    pool.check(tmp_path / "split", {})
    read = lambda name: [json.loads(line) for line in (tmp_path / "split" / name).read_text().splitlines()]  # noqa: E731
    watched = read("watch.jsonl")
    assert 0 < len(watched) < 60 and len(read("chat.jsonl")) == 5
    books = [row["source"].split("#")[0] for row in watched if row["domain"] == "books"]
    # A file has two chunks among the documents; conversations of one file may be on either side.
    assert books and all(books.count(file) == 2 for file in books)
    assert pool.checked(tmp_path / "split")["watch"] == {"documents": len(watched), "also trained on": 0}
