"""Scores against transformers and brute force; intervals against simulation."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sqjax
from sqjax import evaluation, mesh
from sqjax.checkpoint import load_checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.model import Qwen35, abstract
from sqjax.run import InputError
from sqjax.texts import read_texts

PACKAGE = pathlib.Path(sqjax.__file__).parent
GOLDEN = json.loads((pathlib.Path(__file__).parent / "data/cross_entropy_demo8.json").read_text(encoding="utf-8"))
TOKENS_WT = np.asarray(GOLDEN["tokens"], np.int32)


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(PACKAGE / "demo8")


@pytest.fixture(scope="module")
def reference(checkpoint):
    return Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)


@pytest.fixture(scope="module")
def student(checkpoint):
    """The golden file's student: matrices rounded to multiples of 1/32."""
    tensors = {
        name: np.round(x.astype(np.float32) * 32) / 32 if x.ndim == 2 and "conv1d" not in name else x
        for name, x in checkpoint.tensors.items()
    }
    return Qwen35.from_tensors(checkpoint.config, tensors)


@pytest.fixture(scope="module")
def scores(reference, student):
    return evaluation.score(reference, student, TOKENS_WT)


def made_up(kl, loss, loss_reference, sequence) -> TokenScores:
    columns = [np.asarray(x, np.float32) for x in (kl, loss, loss_reference)]
    count = len(columns[0])
    return TokenScores(*columns, np.ones(count, np.int32), np.asarray(sequence, np.int32), np.full(count, -1, np.int32))


# Scores ----------------------------------------------------------------------------------------------------------


def test_scores_agree_with_transformers(scores):
    for name, tolerance in (("loss", 1e-4), ("loss_reference", 1e-4), ("kl", 2e-5)):
        means_W = getattr(scores, name).reshape(len(TOKENS_WT), -1).mean(1)
        np.testing.assert_allclose(means_W, GOLDEN[name], atol=tolerance, rtol=0, err_msg=name)
    # A tie of two logits within rounding may fall either way.
    np.testing.assert_allclose(scores.agree.mean(), np.mean(GOLDEN["top1"]), atol=2 / scores.agree.size)
    assert scores.kl.max() == pytest.approx(GOLDEN["kl_max"], rel=1e-3)


def test_a_model_diverges_from_an_equal_model_by_exactly_nothing(checkpoint, reference):
    equal = Qwen35.from_tensors(checkpoint.config, dict(checkpoint.tensors))
    scores = evaluation.score(reference, equal, TOKENS_WT)
    assert np.all(scores.kl == 0) and np.all(scores.agree == 1)
    assert np.array_equal(scores.loss, scores.loss_reference)


def test_scores_do_not_depend_on_chunks_batches_or_a_kept_reference(reference, student, scores, monkeypatch):
    monkeypatch.setitem(evaluation._BATCH_TOKENS, jax.default_backend(), 3 * TOKENS_WT.shape[1])
    monkeypatch.setitem(evaluation._CHUNK_LOGITS, jax.default_backend(), 300 * reference.config.vocab_size)
    hidden = evaluation.hidden_states(reference, Sequences.of_windows(TOKENS_WT))
    assert [len(x) for x in hidden] == [3, 3]
    again = evaluation.score(reference, student, TOKENS_WT, hidden=hidden)
    np.testing.assert_allclose(again.kl, scores.kl, atol=1e-5)
    np.testing.assert_allclose(again.loss, scores.loss, atol=1e-4)
    assert np.array_equal(again.sequence, scores.sequence)


def test_divergence_agrees_with_float64_where_it_is_tiny_and_where_it_is_huge():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 997)) * 3 + 40
    noise = rng.normal(size=logits.shape) * np.array([1e-4, 1e-2, 1, 10, 60, 0])[:, None]
    logits, student = np.float32(logits), np.float32(logits + noise)
    target = rng.integers(0, 997, 6).astype(np.int32)
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (np.float64(logits), np.float64(student)))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(1)
    kl, loss, loss_reference, agree = jax.jit(evaluation.divergence)(logits, student, target)
    # At 4e-9 nats the sum of p log(p/q), in float32, would be off by a hundred times its value.
    np.testing.assert_allclose(kl[:1], expected[:1], rtol=1e-3)
    np.testing.assert_allclose(kl[1:], expected[1:], rtol=2e-5)
    assert np.all(np.asarray(kl) >= 0) and kl[5] == 0
    np.testing.assert_allclose(loss, -log_q[np.arange(6), target], rtol=1e-5)
    np.testing.assert_allclose(loss_reference, -log_p[np.arange(6), target], rtol=1e-5)
    assert np.array_equal(agree, log_p.argmax(1) == log_q.argmax(1))


def test_a_difference_planted_in_one_window_is_found_there(checkpoint, reference):
    tensors = dict(checkpoint.tensors)
    # A token that one window has and the others lack gets another embedding.
    only = sorted(set(TOKENS_WT[2, :-1].tolist()) - set(np.delete(TOKENS_WT, 2, axis=0).ravel().tolist()))[0]
    planted = np.array(tensors["token_embd.weight"], np.float32)
    planted[only] = planted[only][::-1]
    output = np.array(tensors["token_embd.weight"], np.float32)
    config = dataclasses.replace(checkpoint.config, tie_word_embeddings=False)
    student = Qwen35.from_tensors(config, tensors | {"token_embd.weight": planted, "output.weight": output})
    scores = evaluation.score(reference, student, TOKENS_WT)
    kl_WT = scores.kl.reshape(len(TOKENS_WT), -1)
    first = int(np.flatnonzero(TOKENS_WT[2] == only)[0])
    assert np.all(kl_WT[[0, 1, 3]] == 0) and np.all(kl_WT[2, :first] == 0)
    assert kl_WT[2, first] > 1e-3


def test_padding_changes_no_score(reference, student, scores):
    """Conversations are padded to buckets; the same tokens as windows are not."""
    lengths = (256, 200, 40, 2)
    cut = tuple(row[:length] for row, length in zip(TOKENS_WT, lengths))
    roles = tuple(np.arange(length, dtype=np.int32) % 3 for length in lengths)
    sequences = Sequences(cut, ("a", "b", "a", "b"), roles)
    padded = evaluation.score(reference, student, sequences)
    for index, length in enumerate(lengths):
        ours, whole = (x.loss[x.sequence == index] for x in (padded, scores))
        np.testing.assert_allclose(ours, whole[: length - 1], atol=1e-4)
    summary = evaluation.summarize(padded, sequences)
    assert {name: part["tokens"] for name, part in summary["domains"].items()} == {"a": 255 + 39, "b": 199 + 1}
    assert sum(part["tokens"] for part in summary["roles"].values()) == summary["tokens"] == sum(lengths) - 4
    assert list(summary["roles"]) == ["template", "prompt", "response"]


def test_foreign_tokens_are_refused(reference):
    with pytest.raises(InputError, match="outside of the vocabulary"):
        evaluation.score(reference, reference, np.full((1, 8), reference.config.vocab_size, np.int32))


def test_texts_and_conversations_are_prepared_apart(checkpoint, tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": GOLDEN["chat"]["messages"]}) + "\n" for _ in range(3)))
    texts = read_texts([chat, PACKAGE / "suites/demo.txt"])
    sequences = evaluation.prepare(texts, checkpoint.tokenizer, 256, 2)
    assert [tokens.tolist() for tokens in sequences.tokens] == [*GOLDEN["tokens"][:2], *[GOLDEN["chat"]["tokens"]] * 2]
    assert sequences.domains == ("demo", "demo", "chat", "chat")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(chat.read_text() + json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(InputError, match="mixes"):
        evaluation.prepare(read_texts([mixed]), checkpoint.tokenizer, 256)


def test_a_text_that_no_window_reaches_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "late.txt").write_text("never reached")
    texts = read_texts([PACKAGE / "suites/demo.txt", tmp_path / "late.txt"])
    assert len(evaluation.prepare(texts, checkpoint.tokenizer, 256, 2).documents) == 1
    assert "late.txt" in capsys.readouterr().err
    evaluation.prepare(texts, checkpoint.tokenizer, 256)
    assert capsys.readouterr().err == ""


# Aggregates ------------------------------------------------------------------------------------------------------


def test_summary_agrees_with_brute_force():
    rng = np.random.default_rng(1)
    kl, loss, loss_reference = rng.gamma(1, 0.05, 5000), rng.gamma(2, 2, 5000), rng.gamma(2, 2, 5000)
    sequence = np.repeat(np.arange(50), 100)
    summary = evaluation.summarize(
        made_up(kl, loss, loss_reference, sequence), Sequences.of_windows(np.zeros((50, 101), np.int32))
    )
    kl, loss, loss_reference = (np.float64(np.float32(x)) for x in (kl, loss, loss_reference))
    expected = {
        "tokens": 5000,
        "sequences": 50,
        "kl": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.percentile(kl, 99),
        "kl_p999": np.percentile(kl, 99.9),
        "kl_max": kl.max(),
        "top1": 1.0,
        "rms_probability_change": np.sqrt(((np.exp(-loss) - np.exp(-loss_reference)) ** 2).mean()),
        "cross_entropy": loss.mean(),
        "cross_entropy_reference": loss_reference.mean(),
        "gap": loss.mean() - loss_reference.mean(),
    }
    assert {key: summary[key] for key in expected} == pytest.approx(expected)
    assert json.loads(json.dumps(summary)) == summary
    for name in ("kl", "gap"):
        low, high = summary[f"{name}_interval"]
        assert low < summary[name] < high


@pytest.mark.parametrize("count", [8, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(count):
    """Sequences differ in length, level and spread, as documents do: 95% of intervals must hold the true mean."""
    rng = np.random.default_rng(2)
    trials, covered, naive = 400, 0, 0
    for seed in range(trials):
        lengths = rng.integers(20, 60, count)
        sequence = np.repeat(np.arange(count), lengths)
        values = (1 + 0.5 * rng.normal(size=count))[sequence] + rng.normal(size=len(sequence))
        low, high = evaluation.interval(values, sequence, seed=seed)
        covered += low <= 1 <= high
        naive += abs(values.mean() - 1) <= 1.96 * values.std() / np.sqrt(len(values))
    # Three standard errors of a proportion in 400 trials are 0.033.
    assert 0.91 <= covered / trials <= 0.985
    # Tokens of one sequence are alike: an interval over tokens would cover far less often.
    assert naive / trials < 0.7


def test_one_sequence_still_has_an_interval():
    values = np.random.default_rng(3).normal(size=400)
    low, high = evaluation.interval(values, np.zeros(400, np.int32))
    assert low < values.mean() < high
    for count in (1, 2, 5):
        assert evaluation.interval(np.ones(count), np.zeros(count, np.int32)) == [1, 1]


def test_gap_is_paired():
    """Texts differ by nats, the models by thousandths: only a paired interval can see the gap."""
    rng = np.random.default_rng(4)
    sequence = np.repeat(np.arange(30), 50)
    reference = 4 + rng.normal(size=30)[sequence]
    scores = made_up(np.zeros(1500), reference + 0.004, reference, sequence)
    summary = evaluation.summarize(scores, Sequences.of_windows(np.zeros((30, 51), np.int32)))
    assert summary["gap_interval"] == pytest.approx([0.004, 0.004], abs=1e-5)


def gaps(plain, quantized, noise=0.01):
    rng = np.random.default_rng(5)
    sequence = np.repeat(np.arange(40), 50)
    reference = 3 + rng.normal(size=2000)
    return [
        made_up(np.zeros(2000), reference + gap + noise * rng.normal(size=2000), reference, sequence)
        for gap in (plain, quantized)
    ]


def test_recovery_is_the_closed_part_of_the_gap():
    result = evaluation.recovery(*gaps(0.1, 0.025))
    assert result["value"] == pytest.approx(0.75, abs=0.01) and result["label"] == "recovery"
    assert result["interval"][0] < 0.75 < result["interval"][1]


def test_recovery_above_one_is_no_quality():
    assert evaluation.recovery(*gaps(0.1, -0.02))["label"] == "fits the data"


def test_recovery_of_a_gap_within_its_interval_is_not_stated():
    assert evaluation.recovery(*gaps(0.01, 0.0, noise=0.5)) is None


def test_difference_is_signed_and_paired():
    first, second = gaps(0, 0)
    first = made_up(first.kl + 0.02, first.loss, first.loss_reference, first.sequence)
    result = evaluation.difference(first, second)
    assert result["kl"] == pytest.approx(0.02) and result["kl_interval"][0] > 0.019
    with pytest.raises(ValueError, match="same tokens"):
        evaluation.difference(first, second.where(np.arange(2000) < 10))


def test_large_vocabularies_never_have_all_their_logits(checkpoint):
    """[tokens, 248320] float32 would take 16 GB here; the compiled program may hold a few chunks of it."""
    config = dataclasses.replace(checkpoint.config, vocab_size=248_320)
    model = abstract(config)
    shape = jax.ShapeDtypeStruct((32, 512, config.hidden_size), jnp.float32)
    tokens = jax.ShapeDtypeStruct((32, 512), jnp.int32)
    compiled = evaluation._score_batch.lower(
        model, model, shape, shape, tokens, chunk=256, mesh=mesh.create()
    ).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * 256 * config.vocab_size * 4
