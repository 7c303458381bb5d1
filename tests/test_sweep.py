"""Whole sweeps on the embedded model, killed and completed, and strengths rounded side by side."""

import json
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoint

import sqjax
from sqjax import sources, sweeping, trials
from sqjax.calibration import collect
from sqjax.checkpoint import load_checkpoint
from sqjax.making import read_recipe
from sqjax.model import Qwen35
from sqjax.objective import proxy_loss
from sqjax.q4_k import Q4K, dequantize
from sqjax.quantizer import Recipe, quantize
from sqjax.run import InputError
from sqjax.statistics import means
from sqjax.variants import quantize_variants, shaped_problems

SWEEP = [sys.executable, "-m", "sqjax.cli", "sweep", "small"]


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_that_is_killed_goes_on_and_its_winner_is_a_recipe(tmp_path):
    out, best = tmp_path / "out", tmp_path / "best.toml"
    command = [*SWEEP, "--out", str(out), "--best", str(best), "--json"]
    worker = subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    # Statistics of the first seed are there: its trials are being rounded.
    while not list(out.glob("statistics/*/statistics.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    (first,) = out.glob("statistics/*/statistics.json")
    made = first.stat().st_mtime_ns

    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["trials"] == {"complete": 4} and result["best"] == result["ranking"][0]
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["settings"]["seed"] for row in rows] == [0, 0, 1, 1] and any(row["attempts"] == 2 for row in rows)
    # Statistics are measured once a seed and shared, also by the run that was killed.
    assert len(list(out.glob("statistics/*/statistics.json"))) == 2 and first.stat().st_mtime_ns == made

    assert set(result["report"]) == {"markdown", "html", "strength.png", "strength.svg", "pareto.png", "pareto.svg"}
    assert set(rows[0]["ratio"]) == {"convergence60", "demo"} and set(rows[0]["evaluation"]["ratio"]) == {"heldout120"}

    strength = result["best"]["settings"]["recipe.gamma_in"]
    assert isinstance(read_recipe(best), Recipe) and read_recipe(best).gamma_in == strength
    verified = result["verified"]
    assert verified["evaluation"]["ratio"] < 1.0 and verified["types"] == {"Q4_K": 32, "F32": 23}
    again = sqjax.sweep("small", out=out, workers=1)
    assert again["ranking"] == result["ranking"] and max(again["verified"]["stages"].values()) == 0.0
    statistics = str(first.parent)
    made = sqjax.quantize(sources.DEMO_MODEL, tmp_path / "best.gguf", recipe=best, statistics=statistics)
    assert made["sha256"] == verified["sha256"]


@pytest.mark.parametrize("setting", ['watch.outside=["heldout120"]', 'calibration.text=["heldout120"]'])
def test_the_winner_is_measured_on_text_of_its_own(setting, tmp_path):
    with pytest.raises(InputError, match="heldout120"):
        sqjax.sweep("small", settings=[setting], out=tmp_path)


def test_two_watched_texts_have_two_names():
    with pytest.raises(InputError, match="two have one name"):
        sweeping.read_sweep("small", ['watch.inside=["a/chat.jsonl"]', 'watch.outside=["b/chat.jsonl"]'])


@pytest.mark.slow
@pytest.mark.parametrize("gamma_out", [0.0, 0.5])
def test_variants_are_what_each_recipe_gives_alone(tmp_path, gamma_out):
    random_checkpoint.write(tmp_path, **random_checkpoint.RUNNABLE)
    checkpoint = load_checkpoint(tmp_path)
    config, tensors = checkpoint.config, checkpoint.tensors
    rows = np.random.default_rng(0).integers(3, config.vocab_size, (4, 96)).astype(np.int32)
    statistics = means(config, collect(Qwen35.from_tensors(config, tensors), rows, batch=2), rows)
    steps = ("feedback", "descend_codes")
    recipes = [Recipe(steps=steps, sweeps=1, gamma_in=gamma, gamma_out=gamma_out) for gamma in (0.5, 1.0)]
    variants = quantize_variants(config, tensors, statistics, recipes)
    alone = [quantize(config, tensors, statistics, recipe) for recipe in recipes]
    gains = []
    for name, tensor in alone[0].items():
        if not isinstance(tensor, Q4K):
            for together, single in zip(variants, alone):
                np.testing.assert_array_equal(np.asarray(together[name]), np.asarray(single[name]))
        elif name.startswith("blk."):
            problems = shaped_problems(jnp.asarray(tensors[name], jnp.float32), *statistics.grams(name), recipes)
            # Sums in another order send a tie the other way, and all columns after it make that good: codes differ,
            # what they cost does not.
            for index, problem in enumerate(problems):
                costs = [float(proxy_loss(problem, dequantize(variant[name]))) for variant in variants]
                single = float(proxy_loss(problem, dequantize(alone[index][name])))
                assert costs[index] == pytest.approx(single, rel=0.02), name
                gains.append(np.log(costs[1 - index] / costs[index]))
    # Each strength is the better one under its own Grams.
    assert np.mean(gains) > 0.02, gains


@pytest.mark.slow
def test_a_trial_that_refines_is_closer_than_one_that_does_not(tmp_path):
    single = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "full_attention_interval": 1}
    random_checkpoint.write(tmp_path / "model", **(random_checkpoint.RUNNABLE | single))
    for name, factor in {"pool": 3, "watch": 7}.items():
        text = "".join(f"{i} times {i + factor} is {i * (i + factor)}, and so on; " for i in range(200))
        (tmp_path / f"{name}.txt").write_text(text)
    refining = {"text": [str(tmp_path / "pool.txt")], "tokens": 1024, "length": 32, "batch": 4, "softness": 0.0}
    values = {"recipe": {"base": "rtn"}, "refine": refining | {"warmup": 2, "watch_every": 4}}
    watch = trials.Watch(inside=(str(tmp_path / "watch.txt"),), outside=(), first="", length=32, windows=16)
    bench = trials.Bench(tmp_path / "model", values, watch, ["inside"], tmp_path / "out")
    ((_, outcome),) = bench([{}], lambda index, step, value: False)
    assert outcome.values[0] < 0.95
