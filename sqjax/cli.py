"""The command line: arguments in, tables or one JSON object out; everything else goes to standard error."""

import contextlib
import functools
import json as json_format
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sqjax import display
from sqjax.commands import (
    Allow,
    InFile,
    Json,
    Model,
    Result,
    Shown,
    Text,
    baselines,
    calibrate,
    convert,
    make,
    quantize,
    refine,
    sweep,
)
from sqjax.run import InputError, interruptible

_EPILOGUE = "MODEL: Hugging Face folder, hub id or GGUF file. TEXT: .txt, .jsonl, a folder of them, or a data set id."


# ---------------------------------------------------------------------------------------------------------------------
# The commands that look at files and models


def inspect(file: InFile, json: Json = False) -> Shown:
    """Show types, sizes, bits per weight, SHA-256 and metadata of a GGUF file.

    Args:
        file: GGUF file of any architecture
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.inspect(file), json, display.inspection_table


def evaluate(
    file: InFile,
    reference: Annotated[str, tyro.conf.arg(metavar="MODEL")],
    text: Text = (),
    length: int = 512,
    windows: int | None = None,
    runtime: Literal["jax", "llama.cpp"] = "jax",
    dtype: Literal["f32", "bf16"] = "f32",
    calibration: Text = (),
    allow_overlap: Allow = False,
    seed: int = 0,
    json: Json = False,
) -> Shown:
    """Measure what a GGUF file lost against the model it was made from.

    Args:
        file: GGUF file of any type; it is read back and dequantized, or run in llama.cpp
        reference: the model that it was made from
        text: what to score, may be given several times; the suite heldout120 unless given
        length: tokens of a window; conversations are scored whole
        windows: score the first so many windows (and conversations); all unless given
        runtime: where both are run
        dtype: of the matrices in JAX
        calibration: further text that the file was made on, where that is not beside it; refused where it is evaluated
        allow_overlap: measure on text that the file was made on all the same; the result says so
        seed: of the bootstrap
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline, sources

    result = pipeline.evaluate(
        file,
        reference=reference,
        text=text or sources.DEFAULT_SUITE,
        length=length,
        windows=windows,
        runtime=runtime,
        dtype=dtype,
        calibration=calibration,
        allow_overlap=allow_overlap,
        seed=seed,
    )
    return result, json, lambda result: display.evaluation_table({Path(file).name: result})


def compare(
    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE.gguf")],
    reference: Annotated[str, tyro.conf.arg(metavar="MODEL")],
    text: Text = (),
    out_of_domain: Text = (),
    out: Path | None = None,
    length: int = 512,
    windows: int | None = None,
    runtime: Literal["jax", "llama.cpp", "both"] = "jax",
    dtype: Literal["f32", "bf16"] = "f32",
    groups: Literal["none", "kinds", "layers", "tensors"] = "none",
    disagreements: int = 12,
    calibration: Text = (),
    allow_overlap: Allow = False,
    statistics: Path | None = None,
    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = (),
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    seed: int = 0,
    json: Json = False,
) -> Shown:
    """Put files side by side: what each lost, on each text, and how much of plain rounding's loss it recovers.

    Args:
        files: GGUF files of any type, Hugging Face folders or hub ids
        reference: the model that they were made from
        text: a suite or NAME=TEXT (NAME-64x256 is 64 windows of 256 tokens), may be given several times
        out_of_domain: a suite unlike the calibration text, may be given several times
        out: folder for the report
        length: tokens of a window; conversations are scored whole
        windows: score the first so many windows (and conversations) of each suite; all unless given
        runtime: where models are run
        dtype: of the matrices in JAX
        groups: quantize only one group at a time, and measure what it contributes
        disagreements: how many of the largest are shown for each file
        calibration: further text that files were made on, where that is not beside them; refused in a suite
        allow_overlap: measure on text that a file was made on all the same; the result says so
        statistics: folder that calibrate wrote, for spectra in the report
        run: folder that refine wrote, for curves in the report; may be given several times
        fresh: score again what is kept from before
        seed: of the bootstrap
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    result = pipeline.compare(
        files,
        reference=reference,
        text=text or None,
        out_of_domain=out_of_domain,
        out=out,
        length=length,
        windows=windows,
        runtime=runtime,
        dtype=dtype,
        groups=groups,
        disagreements=disagreements,
        calibration=calibration,
        allow_overlap=allow_overlap,
        statistics=statistics,
        run=run,
        fresh=fresh,
        seed=seed,
    )
    return result, json, display.comparison_table


def publish(
    file: InFile,
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")],
    reference: Annotated[str, tyro.conf.arg(metavar="MODEL")],
    out: Path = Path("runs/release"),
    other: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FILE.gguf")] = (),
    text: Text = (),
    c4: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    out_of_domain: Text = (),
    length: int = 512,
    windows: int | None = None,
    runtime: Literal["jax", "llama.cpp", "both"] = "jax",
    calibration: Text = (),
    allow_overlap: Allow = False,
    licence: str | None = None,
    upload: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json: Json = False,
) -> Shown:
    """Write a release, file, model card and report, into a folder; --upload sends it to a hub repository.

    Args:
        file: the GGUF file to release
        repository: on the hub
        reference: the model that the file was made from
        out: folder for what is, or would be, uploaded
        other: a file to compare with, may be given several times
        text: a suite, as of compare; convergence60, heldout120 and, where it can be had, c4-64x256 unless given
        c4: C4 validation text for the suite c4-64x256; from the hub unless given
        out_of_domain: a suite unlike the calibration text, as of compare
        length: tokens of a window
        windows: score the first so many of each suite; all unless given
        runtime: where models are run
        calibration: further text that the file was made on, where that is not beside it; refused where it is evaluated
        allow_overlap: measure on text that the file was made on all the same; the result says so
        licence: for the card; what the file states unless given
        upload: create the repository and upload
        private: make a new repository a private one
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    result = pipeline.publish(
        file,
        repository=repository,
        reference=reference,
        out=out,
        others=other,
        text=text or None,
        c4=c4,
        out_of_domain=out_of_domain,
        length=length,
        windows=windows,
        runtime=runtime,
        calibration=calibration,
        allow_overlap=allow_overlap,
        licence=licence,
        upload=upload,
        private=private,
    )
    return result, json, display.release_table


def plan(
    model: Model,
    topology: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KIND:SHAPE")] = (),
    length: int = 2048,
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json: Json = False,
) -> Shown:
    """Say what every stage needs of a device: bytes, whether it fits, the batch to take, the least time.

    Args:
        model: config.json, Hugging Face folder, hub id, GGUF file, or qwen3.5-0.8b, -2b, -4b, -9b, -27b
        topology: v5e:2x4, v6e:2x4, v5p:2x2x1, h100:8, h200:1 and the like, may be given several times; all five unless
            given
        length: tokens of a window
        compile: ask the TPU's own compiler (sqjax[tpu-compile]) for the bytes; takes minutes
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    result = pipeline.plan(model, topology=topology or pipeline.TOPOLOGIES, length=length, compile=compile)
    return result, json, display.plan_table


def demo(out: str = "runs/demo", json: Json = False) -> Shown:
    """Run the pipeline on the embedded model.

    Args:
        out: folder for the files
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.demo(out), json, display.demo_table


COMMANDS: dict[str, Callable[..., Shown]] = {
    "demo": demo,
    "convert": convert,
    "calibrate": calibrate,
    "quantize": quantize,
    "refine": refine,
    "evaluate": evaluate,
    "compare": compare,
    "baselines": baselines,
    "publish": publish,
    "inspect": inspect,
    "plan": plan,
    "make": make,
    "sweep": sweep,
}


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _print(result: Result, as_json: bool, table: Callable[[Result], Any]) -> None:
    if as_json:
        # NaN and infinity are no JSON: a result that holds one is a fault of ours and must not pass silently.
        print(json_format.dumps(result, allow_nan=False), flush=True)
        return
    from rich.console import Console

    # A table in a file or a pipe must not be cut to the width of a terminal that is not there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table(result))


# ---------------------------------------------------------------------------------------------------------------------
# Entry


def _keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in the user's cache, so that a command starts quickly the second time."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqjax" / "compiled"
    # JAX reads these when it is imported, which happens inside the commands.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def _quietly(command: Callable[..., Shown]) -> Callable[..., Shown]:
    """Sends what a command and its libraries print to standard error: standard output is for the result."""

    @functools.wraps(command)
    def run(*arguments, **options):
        with contextlib.redirect_stdout(sys.stderr):
            return command(*arguments, **options)

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0 when done, 1 when the input is at fault, 130 when interrupted.

    Raises:
      SystemExit: with 2 on wrong usage, with 0 after help.
    """
    _keep_compiled_programs()
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        from sqjax import mesh

        mesh.connect()
    commands = {name: _quietly(command) for name, command in COMMANDS.items()}
    try:
        with interruptible():
            shown = tyro.extras.subcommand_cli_from_dict(commands, prog="sqjax", args=arguments, description=_EPILOGUE)
        _print(*shown)
    except InputError as error:
        print(f"sqjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sqjax: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
