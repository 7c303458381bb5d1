"""Stages that measure files: what a GGUF file lost against the model that it was made from."""

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64

from sqjax import evaluation, gguf_file
from sqjax.checkpoint import Checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.model import Qwen35
from sqjax.run import InputError, progress
from sqjax.runtime import score as score_in_llama_cpp
from sqjax.sources import DEFAULT_SUITE, DType, Sources, file_facts, load_model, open_model, open_texts, usage
from sqjax.texts import overlap

Runtime = Literal["jax", "llama.cpp"]
_STREAMED_WINDOWS = 64


def inspect(file: str | Path) -> dict[str, Any]:
    """Returns types, sizes, bits per weight, SHA-256 and metadata of a GGUF file of any architecture.

    Raises:
      InputError: it is no GGUF file, or not a whole one.
    """
    return {"file": str(file)} | gguf_file.inspect(file)


def evaluate(
    file: str | Path,
    *,
    reference: str | Path,
    text: Sources = DEFAULT_SUITE,
    length: int = 512,
    windows: int | None = None,
    runtime: Runtime = "jax",
    dtype: DType = "f32",
    calibration: Sequence[str | Path] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Measures what a GGUF file lost against its reference: `evaluation.summarize`'s metrics and the file's facts.

    Args:
      file: GGUF file of any type; it is read back and dequantized, or run in llama.cpp.
      reference: the model that it was made from.
      text: what to score; conversations one by one, text packed into windows.
      length: tokens of a window.
      windows: how many windows, or conversations, from the beginning of the text; all unless given.
      runtime: "jax", or "llama.cpp" for both the file and the reference (as F32).
      dtype: of the matrices in JAX.
      calibration: text that the file was made with; refused where it is evaluated too.
      seed: of the bootstrap.

    Raises:
      InputError: one of them cannot be read, they do not belong together, or calibration text is in the text.
    """
    start = time.monotonic()
    facts = {"file": str(file), "reference": str(reference)} | file_facts(file)
    checkpoint = open_model(reference)
    sequences = prepare(checkpoint, text, length=length, windows=windows, calibration=calibration)
    scores = score_file(file, checkpoint, sequences, runtime=runtime, dtype=dtype)
    result = evaluation.summarize(scores, sequences, seed=seed) | facts
    result |= {"length": length, "runtime": runtime, "dtype": dtype if runtime == "jax" else None, "seed": seed}
    result |= {"text_sha256": tokens_sha256(sequences), "disjoint_from_calibration": bool(calibration) or None}
    return result | usage() | {"seconds": time.monotonic() - start}


def prepare(
    checkpoint: Checkpoint,
    text: Sources,
    *,
    length: int = 512,
    windows: int | None = None,
    calibration: Sequence[str | Path] | UInt64[np.ndarray, "N"] = (),
) -> Sequences:
    """Reads, encodes and packs text for `score_file`, and refuses what was calibrated on; arguments as of `evaluate`.

    Calibration text is given by its sources, or by its `texts.fingerprints`.

    Raises:
      InputError: the text cannot be read, does not fill a window, or is calibration text.
    """
    texts = open_texts(text)
    if windows is None and any(isinstance(file, str) for file in texts.files):
        windows = _STREAMED_WINDOWS
        print(f"a data set is streamed: scoring its first {windows} windows; --windows says otherwise", file=sys.stderr)
    sequences = evaluation.prepare(texts, checkpoint.tokenizer, length, windows)
    known = calibration if isinstance(calibration, np.ndarray) else open_texts(calibration)
    if len(calibration) and (seen := overlap(known, sequences.documents)):
        raise InputError(
            f"{len(seen)} of {len(sequences.documents)} evaluated documents are calibration text, "
            f"the first from {seen[0].source}; evaluate on text that the file was not made with"
        )
    return sequences


def score_file(
    file: str | Path,
    checkpoint: Checkpoint,
    sequences: Sequences,
    *,
    runtime: Runtime = "jax",
    dtype: DType = "f32",
    reference: Qwen35 | None = None,
    hidden: Sequence[np.ndarray] | None = None,
) -> TokenScores:
    """Scores a GGUF file against the checkpoint that it was made from.

    Args:
      file: GGUF file.
      checkpoint: its reference.
      sequences: what `prepare` returned.
      runtime: where both are run.
      dtype: of the matrices in JAX.
      reference: the checkpoint as a model of that dtype, where it is loaded already.
      hidden: what `evaluation.hidden_states` said of it, where several files meet one reference.

    Raises:
      InputError: the file cannot be read, or its vocabulary is another.
    """
    with progress(f"evaluating {Path(file).name}") as report:
        if runtime == "llama.cpp":
            with _as_f32(checkpoint) as reference_file:
                return score_in_llama_cpp(reference_file, file, sequences, progress=report)
        if reference is None:
            reference = load_model(checkpoint, dtype=dtype)
        student = load_model(gguf_file.read_gguf(file), dtype=dtype)
        return evaluation.score(reference, student, sequences, hidden=hidden, progress=report)


@contextmanager
def _as_f32(checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary F32 file: in llama.cpp, matrices of fewer bits would have their activations rounded."""
    with tempfile.TemporaryDirectory(prefix="sqjax-") as folder:
        path = Path(folder) / "reference.f32.gguf"
        gguf_file.write_gguf(path, checkpoint, file_type="f32")
        yield path


def tokens_sha256(sequences: Sequences) -> str:
    """Returns the SHA-256 of all tokens, one after the other as 32-bit integers."""
    digest = hashlib.sha256()
    for tokens in sequences.tokens:
        digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()
