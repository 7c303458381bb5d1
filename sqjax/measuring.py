"""Stages that measure files: what a GGUF file lost against the model that it was made from."""

import hashlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sqjax import evaluation, fingerprints, gguf_file
from sqjax.checkpoint import Checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.fingerprints import Seen
from sqjax.model import Qwen35
from sqjax.run import progress
from sqjax.runtime import score as score_in_llama_cpp
from sqjax.sources import DEFAULT_SUITE, DType, Sources, file_facts, load_model, open_model, open_texts, usage
from sqjax.tokens import Tokenizer

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
    allow_overlap: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures what a GGUF file lost against its reference: `evaluation.summarize`'s metrics and the file's facts.

    Text that the file was made on is refused: `calibrate` and `refine` keep its hashes, which lie beside the file.

    Args:
      file: GGUF file of any type; it is read back and dequantized, or run in llama.cpp.
      reference: the model that it was made from.
      text: what to score; conversations one by one, text packed into windows.
      length: tokens of a window.
      windows: how many windows, or conversations, from the beginning of the text; all unless given.
      runtime: "jax", or "llama.cpp" for both the file and the reference (as F32).
      dtype: of the matrices in JAX.
      calibration: further text that the file was made on, where it does not lie beside the file what that was.
      allow_overlap: measure on text that the file was made on all the same; the result says so.
      seed: of the bootstrap.

    Returns the metrics and facts, and `calibration_checked` (whether all that the file was made on is known),
    `windows_compared`, `calibration_overlap` (text -> the share of its words that is known from there),
    `disjoint_from_calibration` (None where that is not known).

    Raises:
      InputError: one of them cannot be read, they do not belong together, or calibration text is in the text.
    """
    start = time.monotonic()
    facts = {"file": str(file), "reference": str(reference)} | file_facts(file)
    checkpoint = open_model(reference)
    sequences = prepare(checkpoint, text, length=length, windows=windows)
    name, sources = Path(file).name, [text] if isinstance(text, str | Path) else text
    label = ", ".join(Path(source).name for source in sources)
    check = look_up({name: seen_by(file, calibration)}, {label: sequences}, checkpoint.tokenizer, allow=allow_overlap)
    scores = score_file(file, checkpoint, sequences, runtime=runtime, dtype=dtype)
    result = evaluation.summarize(scores, sequences, seed=seed) | facts
    result |= {"length": length, "runtime": runtime, "dtype": dtype if runtime == "jax" else None, "seed": seed}
    result |= {"text_sha256": tokens_sha256(sequences)} | check[name]
    return result | usage() | {"seconds": time.monotonic() - start}


def prepare(checkpoint: Checkpoint, text: Sources, *, length: int = 512, windows: int | None = None) -> Sequences:
    """Reads, encodes and packs text for `score_file`; arguments as of `evaluate`.

    Raises:
      InputError: the text cannot be read or does not fill a window.
    """
    texts = open_texts(text)
    if windows is None and any(isinstance(file, str) for file in texts.files):
        windows = _STREAMED_WINDOWS
        print(f"a data set is streamed: scoring its first {windows} windows; --windows says otherwise", file=sys.stderr)
    return evaluation.prepare(texts, checkpoint.tokenizer, length, windows)


def seen_by(file: str | Path, calibration: Sequence[str | Path] = ()) -> Seen:
    """Returns the hashes of all text that a file is known to be made on; `calibration` names what is not beside it.

    Raises:
      InputError: the file or a text cannot be read.
    """
    provenance = (gguf_file.inspect(file)["provenance"] or {}) if Path(file).is_file() else {}
    seen = fingerprints.read_beside(file, provenance.get("seen"))
    if not calibration:
        return seen
    # Whoever names text answers for its being all of it.
    named = fingerprints.prints_of(map(fingerprints.piece_of, open_texts(calibration)))
    return Seen(fingerprints.union(seen.prints, named))


def sampled(sequences: Sequences, tokenizer: Tokenizer) -> fingerprints.Sample:
    """Hashes sequences, to be looked up in what files were made on; windows as the text that they were cut from."""
    pieces = []
    for is_packed, group in itertools.groupby(zip(sequences.tokens, sequences.roles), lambda one: one[1] is None):
        if is_packed:
            pieces += fingerprints.pieces_of(np.concatenate([tokens for tokens, _ in group]), None, tokenizer)
        else:
            pieces += [piece for one in group for piece in fingerprints.pieces_of(*one, tokenizer)]
    return fingerprints.sample(pieces)


def look_up(
    files: Mapping[str, Seen],
    texts: Mapping[str, Sequences],
    tokenizer: Tokenizer,
    *,
    allow: bool = False,
    remedy: str = "evaluate on other text, or --allow-overlap and the result says so",
) -> dict[str, dict[str, Any]]:
    """Looks for text that files were made on, and states of each file what came of it, with the keys of `evaluate`.

    Raises:
      InputError: a text is for the most part what a file was made on, and that is not allowed.
    """
    samples = {name: sampled(sequences, tokenizer) for name, sequences in texts.items()}
    checks = {}
    for file, seen in files.items():
        found = {name: fingerprints.overlap(seen.prints, sample) for name, sample in samples.items()}
        for name, one in found.items():
            if not allow:
                fingerprints.refuse(one, name, file, remedy)
        could = seen.is_complete or len(seen.prints) > 0
        is_grave = any(one.is_grave for one in found.values())
        checks[file] = {
            "calibration_checked": seen.is_complete,
            "windows_compared": sum(len(text.tokens) for text in texts.values()) if could else 0,
            "calibration_overlap": {name: one.share for name, one in found.items()} if could else None,
            "disjoint_from_calibration": False if is_grave else seen.is_complete or None,
        }
    return checks


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
