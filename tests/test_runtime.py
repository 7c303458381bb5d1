"""Real llama.cpp agrees with the evaluation in JAX, on files that this package wrote."""

import pathlib

import numpy as np
import pytest

import sqjax
from sqjax import evaluation, runtime
from sqjax.checkpoint import load_checkpoint
from sqjax.evaluation import Sequences
from sqjax.gguf_file import read_gguf, write_gguf
from sqjax.model import Qwen35
from sqjax.run import InputError
from sqjax.texts import read_texts

pytest.importorskip("xllamacpp")
PACKAGE = pathlib.Path(sqjax.__file__).parent


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(PACKAGE / "demo8")


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = {kind: folder / f"{kind}.gguf" for kind in ("f32", "q4_k")}
    for kind, path in paths.items():
        write_gguf(path, checkpoint, file_type=kind)
    return paths


@pytest.fixture(scope="module")
def sequences(checkpoint):
    """Two windows, and two shorter texts that llama.cpp has to pad and to hold apart."""
    windows = evaluation.prepare(read_texts([PACKAGE / "suites/demo.txt"]), checkpoint.tokenizer, 300, 4).tokens
    return Sequences((windows[0], windows[1][:33], windows[2], windows[3][:120]), ("demo",) * 4, (None,) * 4)


def test_scores_agree_with_jax(checkpoint, files, sequences):
    reference = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)
    dequantized = read_gguf(files["q4_k"])
    ours = evaluation.score(reference, Qwen35.from_tensors(dequantized.config, dequantized.tensors), sequences)
    real = runtime.score(files["f32"], files["q4_k"], sequences)
    assert np.array_equal(real.sequence, ours.sequence)
    # Flash attention with float16 keys and values is all that separates the two references.
    np.testing.assert_allclose(real.loss_reference, ours.loss_reference, atol=0.02)
    assert abs(real.loss_reference.mean() - ours.loss_reference.mean()) < 1e-3
    # Activations rounded to 8 bits add a little to the divergence of the file, and take nothing away.
    assert 0.95 < real.kl.mean() / ours.kl.mean() < 1.25
    assert np.corrcoef(real.kl, ours.kl)[0, 1] > 0.9


def test_a_file_diverges_from_itself_by_exactly_nothing(files, sequences):
    scores = runtime.score(files["q4_k"], files["q4_k"], sequences)
    assert np.all(scores.kl == 0) and np.all(scores.agree == 1)


def test_long_sequences_are_decoded_in_pieces(files):
    """A text in one piece and in pieces of 512 has the same losses: its state is carried over."""
    tokens = np.random.default_rng(0).integers(100, 16000, 700).astype(np.int32)
    long = runtime.score(files["f32"], files["f32"], Sequences.of_windows(tokens[None]))
    whole = load_checkpoint(PACKAGE / "demo8")
    model = Qwen35.from_tensors(whole.config, whole.tensors)
    ours = evaluation.score(model, model, tokens[None])
    np.testing.assert_allclose(long.loss, ours.loss, atol=0.05)


def test_what_llama_cpp_refuses_is_the_inputs_fault(tmp_path, files, sequences):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files["q4_k"].read_bytes()[:-1000])
    for path in (broken, tmp_path / "missing.gguf"):
        with pytest.raises(InputError, match=r"llama\.cpp does not load") as error:
            runtime.LlamaCpp(path, length=16)
        assert "\n" not in str(error.value)
