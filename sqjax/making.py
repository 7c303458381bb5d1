"""Stages that make files: statistics, rounded and refined GGUF; artifact in, artifact out."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from sqjax import calibration, distillation, gguf_file, run_folder
from sqjax import mesh as meshes
from sqjax.measuring import prepare
from sqjax.quantizer import Recipe
from sqjax.quantizer import quantize as rounded
from sqjax.refinement import Refinement
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
    gguf_file.write_gguf(out, open_model(model), file_type=type)
    return {"file": str(out)} | file_facts(out) | {"seconds": time.monotonic() - start}


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
      seed: of the order of documents and of the labels drawn from the model.
      imatrix: also write the importance matrix to this file, in llama.cpp's GGUF format.

    Raises:
      InputError: one of them cannot be read, or the folder holds an unfinished run with other settings.
    """
    start = time.monotonic()
    checkpoint = open_model(model)
    sharing = {"batch": batch, "shard": shard, "passes": passes, "chunk": chunk}
    statistics, about = _measure(checkpoint, text, Path(out), tokens, length, seed, **sharing)
    if imatrix is not None and meshes.is_first():
        calibration.write_imatrix(imatrix, statistics, checkpoint.config, str(about["text"]))
    result = {"folder": str(out)} | about | {"tokens": statistics.tokens}
    return result | usage() | {"seconds": time.monotonic() - start}


def _measure(checkpoint, text, folder, tokens, length, seed, **sharing) -> tuple[Statistics, dict[str, Any]]:
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
            seed=seed,
            **sharing,
            progress=report,
        )
    return statistics, about | {"windows_sha256": calibration.digest(windows_WT)}


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
    measured, about = None, {}
    if chosen.needs_statistics and statistics is not None:
        measured, about = calibration.load(statistics)
        calibration.check_model(measured, checkpoint.config)
    elif chosen.needs_statistics:
        folder = Path(f"{out}.statistics")
        measured, about = _measure(checkpoint, text or CALIBRATION_SUITE, folder, tokens, 512, seed)
    with progress(f"rounding by {Path(recipe).stem}") as report:
        tensors = rounded(checkpoint.config, checkpoint.tensors, measured, chosen, report)
    written = {name: jax.tree.map(np.asarray, tensor) for name, tensor in tensors.items()}
    made = {"recipe": Path(recipe).stem, "settings": dataclasses.asdict(chosen), "calibration": about, "seed": seed}
    if meshes.is_first():
        story = {"model": checkpoint.name} | made | usage() | {"seconds": time.monotonic() - start}
        gguf_file.write_gguf(out, checkpoint, written, file_type="q4_k", provenance=story)
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
    chosen = read_settings(Refinement, find_config("refine", "refinement"), settings)
    checkpoint, begin = open_model(model), gguf_file.read_gguf(file)
    sources = [text] if isinstance(text, str | Path) else list(text)
    windows_WT = calibration.calibration_windows(
        open_texts(sources, seed=seed), checkpoint.tokenizer, chosen.length, tokens
    )
    folder = Path(f"{out}.run" if run is None else run)
    made = {"model": checkpoint.name, "text": [Path(source).name for source in sources], "tokens": tokens}
    made |= {"start_sha256": sha256(file), "windows_sha256": calibration.digest(windows_WT), "seed": seed}
    made |= {"settings": dataclasses.asdict(chosen)}
    if meshes.is_first():
        run_folder.claim(folder, made, resume=resume)
    meshes.wait_for_all("claimed")
    watched = None
    if chosen.watch != "heldout":
        watched = prepare(checkpoint, chosen.watch, length=chosen.length, windows=chosen.watch_windows or None)
    loop = distillation.prepare(checkpoint, begin, windows_WT, watched, settings=chosen, tokens=tokens, seed=seed)
    with progress("refining") as report:
        tensors, position = distillation.distill(loop, folder, resume=resume, progress=report)
    if meshes.is_first():
        # A refined file was calibrated too: its story goes on where that of its start ends.
        story = made | dataclasses.asdict(position) | {"start": gguf_file.inspect(file)["provenance"]}
        story |= usage() | {"seconds": time.monotonic() - start}
        gguf_file.write_gguf(out, begin, tensors, file_type="q4_k", provenance=story)
    meshes.wait_for_all("written")
    result = {"file": str(out)} | file_facts(out) | made | dataclasses.asdict(position)
    result |= usage() | {"seconds": time.monotonic() - start}
    if meshes.is_first():
        run_folder.finish(folder, result)
    return result
