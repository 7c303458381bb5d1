"""The report of a made-up study: what it says of the winner, and what a browser makes of its page."""

import copy
import json
import xml.etree.ElementTree

import browser
import pytest

from sqjax import drawing, study_charts, study_report, study_results

SIDES = {"inside": ["chat", "code"], "outside": ["slovene"]}
NAMES = ("recipe.gamma_out", "recipe.gamma_in")


def record(trial, gamma_in, gamma_out, seed):
    """Of a trial: inside gamma_in 0.75 is best, outside it is 0.5; each seed adds a little."""
    ratio = {"chat": 0.5 + (gamma_in - 0.75) ** 2 - 0.1 * gamma_out + 0.01 * seed}
    ratio |= {"code": ratio["chat"] + 0.1, "slovene": 0.7 + (gamma_in - 0.5) ** 2 / 2 + 0.02 * seed}
    values = [(ratio["chat"] + ratio["code"]) / 2, ratio["slovene"]]
    settings = {"seed": seed, NAMES[0]: gamma_out, NAMES[1]: gamma_in}
    found = {"trial": trial, "state": "complete", "settings": settings, "values": values, "ratio": ratio}
    kl = {name: 0.05 * part for name, part in ratio.items()}
    return found | {"kl": kl, "attempts": 1, "rounding_seconds": 3.0, "judging_seconds": 2.0, "device": "cpu"}


def records():
    grid = [(i, o, s) for s in range(2) for o in (0.0, 0.5, 1.0) for i in (0.25, 0.5, 0.75, 1.0)]
    rows = [record(number, *point) for number, point in enumerate(grid)]
    failed = {"trial": 24, "state": "fail", "settings": {"seed": 9}, "values": None, "attempts": 6}
    return [*rows, failed | {"error": "<b>no memory</b>"}]


def metrics(kl, gap):
    part = {"tokens": 900, "kl": kl, "kl_interval": [0.9 * kl, 1.1 * kl], "top1": 0.9, "gap": gap}
    part |= {"rms_probability_change": 0.03, "gap_interval": [gap - 0.01, gap + 0.01]}
    return part | {f"kl_{name}": kl for name in ("median", "p99", "p999", "max")}


@pytest.fixture
def study():
    rows = study_results.ranking(records())
    domains = [{"c4": metrics(kl, 0.02), "prose": metrics(2 * kl, 0.03)} for kl in (0.02, 0.04)]
    evaluation = {"quantized": metrics(0.03, 0.02) | {"domains": domains[0]}}
    evaluation |= {"plain": metrics(0.06, 0.04) | {"domains": domains[1]}}
    verified = {"file": "runs/model-Q4_K_M.gguf", "file_bytes": 5 << 20, "bits_per_weight": 4.54, "sha256": "ab" * 32}
    verified |= {"types": {"Q4_K": 10, "F32": 3}, "evaluation": evaluation}
    about = {"study": "shaping", "model": "nano", "trials": {"complete": 24, "fail": 1}, "best": rows[0]}
    about |= {
        "ranking": rows,
        "objectives": ["inside", "outside"],
        "sampler": "grid",
        "sampler_seed": 0,
        "sides": SIDES,
    }
    about |= {"watched": {"chat": "chat.jsonl", "code": "code.jsonl", "slovene": "slovene.jsonl"}, "windows": 16}
    about |= {"calibration": {"tokens": 1000, "text": ["pool.jsonl"], "length": 512, "batch": 8, "seed": 0}}
    about |= {"heldout": ["c4.jsonl", "prose.jsonl"], "date": "2026-01-01", "versions": {"sqjax": "0"}}
    return json.loads(json.dumps(about | {"recipe": 'steps = ["<feedback>"]\n', "verified": verified}))


@pytest.fixture
def folder(study, tmp_path):
    study_report.write(study, records(), tmp_path)
    return tmp_path


def test_the_summary_names_the_winner_and_what_it_keeps_of_unseen_text(study):
    said = study_report.summary(study)
    assert "12 settings in 25 trials" in said and "over 2 seeds: gamma_in 0.75, gamma_out 1" in said
    assert "inside (chat, code)" in said and "KL 0.0300 nats per token, 0.500 of plain" in said
    assert "unseen" not in study_report.summary(study | {"verified": None})


def test_the_tables_have_every_setting_and_trial_and_each_held_out_text(study):
    settings, heldout, trials, texts = (
        study_report._settings(study),
        study_report._heldout(study),
        study_report._trials(study, records()),
        study_report._texts(study, records()),
    )
    assert settings.columns[:3] == ("rank", "gamma_in", "gamma_out") and len(settings.rows) == 12
    assert settings.rows[0][-1].text == "front" and any(cell.is_best for cell in settings.rows[0])
    assert [row[0].text for row in heldout.rows] == ["all of it", "c4", "prose"]
    assert len(trials.rows) == 25 and trials.rows[-1][-1].text == "<b>no memory</b>"
    assert [row[3].text for row in texts.rows] == ["0.05000"] * 3


def test_a_study_of_one_side_one_setting_and_no_file_has_a_report(study, tmp_path):
    few = copy.deepcopy(study) | {"verified": None, "objectives": ["inside"], "sides": SIDES | {"outside": []}}
    one = [row | {"values": row["values"][:1]} for row in records() if row["trial"] == 0]
    few["ranking"] = study_results.ranking(one)
    few |= {"best": few["ranking"][0], "trials": {"complete": 1}}
    paths = study_report.write(few, one, tmp_path)
    assert set(paths) == {"markdown", "html"} and "held-out" not in (tmp_path / "report.md").read_text()


def test_settings_that_were_not_tried_with_all_seeds_are_on_no_front(study):
    lucky = record(30, 0.5, 0.0, 0) | {"settings": {"seed": 0, NAMES[0]: 2.0, NAMES[1]: 2.0}}
    lucky["ratio"] = {name: 0.01 for name in lucky["ratio"]}
    rows = study_results.ranking([*records(), lucky])
    line = study_charts.front(rows, SIDES).axes[0].lines[0]
    assert len(line.get_xdata()) > 1 and min(line.get_xdata()) > 0.1
    # More values than colours: one line, the best of all.
    many = [record(n, 0.25 * (n % 4), 0.1 * (n // 4), 0) for n in range(32)]
    figure = study_charts.strength(many, study_results.ranking(many), SIDES)
    assert len(figure.axes[0].lines) == 2 and not figure.legends
    drawing.draw(figure)


def test_the_page_loads_nothing_and_speaks_to_everyone(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<b>no memory" not in page and "<feedback>" not in page
    browser.check(page)
    for name in ("strength", "pareto"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert xml.etree.ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "![" in markdown and '```toml\nsteps = ["<feedback>"]' in markdown


_DRIVER = """
const table = document.getElementById("settings-table");
const first = () => table.tBodies[0].rows[0].cells[0].textContent;
const button = table.querySelectorAll("thead button")[0];
found.before = first(); found.focusable = button.tabIndex;
button.click(); found.up = first(); button.click(); found.down = first();
found.sort = button.parentElement.getAttribute("aria-sort");
const filter = document.querySelector('[data-filters="settings-table"]');
filter.value = "front"; filter.dispatchEvent(new Event("input"));
found.front = [...table.tBodies[0].rows].filter((row) => !row.hidden).length;
const details = document.querySelector("details");
found.closed = details.open; details.querySelector("summary").click(); found.open = details.open;
found.figures = document.querySelectorAll("figure svg").length;
"""


def test_the_page_sorts_and_filters_in_a_browser(study, folder, tmp_path):
    assert browser.run(folder / "report.html", _DRIVER, tmp_path) == {
        "before": "1",
        "focusable": 0,
        "up": "1",
        "down": "12",
        "sort": "descending",
        "front": sum(row["on_front"] for row in study["ranking"]),
        "closed": False,
        "open": True,
        "figures": 2,
        "wide": True,
        "said": [],
    }
