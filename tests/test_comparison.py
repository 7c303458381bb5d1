"""Tables of several files: what the JSON promises, what is kept, and what stands where."""

import json
import pathlib
import shutil
import sys
import types

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import sqjax
from sqjax import cache, cli, comparison, contributions, publishing
from sqjax.checkpoint import load_checkpoint
from sqjax.config import is_matrix
from sqjax.gguf_file import read_gguf, write_gguf
from sqjax.q4_k import pack
from sqjax.run import InputError, sha256
from sqjax.scoring import Scorer

PACKAGE = pathlib.Path(sqjax.__file__).parent
MODEL, TEXT = PACKAGE / "demo8", PACKAGE / "suites/demo.txt"
SMALL = {"length": 128, "windows": 3}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """Scores are kept in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "folder", lambda: kept_in)
        kept_in = tmp_path_factory.mktemp("scores")
        yield kept_in


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model as BF16, and halfway between the model and its plain rounding, in the layout of F32."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint = load_checkpoint(MODEL)
    write_gguf(folder / "bf16.gguf", checkpoint, file_type="bf16")
    write_gguf(folder / "plain.gguf", checkpoint, file_type="q4_k")
    rounded = read_gguf(folder / "plain.gguf").tensors
    half = {name: (np.float32(rounded[name]) + np.float32(checkpoint.tensors[name])) / 2 for name in rounded}
    write_gguf(folder / "half.gguf", checkpoint, half, file_type="f32")
    return folder


@pytest.fixture(scope="module")
def result(files, tmp_path_factory):
    arguments = [str(files / name) for name in ("half.gguf", "bf16.gguf")]
    options = ["--reference", str(MODEL), "--text", str(TEXT), "--length", "128", "--windows", "3"]
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *a, **k: printed.append(a[0]) if k.get("file") is None else None)
        assert cli.main(["compare", *arguments, *options, "--json", "--out", str(out), "--groups", "kinds"]) == 0
    (line,) = printed
    return json.loads(line)


def test_the_object_has_what_evaluate_has_and_more(result, files):
    assert list(result["files"]) == ["half.gguf", "bf16.gguf"] and list(result["suites"]) == ["demo"]
    alone = sqjax.evaluate(files / "half.gguf", reference=MODEL, text=TEXT, **SMALL)
    entry = result["files"]["half.gguf"]
    for name in ("kl", "kl_p99", "top1", "gap", "cross_entropy", "cross_entropy_reference", "rms_probability_change"):
        assert entry[name] == pytest.approx(alone[name], rel=1e-3), name
        assert entry["suites"]["demo"][name] == entry[name]
    for name in ("tokens", "sequences", "file_bytes", "tensor_bytes", "bits_per_weight", "types", "sha256"):
        assert entry[name] == alone[name]
    assert entry["kl_interval"] == pytest.approx(alone["kl_interval"], rel=1e-2) and entry["seconds"] > 0
    assert sum(entry["histogram"]) == entry["tokens"] == 3 * 127
    assert len(entry["histogram"]) == len(result["histogram_edges"]) + 1
    assert result["reference_facts"]["types"] == {"BF16": 32, "F32": 23}


def test_plain_rounding_is_made_where_it_is_not_given(result, files):
    baseline = result["baseline"]
    assert not baseline["given"] and baseline["types"] == {"Q4_K": 32, "F32": 23}
    assert baseline["file_bytes"] == (files / "plain.gguf").stat().st_size
    half, exact = result["files"].values()
    assert 0 < half["kl"] < baseline["kl"] and exact["kl"] == 0 and exact["gap"] == 0
    assert exact["recovery"]["value"] in (None, 1.0) and exact["difference_from_plain"]["kl"] == -baseline["kl"]
    # Half of the error is about a quarter of the divergence.
    assert 0.15 < half["difference_from_plain"]["ratio"] < 0.4
    assert half["difference_from_plain"]["kl_interval"][1] < 0
    (pair,) = [pair for pair in result["differences"] if {pair["first"], pair["second"]} == set(result["files"])]
    assert pair["kl"] == pytest.approx(half["kl"])


def test_plain_rounding_is_found_among_the_files(files):
    copy = files / "renamed.gguf"
    shutil.copy(files / "plain.gguf", copy)
    found = sqjax.compare([copy, files / "half.gguf"], reference=MODEL, text=f"prose={TEXT}", disagreements=0, **SMALL)
    assert found["baseline"]["name"] == "renamed.gguf" and found["baseline"]["given"]
    assert found["files"]["renamed.gguf"]["recovery"]["label"] == "plain rounding"
    assert list(found["suites"]) == ["prose"]
    # The same tokens and bytes under other names: nothing was scored again.
    assert found["files"]["renamed.gguf"]["cached"] and found["files"]["half.gguf"]["cached"]


def test_another_setting_is_scored_anew(files, result, kept):
    with Scorer(MODEL) as scorer:
        student, _ = scorer.student(files / "half.gguf", "half")
        keys = {scorer.key(student, suite=name) for name in "ab"} | {scorer.key(student, "llama.cpp", suite="a")}
        other, _ = scorer.student(files / "bf16.gguf", "half")
        assert len(keys | {scorer.key(other, suite="a")}) == 4
    place = next(kept.rglob("*.npz"))
    place.write_bytes(place.read_bytes()[:40])
    assert cache.load(place.stem) is None and cache.load("missing") is None


def test_groups_add_up_to_the_whole(result):
    """The error is small enough that the divergences of its parts are nearly those of independent errors."""
    entry = result["baseline"]
    names = [group["group"] for group in entry["groups"]]
    assert sorted(names) == sorted(contributions._KINDS)
    assert sum(group["kl"] for group in entry["groups"]) == pytest.approx(entry["kl"], rel=0.3)
    assert sum(len(group["tensors"]) for group in entry["groups"]) == 32
    assert result["files"]["bf16.gguf"]["groups"] == []


def test_disagreements_are_the_largest_and_readable(result):
    entry = result["baseline"]
    found = entry["disagreements"]
    assert [one["kl"] for one in found] == sorted((one["kl"] for one in found), reverse=True)
    assert found[0]["kl"] == pytest.approx(entry["kl_max"])
    text = TEXT.read_text(encoding="utf-8")
    for one in found:
        assert one["prefix"].removeprefix("…") + one["true"] in text
        assert len(one["best"]) == len(one["best_reference"]) == 5
        for model, probability in (("best", "probability"), ("best_reference", "probability_reference")):
            same = [token["probability"] for token in one[model] if token["token"] == one["true"]]
            assert not same or same[0] == pytest.approx(one[probability], rel=1e-3)


def test_suites_have_names_and_shapes(tmp_path):
    checkpoint = load_checkpoint(MODEL)
    # A folder, a name, a name with a shape, and the same name twice.
    folder = tmp_path / "notes"
    folder.mkdir()
    shutil.copy(TEXT, folder / "a.txt")
    texts = [folder, f"prose={TEXT}", f"c4-2x64={TEXT}", TEXT, TEXT]
    suites = comparison.open_suites(checkpoint, texts, [f"outside={TEXT}"], 128, 3)
    assert [suite.name for suite in suites] == ["notes", "prose", "c4-2x64", "demo", "demo-2", "outside"]
    shaped = suites[2].sequences.tokens
    assert [len(tokens) for tokens in shaped] == [64, 64] and suites[1].tokens == 3 * 127
    assert [suite.out_of_domain for suite in suites] == [False] * 5 + [True]
    assert suites[0].sha256 == suites[1].sha256 != suites[2].sha256


def test_what_cannot_be_compared_is_named(files, tmp_path):
    with pytest.raises(InputError, match="nothing to compare"):
        sqjax.compare([], reference=MODEL)
    with pytest.raises(InputError, match="given twice"):
        sqjax.compare([files / "half.gguf"] * 2, reference=MODEL, text=TEXT, **SMALL)
    with pytest.raises(InputError, match="calibration text"):
        sqjax.compare([files / "half.gguf"], reference=MODEL, text=TEXT, calibration=[TEXT], **SMALL)
    with pytest.raises(InputError, match="does not exist"):
        sqjax.compare([files / "half.gguf"], reference=MODEL, text=tmp_path / "missing.txt", **SMALL)


# Releases and baselines ------------------------------------------------------------------------------------------


def test_baselines_are_ggmls_own(tmp_path, files):
    libgguf = pytest.importorskip("libgguf")
    checkpoint = load_checkpoint(MODEL)
    shapes = {name: shape for name, shape in checkpoint.config.tensor_shapes().items() if is_matrix(name, shape)}
    rng = np.random.default_rng(0)
    mean = {name: rng.gamma(1, 1, shape[1]).astype(np.float32) for name, shape in shapes.items() if "blk" in name}
    matrix = tmp_path / "imatrix.gguf"
    write_matrix(matrix, mean)
    made = sqjax.baselines(MODEL, tmp_path, imatrix=matrix)["files"]
    sizes = {file["file_bytes"] for file in made.values()} | {(files / "plain.gguf").stat().st_size}
    assert len(sizes) == 1 and made["ggml-imatrix.Q4_K_M"]["provenance"]["imatrix_sha256"]
    plain, weighted = (read_gguf(made[name]["file"]).tensors for name in ("ggml.Q4_K_M", "ggml-imatrix.Q4_K_M"))
    for name in ("blk.1.ffn_up.weight", "token_embd.weight"):
        weight_OI = np.float32(checkpoint.tensors[name])
        for tensors, importance_I in ((plain, None), (weighted, mean.get(name))):
            rows = libgguf.quantize_rows(weight_OI, GGMLQuantizationType.Q4_K, importance_I)
            assert np.array_equal(pack(tensors.codes(name)).reshape(rows.shape), rows)
    # What ggml rounds is found to be plain rounding, what it weighs is not.
    with Scorer(MODEL) as scorer:
        found = [scorer.is_plain(scorer.student(made[name]["file"], name)[0]) for name in made]
    assert found == [True, False]
    write_matrix(matrix, {"blk.9.ffn_up.weight": np.ones(4, np.float32)})
    with pytest.raises(InputError, match="another model"):
        sqjax.baselines(MODEL, tmp_path, imatrix=matrix)


def write_matrix(path, mean):
    writer = gguf.GGUFWriter(path, arch="")
    for name, mean_I in mean.items():
        writer.add_tensor(f"{name}.in_sum2", (2 * mean_I)[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_release_has_its_own_suites_and_says_which_it_lacks(monkeypatch, capsys):
    assert publishing._suites("a.txt", None) == (["a.txt"], [])
    assert publishing._suites(None, "c4.jsonl") == (["convergence60", "heldout120", "c4-64x256=c4.jsonl"], [])
    monkeypatch.setattr(publishing, "C4_SOURCE", "/missing.jsonl")
    assert publishing._suites(None, None) == (["convergence60", "heldout120"], ["c4-64x256"])
    assert "--c4 takes its text from a file" in capsys.readouterr().err


def test_a_release_is_a_folder_until_it_is_uploaded(files, tmp_path, monkeypatch, capsys):
    sent = {}

    class Hub:
        def create_repo(self, name, **options):
            sent["name"] = name

        def upload_folder(self, **options):
            sent.update(options)
            return "https://hub/commit"

    tokens = []
    client = types.SimpleNamespace(HfApi=Hub, get_token=lambda: next(iter(tokens), None))
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    options = ["--reference", str(MODEL), "--text", str(TEXT), "--length", "128", "--windows", "3"]
    command = ["publish", str(files / "plain.gguf"), "me/model-GGUF", *options, "--out", str(tmp_path / "release")]
    assert cli.main([*command, "--json"]) == 0
    release = json.loads(capsys.readouterr().out)
    expected = {"plain.gguf", "README.md", "loss-size.png", "report/report.html", "report/comparison.json"}
    assert release["files"].keys() >= expected and not release["uploaded"] and not sent
    assert (tmp_path / "release/plain.gguf").read_bytes() == (files / "plain.gguf").read_bytes()
    card = (tmp_path / "release/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and sha256(files / "plain.gguf") in card and "does not state" in card
    assert "- q4_k_m\n" in card and "Bootstrap seed: 0" in card and "Peak memory" in card
    # What lies there of another release is not sent, and a missing token is told before anything is scored.
    (tmp_path / "release/other.gguf").touch()
    assert cli.main([*command, "--upload"]) == 1
    assert "hf auth login" in capsys.readouterr().err and not sent
    tokens.append("secret")
    assert cli.main([*command, "--upload"]) == 0
    assert sent["repo_id"] == "me/model-GGUF" and set(sent["allow_patterns"]) == release["files"].keys()
