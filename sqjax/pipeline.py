"""The stages as functions, under the names of the commands: artifact in, artifact out.

checkpoint -> model -> statistics -> problem -> scales, rounding -> refinement -> GGUF -> evaluation -> report
"""

import hashlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sqjax import evaluation, gguf_file
from sqjax.checkpoint import Checkpoint, load_checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.model import Qwen35
from sqjax.run import InputError, progress
from sqjax.runtime import score as score_in_llama_cpp
from sqjax.texts import Texts, overlap, read_texts

Runtime = Literal["jax", "llama.cpp"]
FileType = Literal["f32", "bf16", "q4_k"]
DType = Literal["f32", "bf16"]

PACKAGE = Path(__file__).parent
DEMO_MODEL = PACKAGE / "demo8"
SUITES = PACKAGE / "suites"
_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
DEFAULT_SUITE = "heldout120"
_STREAMED_WINDOWS = 64


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def open_model(spec: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a Hugging Face folder, a hub id or a qwen35 GGUF file; tensors stay on disk until they are asked for.

    Raises:
      InputError: there is no such model, or it is broken or of another architecture.
    """
    path = Path(spec)
    if path.suffix.lower() == ".gguf" or path.is_file():
        return gguf_file.read_gguf(path)
    return load_checkpoint(spec, revision=revision)


def load_model(checkpoint: Checkpoint, *, dtype: DType = "f32") -> Qwen35:
    """Puts a checkpoint's weights on the device, matrices in `dtype`."""
    return Qwen35.from_tensors(checkpoint.config, checkpoint.tensors, dtype=_DTYPES[dtype])


def open_texts(sources: str | Path | Sequence[str | Path], *, seed: int | None = None) -> Texts:
    """Opens texts as `texts.read_texts` does; the name of a suite that comes with the package is a source too.

    Raises:
      InputError: a source does not exist or cannot be read.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    return read_texts([file for source in sources for file in _suite(source)], seed=seed)


def _suite(source: str | Path) -> list[str | Path]:
    files = sorted(SUITES.glob(f"{source}*.jsonl")) if str(source).isalnum() else []
    return files if files and not Path(source).exists() else [source]


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def convert(model: str | Path, out: str | Path, *, type: FileType = "q4_k") -> dict[str, Any]:
    """Writes a checkpoint as GGUF; q4_k is llama.cpp's plain rounding, pure.

    Returns what `inspect` says of the file, without its metadata, and `file` and `seconds`.

    Raises:
      InputError: the model cannot be read, or the file cannot be written.
    """
    start = time.monotonic()
    gguf_file.write_gguf(out, open_model(model), file_type=type)
    return {"file": str(out)} | _facts(out) | {"seconds": time.monotonic() - start}


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
    text: str | Path | Sequence[str | Path] = DEFAULT_SUITE,
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
    facts = {"file": str(file), "reference": str(reference)} | _facts(file)
    checkpoint = open_model(reference)
    sequences = prepare(checkpoint, text, length=length, windows=windows, calibration=calibration)
    scores = score_file(file, checkpoint, sequences, runtime=runtime, dtype=dtype)
    result = evaluation.summarize(scores, sequences, seed=seed) | facts
    result |= {"length": length, "runtime": runtime, "dtype": dtype if runtime == "jax" else None, "seed": seed}
    result |= {"text_sha256": _tokens_sha256(sequences), "disjoint_from_calibration": bool(calibration) or None}
    return result | usage() | {"seconds": time.monotonic() - start}


def prepare(
    checkpoint: Checkpoint,
    text: str | Path | Sequence[str | Path],
    *,
    length: int = 512,
    windows: int | None = None,
    calibration: Sequence[str | Path] = (),
) -> Sequences:
    """Reads, encodes and packs text for `score_file`, and refuses what was calibrated on; arguments as of `evaluate`.

    Raises:
      InputError: the text cannot be read, does not fill a window, or is calibration text.
    """
    texts = open_texts(text)
    if windows is None and any(isinstance(file, str) for file in texts.files):
        windows = _STREAMED_WINDOWS
        print(f"a data set is streamed: scoring its first {windows} windows; --windows says otherwise", file=sys.stderr)
    sequences = evaluation.prepare(texts, checkpoint.tokenizer, length, windows)
    if calibration and (seen := overlap(open_texts(calibration), sequences.documents)):
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


def demo(out: str | Path = "runs/demo") -> dict[str, Any]:
    """Runs the pipeline on the embedded model: export, read back, evaluation.

    Returns `files`: for each file that was written what `evaluate` says of it, and `seconds`.

    Raises:
      InputError: the folder cannot be written.
    """
    start = time.monotonic()
    files = {}
    for name, kind in (("BF16", "bf16"), ("Q4_K, plain rounding", "q4_k")):
        path = Path(out) / f"demo8.{kind}.gguf"
        convert(DEMO_MODEL, path, type=kind)
        files[name] = evaluate(path, reference=DEMO_MODEL, text=SUITES / "demo.txt", length=256)
    return {"files": files, "seconds": time.monotonic() - start}


# ---------------------------------------------------------------------------------------------------------------------
# Facts that every result states


def _facts(file: str | Path) -> dict[str, Any]:
    facts = gguf_file.inspect(file)
    return {
        key: facts[key] for key in ("file_bytes", "tensor_bytes", "parameters", "bits_per_weight", "types", "sha256")
    }


def _tokens_sha256(sequences: Sequences) -> str:
    digest = hashlib.sha256()
    for tokens in sequences.tokens:
        digest.update(tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def usage() -> dict[str, Any]:
    """Returns device and peak memory of this process: keys device, peak_memory_bytes, peak_device_memory_bytes."""
    device = jax.devices()[0]
    statistics = device.memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "device": f"{device.platform} {device.device_kind}".strip(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_memory_bytes": statistics.get("peak_bytes_in_use"),
    }
