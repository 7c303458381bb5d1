"""The report of a made-up comparison: what its tables say, and what a browser makes of its page."""

import copy
import json
import pathlib
import re
import xml.etree.ElementTree

import browser
import numpy as np
import pytest

from sqjax import charts, comparison, drawing, evaluation, publishing, report, spectra, tables
from sqjax.evaluation import Sequences, TokenScores
from sqjax.pages import Table
from sqjax.run import InputError

SUITES = {"chat": (40, 60, False), "slovene": (12, 50, True)}
# Name, share of plain rounding's error, tensor bytes; plain rounding is the first.
FILES = (
    *(("plain.gguf", 1.0, 1000), ("spectral.gguf", 0.5, 1000), ("too far.gguf", 0.9, 1000)),
    *(("Q5_K_S.gguf", 0.6, 1300), ("Q8_0.gguf", 0.1, 1900), ("exact.gguf", 0.0, 3600)),
)
TEXT = 'if a < b and c | d:\n\t<script>alert("`x`")</script>'


def scores(share: float, shift: float, count: int, length: int) -> tuple[TokenScores, Sequences]:
    rng = np.random.default_rng(count)
    total = count * length
    kl = 0.05 * share**2 * rng.gamma(0.5, 2, total)
    reference = rng.gamma(2, 1.5, total)
    sequence = np.repeat(np.arange(count, dtype=np.int32), length)
    loss = reference + 0.05 * share * (1 + 0.2 * rng.normal(size=total)) - shift
    columns = [x.astype(np.float32) for x in (kl, loss, reference)]
    agree = (rng.random(total) > 0.2 * share).astype(np.int32)
    role = np.tile(np.arange(length, dtype=np.int32) % 3, count)
    windows = np.zeros((count, length + 1), np.int32)
    return TokenScores(*columns, agree, sequence, role), Sequences.of_windows(windows)


def entry(name: str, share: float, size: int) -> dict:
    shift = 0.09 if name == "too far.gguf" else 0.0
    parts = {suite: scores(share, shift, *shape[:2]) for suite, shape in SUITES.items()}
    plain = {suite: scores(1.0, 0.0, *shape[:2])[0] for suite, shape in SUITES.items()}

    def described(found, sequences, baseline):
        recovery = evaluation.recovery(baseline, found) if name != "plain.gguf" else None
        change = evaluation.difference(found, baseline)
        return evaluation.summarize(found, sequences) | {
            "histogram": evaluation.histogram(found.kl),
            "recovery": recovery or {"value": None, "interval": None, "label": "plain rounding"},
            "difference_from_plain": change | {"ratio": float(found.kl.mean() / baseline.kl.mean())},
        }

    suites = {suite: described(*parts[suite], plain[suite]) for suite in SUITES}
    whole = evaluation.join([(plain[suite], parts[suite][1]) for suite in SUITES])[0]
    result = described(*evaluation.join(list(parts.values())), whole) | {"suites": suites}
    result["recovery"]["suites"] = {suite: part["recovery"] for suite, part in suites.items()}
    best = [{"token": token, "probability": 0.2} for token in (TEXT, "\n", " a", "b", "c")]
    one = {"suite": "chat", "sequence": 3, "position": 9, "kl": 1.5 * share, "role": None, "prefix": TEXT, "true": " a"}
    one |= {"probability": 0.1, "probability_reference": 0.3, "best": best, "best_reference": best}
    group = {"group": "MLP", "tensors": ["blk.0.ffn_up.weight"], "parameters": 10, "kl": 0.4 * share, "top1": 0.9}
    group |= {"kl_interval": [0.3 * share, 0.5 * share], "gap": 0.01, "gap_interval": [0.0, 0.02]}
    facts = {"file_bytes": size << 20, "tensor_bytes": size << 20, "bits_per_weight": size / 222, "parameters": 10**9}
    facts |= {"types": {"Q4_K": 10, "F32": 3}, "sha256": "ab" * 32, "file": name, "provenance": None}
    return result | facts | {"disagreements": [one], "groups": [group], "seconds": 2.0, "tokens_per_second": 1500.0}


@pytest.fixture(scope="module")
def result():
    entries = {name: entry(name, share, size) for name, share, size in FILES}
    reference = {"name": "model", "file_bytes": 3600 << 20, "types": {"BF16": 10, "F32": 3}, "bits_per_weight": 16.0}
    reference |= {"sha256": "cd" * 32, "cross_entropy": entries["plain.gguf"]["cross_entropy_reference"]}
    reference["suites"] = {
        suite: {"cross_entropy": part["cross_entropy_reference"]}
        for suite, part in entries["plain.gguf"]["suites"].items()
    }
    suites = {
        name: {"source": name, "kind": "packed", "sequences": count, "tokens": count * length, "length": length + 1}
        | {"windows": None, "out_of_domain": outside, "sha256": "ef" * 32}
        for name, (count, length, outside) in SUITES.items()
    }
    pair = {"first": "plain.gguf", "second": "spectral.gguf", "kl": 0.03, "kl_interval": [0.02, 0.04]}
    entries["plain.gguf"]["llama.cpp"] = entries["Q8_0.gguf"]
    found = {"reference": "model", "reference_facts": reference, "suites": suites, "files": entries}
    found |= {"baseline": {"name": "plain.gguf", "given": True} | entries["plain.gguf"], "differences": [pair]}
    found |= {"settings": {"runtime": "both", "dtype": "f32", "length": 61, "windows": None, "seed": 0}}
    found |= {"histogram_edges": list(evaluation.HISTOGRAM_EDGES), "versions": {"sqjax": "0"}, "date": "2026-01-01"}
    found |= {"device": "cpu", "peak_memory_bytes": 1 << 30, "peak_device_memory_bytes": None, "seconds": 9.0}
    return json.loads(json.dumps(found | {"disjoint_from_calibration": True}, allow_nan=False))


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    run = out / "run"
    run.mkdir()
    lines = [{"step": n, "kl": 0.1 / n, **({"watched_kl": 0.2 / n} if n % 5 == 0 else {})} for n in range(1, 21)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comparison.write(result, out, run=[run])
    return out


def texts(table: Table) -> dict[str, list[str]]:
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_the_release_table_has_the_losses_and_marks_the_best_of_the_size(result):
    table = tables.losses(result)
    assert table.columns == ("model", "bpw", "MiB", "chat", "slovene (out of domain)")
    rows = texts(table)
    names = list(rows)
    assert names[0] == "model (BF16, reference)" and names[1] == "exact" and names[-1] == "plain"
    assert rows["spectral"][2] == f"{result['files']['spectral.gguf']['suites']['chat']['cross_entropy']:.4f}"
    # Larger files have a smaller loss, and so has one that drifted towards the text; neither competes.
    best = {row[0].text for row in table.rows for cell in row if cell.is_best}
    assert best == {"spectral"}


def test_recovery_above_one_is_never_shown_as_quality(result):
    rows = texts(tables.recoveries(result))
    assert rows["too far"][1] == "fits the data" and rows["plain"][1] == "plain rounding"
    assert re.fullmatch(r"\d+\.\d% \[-?\d+%, \d+%\]", rows["spectral"][1])
    assert rows["spectral"][0].startswith(f"{result['files']['spectral.gguf']['gap']:+.4f} ± ")


def test_every_table_of_figures_says_how_it_is_out_of_domain(result):
    inside = json.loads(json.dumps(result))
    for suite in inside["suites"].values():
        suite["out_of_domain"] = False
    for found, said in ((result, None), (inside, "not measured")):
        for make in (tables.losses, tables.divergences, tables.recoveries, tables.divergences_by_suite):
            table = make(found)
            assert any("out of domain" in column for column in table.columns), make
            assert said is None or all(row[-1].text == said for row in table.rows)


def test_files_are_there_and_figures_are_images(folder):
    for name in ("loss-size", "kl-histograms", "contributions", "refinement"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert xml.etree.ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "![" in markdown and "| spectral |" in markdown and "c | d" not in markdown.split("## Largest")[0]
    assert json.loads((folder / "comparison.json").read_text())["reference"] == "model"


def test_conditions_say_how_many_windows_each_suite_has(result):
    suites = {"c4-64x256": {"windows": 64}, "chat": {"windows": 12}}
    few = result | {"settings": result["settings"] | {"windows": 12}, "suites": suites}
    assert dict(report.conditions(few))["Windows"] == "the first 12 of each suite, 64 of c4-64x256"
    assert dict(report.conditions(result))["Windows"] == "all"


def test_the_page_loads_nothing_and_speaks_to_everyone(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    browser.check(page)


_DRIVER = """
const table = document.getElementById("divergence-table");
const first = () => table.tBodies[0].rows[0].cells[0].textContent;
const button = table.querySelectorAll("thead button")[1];
found.before = first(); found.focusable = button.tabIndex;
button.click(); found.up = first(); found.sort = button.parentElement.getAttribute("aria-sort");
button.click(); found.down = first(); found.other = button.parentElement.getAttribute("aria-sort");
const filter = document.querySelector('[data-filters="divergence-table"]');
filter.value = "SPECTRAL"; filter.dispatchEvent(new Event("input"));
found.rows = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
const choice = document.getElementById("by-file");
choice.value = ""; choice.dispatchEvent(new Event("input"));
found.all = document.getElementById("shown").textContent;
choice.value = "Q8_0"; choice.dispatchEvent(new Event("input"));
found.one = document.getElementById("shown").textContent;
"""


def test_the_page_sorts_and_filters_in_a_browser(folder, tmp_path):
    assert browser.run(folder / "report.html", _DRIVER, tmp_path) == {
        "before": "exact",
        "focusable": 0,
        "up": "exact",
        "sort": "ascending",
        "down": "plain",
        "other": "descending",
        "rows": 1,
        "all": "5 of 5 shown",
        "one": "1 of 5 shown",
        "wide": True,
        "said": [],
    }


def test_spectra_are_the_eigenvalues(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    factor = rng.normal(size=(40, 6))
    gram = (factor.T @ factor).astype(np.float32)
    name = "input/blk.1.ffn_up.weight"
    save_file({name: gram, "head_gram_DD": gram}, tmp_path / "statistics.safetensors")
    found = spectra.read_spectra(tmp_path)
    np.testing.assert_allclose(found[name], np.linalg.svd(factor)[1] ** 2, rtol=1e-4)
    # Once they are kept, nothing else is read.
    (tmp_path / "statistics.safetensors").unlink()
    np.testing.assert_array_equal(spectra.read_spectra(tmp_path)[name], found[name])
    assert charts.effective_rank(np.ones(7)) == pytest.approx(7) and charts.effective_rank(np.eye(3)[0]) == 1
    drawing.save(drawing.draw(charts.spectra(found)), tmp_path / "spectra")
    assert (tmp_path / "spectra.svg").stat().st_size > 1000
    with pytest.raises(InputError, match="no statistics"):
        spectra.read_spectra(tmp_path / "missing")


def test_a_map_of_tensors_has_a_place_for_each(result):
    whole = json.loads(json.dumps(result))
    kinds = ("ffn_up", "ffn_down")
    for file in (*whole["files"].values(), whole["baseline"]):
        one = file["groups"][0]
        file["groups"] = [one | {"group": f"blk.{i}.{kind}.weight", "kl": i + 1} for i in range(3) for kind in kinds]
    figure = charts.contributions(whole)
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2, 3) and image.tolist() == [[1, 2, 3], [1, 2, 3]]


def test_runs_without_metrics_are_named(result, tmp_path):
    with pytest.raises(InputError, match="no metrics"):
        report.write(result, tmp_path, runs=[tmp_path / "missing"])


def test_the_card_has_front_matter_and_the_files_facts(result, monkeypatch):
    result = copy.deepcopy(result)
    file = pathlib.Path("spectral.gguf")
    stated = {"general.license": "apache-2.0", "general.languages": ["en", 'a "b"']}
    monkeypatch.setattr(publishing.gguf_file, "inspect", lambda path: {"metadata": stated})
    text = publishing.card(result, file, "Qwen/Qwen3.5-0.8B", "me/model-GGUF")
    _, front, body = text.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in front.splitlines() if ": " in line)
    assert json.loads(fields["license"]) == "apache-2.0" and json.loads(fields["base_model"]) == "Qwen/Qwen3.5-0.8B"
    assert fields["base_model_relation"] == "quantized" and '- "a \\"b\\""' in front
    assert result["files"]["spectral.gguf"]["sha256"] in body and "llama-server -hf me/model-GGUF" in body
    assert "llama-cli -m spectral.gguf" in body and "| spectral |" in body
    assert "% of plain rounding's" in body.split("## Quick start")[0] and "In llama.cpp" in body
    calibrated = {"recipe": "spectral", "calibration": {"text": ["pool.jsonl"], "tokens": 9000, "windows_sha256": "a1"}}
    refined = {"start_sha256": "b2", "start": calibrated, "text": ["pool.jsonl"], "tokens": 12_000, "seed": 3}
    refined |= {"settings": {"watch": "convergence60"}, "seconds": 60.0, "device": "gpu", "peak_memory_bytes": 1 << 30}
    result["files"]["spectral.gguf"]["provenance"] = refined
    made = (
        publishing.card(result, file, "Qwen/Qwen3.5-0.8B", "me/model-GGUF")
        .split("## How it was made")[1]
        .split("## Limits")[0]
    )
    first, second = (line for line in made.splitlines() if line.startswith("* "))
    assert "`spectral` of sqjax on 9,000 tokens of pool.jsonl (SHA256 of the tokens: a1)" in first
    assert "12,000 tokens" in second and "by convergence60; 60 seconds on gpu, peak memory 1,024 MiB" in second
    row = texts(tables.provenance(result))["spectral"]
    assert (
        row[2]
        == "spectral, 9,000 tokens of pool.jsonl, tokens' SHA-256 a1, refine, 12,000 tokens of pool.jsonl, seed 3"
    )
