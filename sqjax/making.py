"""Stages that make files: statistics, rounded and refined GGUF; artifact in, artifact out."""

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int32

from sqjax import calibration, distillation, fingerprints, gguf_file, programs, run_folder, updates
from sqjax import mesh as meshes
from sqjax.checkpoint import Checkpoint
from sqjax.evaluation import Sequences
from sqjax.fingerprints import Prints, Seen
from sqjax.measuring import look_up, prepare, seen_by
from sqjax.quantizer import Recipe
from sqjax.quantizer import quantize as rounded
from sqjax.refinement import Refinement, dtype_of
from sqjax.run import progress, sha256
from sqjax.settings import read_settings
from sqjax.sources import CALIBRATION_SUITE, Sources, file_facts, find_config, load_model, open_model, open_texts, usage
from sqjax.statistics import Statistics

FileType = Literal["f32", "bf16", "q4_k"]


def convert(model: str | Path, out: str | Path, *, type: FileType = "q4_k") -> dict[str, Any]:
    """Writes a checkpoint as GGUF; q4_k is llama.cpp's plain rounding, pure.

    Returns what `inspect` says of the file, without its metadata, and `file` and `seconds`.

    Raises:
      InputError: the model cannot be read, or the file cannot be written.
    """
    start = time.monotonic()
    checkpoint = open_model(model)
    made = {"model": checkpoint.name, "recipe": "plain rounding" if type == "q4_k" else "none"}
    # A file in another form has seen what it had seen; a checkpoint counts as the original.
    _write(out, checkpoint, None, type, made, seen_by(model) if Path(model).is_file() else Seen())
    return {"file": str(out)} | file_facts(out) | {"seconds": time.monotonic() - start}


def _write(out, checkpoint, tensors, file_type: FileType, made: dict[str, Any], seen: Seen) -> None:
    """Writes a file, and before it the hashes of what it was made on: its record must not be there without them."""
    provenance = made | {"seen": fingerprints.write_beside(out, seen)}
    gguf_file.write_gguf(out, checkpoint, tensors, file_type=file_type, provenance=provenance)


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    text: Sources = CALIBRATION_SUITE,
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 8,
    shard: int = 1,
    passes: int = 1,
    chunk: int = 1024,
    dtype: Literal["auto", "f32", "bf16"] = "auto",
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
      batch: windows at a time, over all devices.
      shard: devices that share one copy of the weights and Grams; the others multiply the batch.
      passes: over the text, each for some of the matrices, where not all Grams fit at once.
      chunk: tokens whose logits a device holds at a time.
      dtype: of the matrices and of what they multiply; auto takes f32 on CPU, else bf16. Sums are float32 in either.
      seed: of the order of documents and of the labels drawn from the model.
      imatrix: also write the importance matrix to this file, in llama.cpp's GGUF format.

    Raises:
      InputError: one of them cannot be read, or the folder holds an unfinished run with other settings.
    """
    start = time.monotonic()
    checkpoint = open_model(model)
    sharing = {"batch": batch, "shard": shard, "passes": passes, "chunk": chunk}
    statistics, about, _ = _measure(checkpoint, text, Path(out), tokens, length, seed, dtype, **sharing)
    if imatrix is not None and meshes.is_first():
        calibration.write_imatrix(imatrix, statistics, checkpoint.config, str(about["text"]))
    result = {"folder": str(out)} | about | {"tokens": statistics.tokens}
    return result | usage() | {"seconds": time.monotonic() - start}


def _measure(
    checkpoint, text, folder, tokens, length, seed, dtype="auto", **sharing
) -> tuple[Statistics, dict[str, Any], Seen]:
    sources = [text] if isinstance(text, str | Path) else list(text)
    texts = open_texts(sources, seed=seed)
    windows_WT, prints = calibration.calibration_windows(texts, checkpoint.tokenizer, length, tokens)
    dtype = dtype_of(dtype)
    about = {"model": checkpoint.name, "text": [Path(source).name for source in sources], "length": length}
    about["dtype"] = dtype
    with progress("calibrating") as report:
        statistics = calibration.calibrate(
            checkpoint.config,
            load_model(checkpoint, dtype=dtype),
            windows_WT,
            folder,
            about=about,
            prints=prints,
            seed=seed,
            **sharing,
            progress=report,
        )
    return statistics, about | {"windows_sha256": calibration.digest(windows_WT)}, Seen(prints)


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by its name in configs/ or by its path, with `key=value` overrides.

    Raises:
      InputError: there is no such recipe, or a setting is wrong.
    """
    return read_settings(Recipe, find_config(name), overrides)


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
    measured, about, seen = None, {}, Seen()
    if chosen.needs_statistics and statistics is not None:
        measured, about = calibration.load(statistics)
        calibration.check_model(measured, checkpoint.config)
        seen = calibration.seen_by(statistics, about)
        about = {key: value for key, value in about.items() if key != "seen"}
    elif chosen.needs_statistics:
        folder = Path(f"{out}.statistics")
        measured, about, seen = _measure(checkpoint, text or CALIBRATION_SUITE, folder, tokens, 512, seed)
    with progress(f"rounding by {Path(recipe).stem}") as report:
        tensors = rounded(checkpoint.config, checkpoint.tensors, measured, chosen, report)
    written = {name: jax.tree.map(np.asarray, tensor) for name, tensor in tensors.items()}
    made = {"recipe": Path(recipe).stem, "settings": dataclasses.asdict(chosen), "calibration": about, "seed": seed}
    if meshes.is_first():
        story = {"model": checkpoint.name} | made | usage() | {"seconds": time.monotonic() - start}
        _write(out, checkpoint, written, "q4_k", story, seen)
    meshes.wait_for_all("written")
    return {"file": str(out)} | file_facts(out) | made | usage() | {"seconds": time.monotonic() - start}


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
    allow_overlap: bool = False,
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
      allow_overlap: watch text that the file was calibrated on, or that it is refined on, all the same.
      seed: of the order of the text.

    Raises:
      InputError: one of them cannot be read, they do not belong together, the folder holds another run, or the file was
        made on what is watched.
    """
    start = time.monotonic()
    chosen = read_settings(Refinement, find_config("refine", "refinement"), settings).planned(tokens)
    checkpoint, begin = open_model(model), gguf_file.read_gguf(file)
    sources = [text] if isinstance(text, str | Path) else list(text)
    texts, mesh = open_texts(sources, seed=seed), meshes.create(chosen.shard)
    update = programs.update(checkpoint.config, mesh, updates.fitted(checkpoint.config, chosen))
    folder = Path(f"{out}.run" if run is None else run)
    made = {"model": checkpoint.name, "text": [Path(source).name for source in sources], "tokens": tokens}
    made |= {"start_sha256": sha256(file), "seed": seed, "settings": dataclasses.asdict(chosen)}
    before = seen_by(file)
    with ThreadPoolExecutor(1) as pool:
        # The update of a large model is compiled for as long as it takes to encode its text.
        pool.submit(update.compile)
        windows_WT, prints = calibration.calibration_windows(texts, checkpoint.tokenizer, chosen.length, tokens)
        made |= {"windows_sha256": calibration.digest(windows_WT)}
        windows_WT, watched = watch_of(checkpoint, chosen, windows_WT, before, prints, allow=allow_overlap)
        if meshes.is_first():
            run_folder.claim(folder, made, resume=resume)
        meshes.wait_for_all("claimed")
        loop = distillation.prepare(checkpoint, begin, windows_WT, watched, settings=chosen, seed=seed)
    with progress("refining") as report:
        tensors, position = distillation.distill(loop, folder, resume=resume, progress=report)
    if meshes.is_first():
        # A refined file was calibrated too: its story goes on where that of its start ends.
        story = made | dataclasses.asdict(position) | {"start": gguf_file.inspect(file)["provenance"]}
        story |= usage() | {"seconds": time.monotonic() - start}
        _write(out, begin, tensors, "q4_k", story, before | Seen(prints))
    meshes.wait_for_all("written")
    result = {"file": str(out)} | file_facts(out) | made | dataclasses.asdict(position)
    result |= usage() | {"seconds": time.monotonic() - start}
    if meshes.is_first():
        run_folder.finish(folder, result)
    return result


def watch_of(
    checkpoint: Checkpoint,
    settings: Refinement,
    windows_WT: Int32[np.ndarray, "W T"],
    before: Seen,
    prints: Prints,
    *,
    allow: bool = False,
) -> tuple[Int32[np.ndarray, "W T"], Sequences]:
    """Returns the windows that are trained on and the text by which the best state is chosen, which must be others.

    Args:
      checkpoint: the teacher.
      settings: what to watch: windows that are held out, or another text.
      windows_WT: of the text of refinement.
      before: what the file that is refined was made on.
      prints: hashes of the windows.
      allow: take text that the file was made on, or is refined on, all the same.

    Raises:
      InputError: the watched text cannot be read, or is text of calibration or refinement.
    """
    if settings.watch == "heldout":
        windows_WT, watched = distillation.hold_out(windows_WT, settings.watch_windows)
        known = {"the file that is refined": before}
    else:
        watched = prepare(checkpoint, settings.watch, length=settings.length, windows=settings.watch_windows or None)
        known = {"the file that is refined": before, "the refined file": Seen(prints)}
    if not allow:
        name, remedy = Path(settings.watch).name, "--set watch=TEXT to other text, or --allow-overlap"
        look_up(known, {f"{name}, which is watched,": watched}, checkpoint.tokenizer, remedy=remedy)
    return windows_WT, watched
