"""The stages as functions, under the names of the commands: artifact in, artifact out.

checkpoint -> model -> statistics -> problem -> scales, rounding -> refinement -> GGUF -> evaluation -> report
"""

import dataclasses
import hashlib
import resource
import shutil
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

from sqjax import calibration, distillation, evaluation, gguf_file
from sqjax.checkpoint import Checkpoint, load_checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.model import Qwen35
from sqjax.quantizer import Recipe
from sqjax.quantizer import quantize as rounded
from sqjax.refinement import Refinement
from sqjax.run import InputError, progress, sha256
from sqjax.runtime import score as score_in_llama_cpp
from sqjax.settings import read_settings
from sqjax.statistics import Statistics
from sqjax.texts import Texts, overlap, read_texts

Runtime = Literal["jax", "llama.cpp"]
FileType = Literal["f32", "bf16", "q4_k"]
DType = Literal["f32", "bf16"]
Sources = str | Path | Sequence[str | Path]

PACKAGE = Path(__file__).parent
DEMO_MODEL = PACKAGE / "demo8"
SUITES = PACKAGE / "suites"
_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
# In the source tree, and in an installed package.
CONFIGS = (PACKAGE.parent / "configs", PACKAGE / "configs")
DEFAULT_SUITE = "heldout120"
CALIBRATION_SUITE = "calib360"
_STREAMED_WINDOWS = 64
_DEMO_FILES = {"BF16": "bf16", "Q4_K, plain rounding": "q4_k", "Q4_K, spectral": "spectral"}
_DEMO_SETTINGS = ("sequential=false", 'steps=["feedback", "descend_codes"]', 'embedding_steps=["feedback"]')


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


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    text: Sources = CALIBRATION_SUITE,
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
    imatrix: str | Path | None = None,
) -> dict[str, Any]:
    """Measures the input and output Grams of every matrix on text, into a folder; an interrupted run is resumed.

    Args:
      model: what to measure.
      out: folder for the statistics.
      text: what to measure on; the package's own prompts unless given.
      tokens: about how many tokens of it.
      length: tokens of a window.
      batch: windows at a time.
      seed: of the order of documents and of the labels drawn from the model.
      imatrix: also write the importance matrix to this file, in llama.cpp's GGUF format.

    Raises:
      InputError: one of them cannot be read, or the folder holds an unfinished run with other settings.
    """
    start = time.monotonic()
    checkpoint = open_model(model)
    statistics, about = _measure(checkpoint, text, Path(out), tokens, length, batch, seed)
    if imatrix is not None:
        calibration.write_imatrix(imatrix, statistics, checkpoint.config, str(about["text"]))
    result = {"folder": str(out)} | about | {"tokens": statistics.tokens}
    return result | usage() | {"seconds": time.monotonic() - start}


def _measure(checkpoint, text, folder, tokens, length, batch, seed) -> tuple[Statistics, dict[str, Any]]:
    sources = [text] if isinstance(text, str | Path) else list(text)
    texts = open_texts(sources, seed=seed)
    windows_WT = calibration.calibration_windows(texts, checkpoint.tokenizer, length, tokens)
    about = {"model": checkpoint.name, "text": [Path(source).name for source in sources], "length": length}
    with progress("calibrating") as report:
        statistics = calibration.calibrate(
            checkpoint.config,
            load_model(checkpoint),
            windows_WT,
            folder,
            about=about,
            batch=batch,
            seed=seed,
            progress=report,
        )
    return statistics, about | {"windows_sha256": calibration.digest(windows_WT)}


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by its name in configs/ or by its path, with `key=value` overrides.

    Raises:
      InputError: there is no such recipe, or a setting is wrong.
    """
    path = Path(name)
    if path.suffix != ".toml":
        found = [folder / f"{name}.toml" for folder in CONFIGS if (folder / f"{name}.toml").exists()]
        if not found:
            names = sorted({file.stem for folder in CONFIGS for file in folder.glob("*.toml")})
            raise InputError(f"there is no recipe {name}; give one of {', '.join(names)}, or the path of a TOML file")
        path = found[0]
    return read_settings(Recipe, path, overrides)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "spectral",
    statistics: str | Path | None = None,
    text: Sources | None = None,
    tokens: int = 1_000_000,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a pure Q4_K_M file, rounded by a recipe.

    Args:
      model: what to quantize.
      out: GGUF file to write; what it was made from is written beside it, as OUT.json.
      recipe: name in configs/, or path of a TOML file.
      statistics: folder that `calibrate` wrote; measured from `text` unless given, into OUT.statistics.
      text: what to calibrate on; the package's own prompts unless given.
      tokens: about how many tokens of it.
      settings: `key=value` overrides of the recipe.
      seed: of the calibration.

    Raises:
      InputError: one of them cannot be read, they do not belong together, or the file cannot be written.
    """
    start = time.monotonic()
    chosen = read_recipe(recipe, settings)
    checkpoint = open_model(model)
    measured, about = None, {}
    if chosen.needs_statistics and statistics is not None:
        measured, about = calibration.load(statistics)
        calibration.check_model(measured, checkpoint.config)
    elif chosen.needs_statistics:
        folder = Path(f"{out}.statistics")
        measured, about = _measure(checkpoint, text or CALIBRATION_SUITE, folder, tokens, 512, 8, seed)
    with progress(f"rounding by {Path(recipe).stem}") as report:
        tensors = rounded(checkpoint.config, checkpoint.tensors, measured, chosen, report)
    written = {name: jax.tree.map(np.asarray, tensor) for name, tensor in tensors.items()}
    made = {"recipe": Path(recipe).stem, "settings": dataclasses.asdict(chosen), "calibration": about, "seed": seed}
    gguf_file.write_gguf(out, checkpoint, written, file_type="q4_k", provenance={"model": checkpoint.name} | made)
    return {"file": str(out)} | _facts(out) | made | usage() | {"seconds": time.monotonic() - start}


def refine(
    model: str | Path,
    file: str | Path,
    out: str | Path,
    *,
    text: Sources = CALIBRATION_SUITE,
    tokens: int = 1_000_000,
    run: str | Path | None = None,
    resume: bool = False,
    settings: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Distils a model into a Q4_K file of it: codes, scales and vectors move until it answers like the model.

    Args:
      model: the teacher.
      file: pure Q4_K file of it, where refinement starts.
      out: GGUF file to write, of the same size; what it was made from is written beside it, as OUT.json.
      text: what to distil on; the package's own prompts unless given.
      tokens: how many tokens to distil on; text that is shorter is read several times.
      run: folder for checkpoints and metrics; OUT.run unless given.
      resume: go on with the run in that folder, to the bits of one that was not interrupted.
      settings: `key=value` overrides of configs/refine.toml.
      seed: of the order of the text.

    Raises:
      InputError: one of them cannot be read, they do not belong together, or the folder holds another run.
    """
    start = time.monotonic()
    chosen = read_settings(Refinement, next(f for f in CONFIGS if f.exists()) / "refine.toml", settings)
    checkpoint, begin = open_model(model), gguf_file.read_gguf(file)
    sources = [text] if isinstance(text, str | Path) else list(text)
    windows_WT = calibration.calibration_windows(
        open_texts(sources, seed=seed), checkpoint.tokenizer, chosen.length, tokens
    )
    folder = Path(f"{out}.run" if run is None else run)
    made = {"model": checkpoint.name, "text": [Path(source).name for source in sources], "tokens": tokens}
    made |= {"start_sha256": sha256(file), "windows_sha256": calibration.digest(windows_WT), "seed": seed}
    made |= {"settings": dataclasses.asdict(chosen)}
    distillation.claim(folder, made, resume=resume)
    watched = None
    if chosen.watch != "heldout":
        watched = prepare(checkpoint, chosen.watch, length=chosen.length, windows=chosen.watch_windows or None)
    loop = distillation.prepare(checkpoint, begin, windows_WT, watched, settings=chosen, tokens=tokens, seed=seed)
    with progress("refining") as report:
        tensors, position = distillation.distill(loop, folder, resume=resume, progress=report)
    gguf_file.write_gguf(out, begin, tensors, file_type="q4_k", provenance=made | dataclasses.asdict(position))
    result = {"file": str(out)} | _facts(out) | made | dataclasses.asdict(position)
    result |= usage() | {"seconds": time.monotonic() - start}
    distillation.finish(folder, result)
    return result


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
    text: Sources,
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
    """Runs the pipeline on the embedded model: statistics, rounding, export, read back, evaluation.

    Calibrates on a little of calib360 and evaluates on text of neither: the first conversations of heldout120 and
    demo.txt. Rounding leaves out what a first run would mostly wait for the compiler for.

    Returns `files`: for each file that was written what `evaluate` says of it, and `seconds`.

    Raises:
      InputError: the folder cannot be written.
    """
    start = time.monotonic()
    out = Path(out)
    paths = {name: out / f"demo8.{kind}.gguf" for name, kind in _DEMO_FILES.items()}
    convert(DEMO_MODEL, paths["BF16"], type="bf16")
    convert(DEMO_MODEL, paths["Q4_K, plain rounding"], type="q4_k")
    # A folder of statistics is made anew: a demonstration shows the whole way.
    shutil.rmtree(out / "statistics", ignore_errors=True)
    calibrate(DEMO_MODEL, out / "statistics", tokens=12_000, length=256)
    quantize(DEMO_MODEL, paths["Q4_K, spectral"], statistics=out / "statistics", settings=_DEMO_SETTINGS)
    checkpoint = open_model(DEMO_MODEL)
    sequences = prepare(checkpoint, (DEFAULT_SUITE, SUITES / "demo.txt"), length=256, windows=16)
    reference = load_model(checkpoint)
    hidden = evaluation.hidden_states(reference, sequences)
    files = {}
    for name, path in paths.items():
        scores = score_file(path, checkpoint, sequences, reference=reference, hidden=hidden)
        files[name] = {"file": str(path)} | evaluation.summarize(scores, sequences) | _facts(path)
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
