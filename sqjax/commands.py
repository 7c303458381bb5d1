"""The commands that make files: each returns its result and how to show it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sqjax import display

Result = dict[str, Any]
# A result, whether it is printed as JSON, and what makes a table of it.
Shown = tuple[Result, bool, Callable[[Result], Any]]
Text = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
InFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.gguf")]
OutFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.gguf")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Allow = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def convert(model: Model, out: OutFile, type: Literal["f32", "bf16", "q4_k"] = "q4_k", json: Json = False) -> Shown:
    """Write a checkpoint as GGUF; q4_k is llama.cpp's plain rounding, pure.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out: file to write
        type: of every matrix
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.convert(model, out, type=type), json, display.file_table


def calibrate(
    model: Model,
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")],
    text: Text = (),
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 8,
    shard: int = 1,
    passes: int = 1,
    chunk: int = 1024,
    dtype: Literal["auto", "f32", "bf16"] = "auto",
    seed: int = 0,
    imatrix: str | None = None,
    json: Json = False,
) -> Shown:
    """Measure the input and output Grams of every matrix; an interrupted run goes on where it stopped.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out_dir: folder for the statistics
        text: what to measure on, may be given several times; the suite calib360 unless given
        tokens: about how many tokens of it
        length: tokens of a window
        batch: windows at a time, over all devices
        shard: devices that share one copy of the weights and Grams
        passes: over the text, each for some of the matrices, where not all Grams fit at once
        chunk: tokens whose logits a device holds at a time
        dtype: of the matrices; auto takes f32 on CPU, else bf16
        seed: of the order of documents and of the labels drawn from the model
        imatrix: also write the importance matrix to this file, in llama.cpp's GGUF format
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline, sources

    result = pipeline.calibrate(
        model,
        out_dir,
        text=text or sources.CALIBRATION_SUITE,
        tokens=tokens,
        length=length,
        batch=batch,
        shard=shard,
        passes=passes,
        chunk=chunk,
        dtype=dtype,
        seed=seed,
        imatrix=imatrix,
    )
    return result, json, display.record_table


def quantize(
    model: Model,
    out: OutFile,
    recipe: str = "spectral",
    statistics: str | None = None,
    text: Text = (),
    tokens: int = 1_000_000,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = (),
    seed: int = 0,
    json: Json = False,
) -> Shown:
    """Write a pure Q4_K_M file of the size of llama.cpp's, rounded by a recipe.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out: file to write; its provenance goes beside it
        recipe: name of a recipe (rtn, imatrix, gptq, spectral) or path of a TOML file
        statistics: folder that calibrate wrote; measured from the text unless given
        text: what to calibrate on, may be given several times; the suite calib360 unless given
        tokens: about how many tokens of it
        set: override a setting of the recipe, may be given several times
        seed: of the calibration
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    result = pipeline.quantize(
        model, out, recipe=recipe, statistics=statistics, text=text or None, tokens=tokens, settings=set, seed=seed
    )
    return result, json, display.file_table


def refine(
    model: Model,
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN.gguf")],
    out: OutFile,
    text: Text = (),
    tokens: int = 1_000_000,
    run: str | None = None,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = (),
    allow_overlap: Allow = False,
    seed: int = 0,
    json: Json = False,
) -> Shown:
    """Distil the model into a Q4_K file of it, at the same size.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        file: pure Q4_K file to start from
        out: file to write; its provenance goes beside it
        text: what to distil on, may be given several times; the suite calib360 unless given
        tokens: how many tokens to distil on; shorter text is read several times
        run: folder for checkpoints and metrics; OUT.gguf.run unless given
        resume: go on with an interrupted run
        set: override a setting of configs/refine.toml, may be given several times
        allow_overlap: watch text that the file was calibrated or is refined on all the same
        seed: of the order of the text
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline, sources

    result = pipeline.refine(
        model,
        file,
        out,
        text=text or sources.CALIBRATION_SUITE,
        tokens=tokens,
        run=run,
        resume=resume,
        settings=set,
        allow_overlap=allow_overlap,
        seed=seed,
    )
    return result, json, display.file_table


def baselines(
    model: Model,
    out_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")],
    imatrix: Path | None = None,
    statistics: Path | None = None,
    text: Text = (),
    tokens: int = 1_000_000,
    seed: int = 0,
    json: Json = False,
) -> Shown:
    """Write pure Q4_K_M files through ggml's own code, without and with an importance matrix, to compare with.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out_dir: folder for the files
        imatrix: importance matrix in llama.cpp's GGUF format; measured unless given
        statistics: folder that calibrate wrote, to take it from
        text: what to measure on, may be given several times; the suite calib360 unless given
        tokens: about how many tokens of it
        seed: of the order of documents
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline, sources

    result = pipeline.baselines(
        model,
        out_dir,
        imatrix=imatrix,
        statistics=statistics,
        text=text or sources.CALIBRATION_SUITE,
        tokens=tokens,
        seed=seed,
    )
    return result, json, display.files_table


def make(
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    model: Model,
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")],
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TABLE.KEY=VALUE")] = (),
    json: Json = False,
) -> Shown:
    """Calibrate, quantize, refine and evaluate as a config says; stages that are done are skipped.

    Args:
        config: name of a whole plan in configs/ (demo, nano34, qwen3.5-0.8b, ...) or path of a TOML file
        model: Hugging Face folder, hub id or GGUF file
        out_dir: folder for every stage's output
        set: override a setting of the plan, may be given several times
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.make(config, model, out_dir, settings=set), json, display.made_table


def sweep(
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.toml")],
    model: str | None = None,
    workers: int | None = None,
    storage: str | None = None,
    out: str | None = None,
    best: str | None = None,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TABLE.KEY=VALUE")] = (),
    verify: bool = True,
    json: Json = False,
) -> Shown:
    """Search the settings of a plan; the same command goes on with it, and shares it between hosts.

    Args:
        config: name of a sweep in configs/sweeps/ or path of a TOML file
        model: what is quantized; the config's model, else the embedded one, unless given
        workers: processes on this host; one a device unless given
        storage: sqlite:///FILE or postgresql://HOST/NAME; OUT/study.db unless given
        out: folder for statistics, results and figures; runs/NAME unless given
        best: write the winning recipe to this TOML file
        set: override a setting of the config, may be given several times
        verify: write the winner's file and measure it on text that no trial has seen
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    result = pipeline.sweep(
        config, model=model, workers=workers, storage=storage, out=out, best=best, settings=set, verify=verify
    )
    return result, json, display.sweep_table
