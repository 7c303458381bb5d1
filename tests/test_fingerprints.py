"""What was made on a text is not measured on it: hashes of runs of words, and what commands make of them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from random_checkpoint import RUNNABLE, write

import sqjax
from sqjax import calibration, cli, evaluation, fingerprints, making, measuring, plans, sweeping, trials
from sqjax.checkpoint import load_checkpoint
from sqjax.fingerprints import Seen, overlap, piece_of, prints_of, sample
from sqjax.refinement import Refinement
from sqjax.run import InputError
from sqjax.texts import Document, read_texts

PACKAGE = pathlib.Path(sqjax.__file__).parent
MODEL, DEMO_TEXT = PACKAGE / "demo8", PACKAGE / "suites/demo.txt"


def words(seed, count=200):
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 5000, count))


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(MODEL)


@pytest.fixture(scope="module")
def prose():
    return DEMO_TEXT.read_text(encoding="utf-8")


# Theorems about hashes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 7, 333, 1000])
@pytest.mark.parametrize("length", [400, 600])
def test_a_planted_passage_is_found_wherever_it_is_cut(start, length):
    known = prints_of([words(0, 5000)])
    passage = " ".join(words(0, 5000).split()[start : start + length])
    text = f"{words(1, 20_000)} {passage} {words(2, 20_000)}"
    found = overlap(known, sample([text]))
    assert found.is_grave and 0.7 * length < found.stretch < 1.4 * length and found.share < 0.05
    # The other way round: what was planted in the calibration text is found when it is evaluated alone.
    assert overlap(prints_of([text]), sample([passage])).is_grave


def test_disjoint_texts_share_nothing():
    known = prints_of(words(seed, 2000) for seed in range(50))
    found = overlap(known, sample(words(seed, 2000) for seed in range(50, 100)))
    assert found == fingerprints.Overlap(0.0, 0, 0.0) and not found.is_grave
    assert not overlap(fingerprints.NOTHING, sample([words(1)])).is_grave
    assert not overlap(known, sample([])).is_grave and not overlap(known, sample(["...", ""])).is_grave


def test_copies_are_found_however_they_are_dressed():
    # Without spaces between words, every letter is one.
    letters = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FFF, 300)))
    known = prints_of([*(words(seed) for seed in range(20)), "Short  ONE.", letters])
    copies = [words(3).upper(), "\n".join(words(4).split()) + "!", words(5)[200:900], "short one"]
    assert all(overlap(known, sample([copy])).is_grave for copy in copies)
    assert overlap(known, sample([letters[50:250]])).share == 1.0
    message = Document(None, ({"role": "user", "content": words(6)},), "memory", "chat")
    assert overlap(known, sample([piece_of(message)])).pieces == 1


def test_headers_quotations_and_common_lines_are_forgiven():
    header, line = words(1000, 150), "thank you, and all the best"
    known = prints_of([*(f"{header} {words(seed, 600)}" for seed in range(20)), line])
    text = [*(f"{header} {words(seed, 600)}" for seed in (97, 98)), *[words(99, 600)] * 20, line]
    found = overlap(known, sample(text))
    assert found.stretch > 100 and 0 < found.share < 0.1 and not found.is_grave


def test_a_million_tokens_are_a_small_file(tmp_path):
    """Words are about 0.7 of the tokens of prose."""
    seen = Seen(prints_of([words(0, 700_000)]))
    record = fingerprints.write_beside(tmp_path / "x.gguf", seen)
    assert (tmp_path / record["file"]).stat().st_size < 800_000
    again = fingerprints.read_beside(tmp_path / "x.gguf", record)
    assert again.is_complete and np.array_equal(again.prints, seen.prints) and (np.diff(again.prints) > 0).all()


def test_hashes_without_their_record_or_of_another_file_are_unknown(tmp_path, capsys):
    path = tmp_path / "x.gguf"
    record = fingerprints.write_beside(path, Seen(prints_of([words(0)])))
    assert not fingerprints.read_beside(path, None).is_complete
    fingerprints.write_beside(path, Seen(prints_of([words(1)])))
    assert not fingerprints.read_beside(path, record).is_complete and "x.gguf.seen.npy" in capsys.readouterr().err
    # Nothing was seen: there is nothing to keep.
    record = fingerprints.write_beside(path, Seen())
    assert list(tmp_path.iterdir()) == [] and fingerprints.read_beside(path, record).is_complete
    both = Seen(prints_of([words(0)])) | fingerprints.UNKNOWN
    assert not both.is_complete and len(both.prints)


# Tokens ----------------------------------------------------------------------------------------------------------


def test_windows_conversations_and_documents_of_one_text_have_the_same_hashes(checkpoint):
    texts = read_texts([PACKAGE / "suites/convergence60.jsonl"])
    whole = prints_of(map(piece_of, texts))
    sequences = evaluation.prepare(texts, checkpoint.tokenizer, 512)
    said = measuring.sampled(sequences, checkpoint.tokenizer)
    np.testing.assert_array_equal(np.unique(said.hash_N), whole)
    _, prints = calibration.calibration_windows(texts, checkpoint.tokenizer, 4096, 10**6)
    np.testing.assert_array_equal(prints, whole)


@pytest.mark.parametrize("length", [64, 100, 512])
def test_windows_of_any_length_hash_like_the_text_that_they_were_cut_from(checkpoint, length, tmp_path, prose):
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (prose, words(0, 300))))
    windows_WT, prints = calibration.calibration_windows(read_texts([path]), checkpoint.tokenizer, length, 10**5)
    whole = prints_of([prose, words(0, 300)])
    # All but what the last, incomplete window would have held.
    assert np.isin(prints, whole).mean() > 0.99 and np.isin(whole, prints).mean() > 0.9
    sequences = evaluation.Sequences.of_windows(windows_WT)
    np.testing.assert_array_equal(np.unique(measuring.sampled(sequences, checkpoint.tokenizer).hash_N), prints)


# Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory, prose):
    """A model, a file of it and the prose that it was calibrated on, and other prose."""
    folder = tmp_path_factory.mktemp("made")
    shape = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "full_attention_interval": 1}
    write(folder / "model", **(RUNNABLE | shape | {"intermediate_size": 256}))
    for name, text in {"first": prose[: len(prose) // 2], "second": prose[len(prose) // 2 :]}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    sqjax.calibrate(folder / "model", folder / "statistics", text=folder / "first.txt", tokens=10**5, length=128)
    options = {"recipe": "imatrix", "statistics": folder / "statistics"}
    sqjax.quantize(folder / "model", folder / "made.gguf", **options)
    return folder


SMALL = {"length": 64, "windows": 8}


def test_a_file_is_not_measured_on_what_it_was_calibrated_on(made, capsys):
    plain = made / "plain.gguf"
    sqjax.convert(made / "model", plain)
    assert plain.stat().st_size == (made / "made.gguf").stat().st_size
    arguments = ["evaluate", str(made / "made.gguf"), "--length", "64", "--windows", "8"]
    arguments += ["--reference", str(made / "model")]
    assert cli.main([*arguments, "--text", str(made / "first.txt"), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "first.txt is calibration text" in captured.err and "--allow-overlap" in captured.err
    assert cli.main([*arguments, "--text", str(made / "first.txt"), "--allow-overlap", "--json"]) == 0
    allowed = json.loads(capsys.readouterr().out)
    assert allowed["calibration_checked"] and allowed["disjoint_from_calibration"] is False
    assert allowed["calibration_overlap"]["first.txt"] > 0.9
    other = sqjax.evaluate(made / "made.gguf", text=made / "second.txt", reference=made / "model", **SMALL)
    assert (other["calibration_checked"], other["windows_compared"]) == (True, 8)
    assert other["disjoint_from_calibration"] is True and other["calibration_overlap"] == {"second.txt": 0.0}
    # Plain rounding has seen nothing.
    assert (
        sqjax.evaluate(plain, text=made / "first.txt", reference=made / "model", **SMALL)["disjoint_from_calibration"]
        is True
    )


def test_a_file_that_was_moved_alone_says_that_nothing_was_checked(made, tmp_path, capsys):
    shutil.copy(made / "made.gguf", tmp_path / "moved.gguf")
    found = sqjax.evaluate(tmp_path / "moved.gguf", text=made / "first.txt", reference=made / "model", **SMALL)
    assert (found["calibration_checked"], found["windows_compared"]) == (False, 0)
    assert found["disjoint_from_calibration"] is None and found["calibration_overlap"] is None
    shutil.copy(made / "made.gguf.json", tmp_path / "moved.gguf.json")
    assert not sqjax.evaluate(tmp_path / "moved.gguf", text=made / "first.txt", reference=made / "model", **SMALL)[
        "calibration_checked"
    ]
    assert "moved.gguf.seen.npy is missing" in capsys.readouterr().err
    shutil.copy(made / "made.gguf.seen.npy", tmp_path / "moved.gguf.seen.npy")
    with pytest.raises(InputError, match="calibration text"):
        sqjax.evaluate(tmp_path / "moved.gguf", text=made / "first.txt", reference=made / "model", **SMALL)
    # In another form it has seen the same.
    sqjax.convert(tmp_path / "moved.gguf", tmp_path / "f32.gguf", type="f32")
    with pytest.raises(InputError, match="calibration text"):
        sqjax.evaluate(tmp_path / "f32.gguf", text=made / "first.txt", reference=made / "model", **SMALL)


def test_a_table_is_refused_for_one_of_its_files(made, tmp_path):
    sqjax.convert(made / "model", tmp_path / "bf16.gguf", type="bf16")
    files = [tmp_path / "bf16.gguf", made / "made.gguf"]
    with pytest.raises(InputError, match=r"prose is calibration text.* made.gguf was made on it"):
        sqjax.compare(files, text=f"prose={made / 'first.txt'}", reference=made / "model", **SMALL)
    assert sqjax.compare(files[:1], text=made / "first.txt", disagreements=0, reference=made / "model", **SMALL)[
        "disjoint_from_calibration"
    ]
    found = sqjax.compare(
        files,
        text=made / "first.txt",
        allow_overlap=True,
        disagreements=0,
        out=tmp_path,
        reference=made / "model",
        **SMALL,
    )
    assert found["calibration_checked"] and found["disjoint_from_calibration"] is False
    assert found["files"]["bf16.gguf"]["disjoint_from_calibration"] is True
    assert "no: a file was made on some of the text" in (tmp_path / "report.md").read_text()


def test_a_release_holds_what_the_file_has_seen(made, tmp_path):
    options = {"repository": "me/model", "out": tmp_path, "text": made / "second.txt"}
    release = sqjax.publish(made / "made.gguf", **options, reference=made / "model", **SMALL)
    assert release["files"].keys() >= {"made.gguf", "made.gguf.json", "made.gguf.seen.npy"}
    assert "this was checked" in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="calibration text"):
        sqjax.evaluate(tmp_path / "made.gguf", text=made / "first.txt", reference=made / "model", **SMALL)


def test_refinement_keeps_what_the_file_had_seen_and_what_it_sees(made, tmp_path):
    settings = ["length=32", "batch=2", "updates=1", "watch_windows=20", "softness=0"]
    out, options = tmp_path / "refined.gguf", {"text": made / "second.txt", "tokens": 2000}
    for watch in ("first.txt", "second.txt"):
        with pytest.raises(InputError, match=f"{watch}, which is watched, is calibration text"):
            sqjax.refine(
                made / "model", made / "made.gguf", out, settings=[*settings, f"watch={made / watch}"], **options
            )
    assert list(tmp_path.iterdir()) == []
    sqjax.refine(made / "model", made / "made.gguf", out, settings=settings, **options)
    for text in ("first.txt", "second.txt"):
        with pytest.raises(InputError, match=f"{text} is calibration text"):
            sqjax.evaluate(out, text=made / text, reference=made / "model", **SMALL)
    record = json.loads((tmp_path / "refined.gguf.json").read_text())["seen"]
    assert record["complete"] and record["hashes"] == len(np.load(tmp_path / record["file"]))
    # Of a stranger's file it is not known what else it has seen.
    shutil.copy(made / "made.gguf", tmp_path / "stranger.gguf")
    sqjax.refine(made / "model", tmp_path / "stranger.gguf", out, settings=settings, **options)
    assert not sqjax.evaluate(out, text=made / "first.txt", reference=made / "model", **SMALL)["calibration_checked"]
    with pytest.raises(InputError, match=r"second.txt is calibration text"):
        sqjax.evaluate(out, text=made / "second.txt", reference=made / "model", **SMALL)


def test_held_out_windows_must_not_have_been_calibrated_on(made, checkpoint):
    settings = Refinement(watch="heldout", watch_windows=4, length=64)
    texts = read_texts([made / "first.txt"])
    windows_WT, prints = calibration.calibration_windows(texts, checkpoint.tokenizer, 64, 2000)
    rest_WT, watched = making.watch_of(checkpoint, settings, windows_WT, Seen(), prints)
    assert len(rest_WT) + len(watched.tokens) == len(windows_WT)
    with pytest.raises(InputError, match="heldout, which is watched, is calibration text"):
        making.watch_of(checkpoint, settings, windows_WT, Seen(prints), prints)


def test_a_plan_and_a_sweep_are_refused_before_they_begin(made, tmp_path):
    text = json.dumps([str(made / "first.txt")])
    settings = [f"calibration.text={text}", "calibration.tokens=5000", f"evaluation.text={text}"]
    for stage in ("calibration", "refine"):
        changed = [setting.replace("calibration", stage) for setting in settings]
        with pytest.raises(InputError, match=f"first.txt is calibration text.* the stage {stage[:6]}.*evaluation.text"):
            sqjax.make("demo", MODEL, tmp_path / stage, settings=changed)
    plan = plans.read_plan("demo", [*settings, "evaluation.allow_overlap=true"])
    plans.keep_apart(plan, load_checkpoint(MODEL))
    watched = [f"evaluation.text={text}", f"watch.inside={text}"]
    with pytest.raises(InputError, match="the choice among trials was made on it"):
        sqjax.sweep("small", out=tmp_path / "sweep", settings=watched, workers=1)
    sweeping._keep_apart(sweeping.read_sweep("small"))


def test_a_trial_is_not_judged_by_what_it_was_calibrated_on(made, tmp_path):
    calibrated = {"text": [str(made / "first.txt")], "tokens": 10**5, "length": 128}
    values = {"recipe": {"base": "imatrix"}, "calibration": calibrated}
    for name, is_refused in {"first": True, "second": False}.items():
        watch = trials.Watch(inside=(str(made / f"{name}.txt"),), outside=(), first="", length=64)
        bench = trials.Bench(made / "model", values, watch, ["inside"], tmp_path)
        if is_refused:
            with pytest.raises(InputError, match=r"first is calibration text.* a trial was made on it; watch other"):
                bench.measure(bench.plan({}))
            assert bench.measure(bench.plan({"evaluation.allow_overlap": True})).exists()
        else:
            assert bench.measure(bench.plan({})).exists()
