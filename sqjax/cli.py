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

from sqjax.run import InputError

Result = dict[str, Any]
# A result, whether it is printed as JSON, and what makes a table of it.
Shown = tuple[Result, bool, Callable[[Result], Any]]
Text = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
InFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.gguf")]
OutFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.gguf")]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff]

MIB = 1 << 20
_EPILOGUE = "MODEL: Hugging Face folder, hub id or GGUF file. TEXT: .txt, .jsonl, a folder of them, or a data set id."


# ---------------------------------------------------------------------------------------------------------------------
# Commands: each returns its result and how to show it


def convert(model: Model, out: OutFile, type: Literal["f32", "bf16", "q4_k"] = "q4_k", json: Json = False) -> Shown:
    """Write a checkpoint as GGUF; q4_k is llama.cpp's plain rounding, pure.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out: file to write
        type: of every matrix
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.convert(model, out, type=type), json, _file_table


def inspect(file: InFile, json: Json = False) -> Shown:
    """Show types, sizes, bits per weight, SHA-256 and metadata of a GGUF file.

    Args:
        file: GGUF file of any architecture
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.inspect(file), json, _inspection_table


def evaluate(
    file: InFile,
    reference: Annotated[str, tyro.conf.arg(metavar="MODEL")],
    text: Text = (),
    length: int = 512,
    windows: int | None = None,
    runtime: Literal["jax", "llama.cpp"] = "jax",
    dtype: Literal["f32", "bf16"] = "f32",
    calibration: Text = (),
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
        calibration: text that the file was made with; refused where it is evaluated too
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
        seed=seed,
    )
    return result, json, lambda result: _evaluation_table({file.name: result})


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
        text: a suite, or NAME=TEXT, may be given several times; heldout120 and convergence60 unless given.
            NAME-64x256 is cut into 64 windows of 256 tokens; c4-64x256 alone is read from the hub
        out_of_domain: a suite unlike the calibration text, may be given several times
        out: folder for the report
        length: tokens of a window; conversations are scored whole
        windows: score the first so many windows (and conversations) of each suite; all unless given
        runtime: where models are run
        dtype: of the matrices in JAX
        groups: quantize only one group at a time, and measure what it contributes
        disagreements: how many of the largest are shown for each file
        calibration: text that files were made with; refused where it is evaluated too
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
        statistics=statistics,
        run=run,
        fresh=fresh,
        seed=seed,
    )
    return result, json, _comparison_table


def calibrate(
    model: Model,
    out_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")],
    text: Text = (),
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 8,
    seed: int = 0,
    imatrix: Path | None = None,
    json: Json = False,
) -> Shown:
    """Measure the input and output Grams of every matrix; an interrupted run goes on where it stopped.

    Args:
        model: Hugging Face folder, hub id or GGUF file
        out_dir: folder for the statistics
        text: what to measure on, may be given several times; the suite calib360 unless given
        tokens: about how many tokens of it
        length: tokens of a window
        batch: windows at a time
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
        seed=seed,
        imatrix=imatrix,
    )
    return result, json, _record_table


def quantize(
    model: Model,
    out: OutFile,
    recipe: str = "spectral",
    statistics: Path | None = None,
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
    return result, json, _file_table


def refine(
    model: Model,
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN.gguf")],
    out: OutFile,
    text: Text = (),
    tokens: int = 1_000_000,
    run: Path | None = None,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = (),
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
        seed=seed,
    )
    return result, json, _file_table


def demo(out: Path = Path("runs/demo"), json: Json = False) -> Shown:
    """Run the pipeline on the embedded model.

    Args:
        out: folder for the files
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.demo(out), json, lambda result: _evaluation_table(result["files"])


COMMANDS: dict[str, Callable[..., Shown]] = {
    "demo": demo,
    "convert": convert,
    "calibrate": calibrate,
    "quantize": quantize,
    "refine": refine,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
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


def _new_table(title: str, *columns: str, justify: str = "right") -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify=justify, overflow="fold")
    return table


def _file_table(result: Result) -> Any:
    table = _new_table(result["file"], "", "", justify="left")
    for key, shown in (
        ("types", ", ".join(f"{count} {kind}" for kind, count in result["types"].items())),
        ("bytes", f"{result['file_bytes']:,} (tensors {result['tensor_bytes']:,})"),
        ("bits per weight", f"{result['bits_per_weight']:.4f}"),
        ("parameters", f"{result['parameters']:,}"),
        ("SHA-256", result["sha256"]),
    ):
        table.add_row(key, shown)
    return table


def _record_table(result: Result) -> Any:
    table = _new_table(result["folder"], "", "", justify="left")
    for key, value in result.items():
        if key != "folder" and value is not None:
            table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def _inspection_table(result: Result) -> Any:
    table = _file_table(result)
    table.add_section()
    for key, value in result["metadata"].items():
        shown = f"{value['length']:,} entries" if isinstance(value, dict) else str(value)
        table.add_row(key, shown if len(shown) <= 60 else shown[:57] + "...")
    return table


def _evaluation_table(files: dict[str, Result]) -> Any:
    """One row a file, and one for each of its domains and roles; an interval is shown as half its width."""
    columns = ("", "tokens", "KL", "±", "p99", "top-1", "loss", "gap", "±", "bpw", "MiB")
    table = _new_table("KL divergence and loss in nats per token, intervals at 95%", *columns)
    for name, result in files.items():
        table.add_row(
            name, *_metrics_row(result), f"{result['bits_per_weight']:.2f}", f"{result['file_bytes'] / MIB:.1f}"
        )
        for part, metrics in (result.get("domains", {}) | result.get("roles", {})).items():
            table.add_row(f"  {part}", *_metrics_row(metrics), "", "")
    return table


def _comparison_table(result: Result) -> Any:
    """One row a file, smallest divergence first; of each suite the loss, and KL where it is out of domain."""
    from rich.console import Group

    suites = result["suites"]
    outside = [name for name, suite in suites.items() if suite["out_of_domain"]]
    columns = ("", "bpw", "MiB", "KL", "±", "over plain", "recovery", "top-1", *(f"loss {name}" for name in suites))
    table = _new_table(f"against {result['reference']}; nats per token, intervals at 95%", *columns, "KL out of domain")
    facts = result["reference_facts"]
    losses = [f"{suite['cross_entropy']:.4f}" for suite in facts["suites"].values()]
    size = (f"{facts['bits_per_weight']:.2f}", f"{facts['file_bytes'] / MIB:.1f}")
    table.add_row("reference", *size, "0", "", "", "", "", *losses, "")
    files = result["files"] | {result["baseline"]["name"]: result["baseline"]}
    for name, file in sorted(files.items(), key=lambda item: item[1]["kl"]):
        recovery, ratio = file["recovery"], file["difference_from_plain"]["ratio"]
        shown = recovery["label"] if recovery["value"] is None else f"{recovery['value']:.1%}"
        table.add_row(
            name if name in result["files"] else f"{name} (made here)",
            *(f"{file['bits_per_weight']:.2f}", f"{file['file_bytes'] / MIB:.1f}", f"{file['kl']:.5f}"),
            f"{(file['kl_interval'][1] - file['kl_interval'][0]) / 2:.5f}",
            "" if ratio is None else f"{ratio:.3f}",
            "fits the data" if recovery["label"] == "fits the data" else shown,
            f"{file['top1']:.2%}",
            *(f"{suite['cross_entropy']:.4f}" for suite in file["suites"].values()),
            ", ".join(f"{file['suites'][suite]['kl']:.5f} {suite}" for suite in outside) or "none given",
        )
    pages = [f"{kind}: {path}" for kind, path in result.get("report", {}).items() if kind in ("html", "markdown")]
    return Group(table, *pages)


def _metrics_row(metrics: Result) -> list[str]:
    half = {name: (metrics[name][1] - metrics[name][0]) / 2 for name in ("kl_interval", "gap_interval")}
    return [
        f"{metrics['tokens']:,}",
        f"{metrics['kl']:.5f}",
        f"{half['kl_interval']:.5f}",
        f"{metrics['kl_p99']:.3f}",
        f"{metrics['top1']:.2%}",
        f"{metrics['cross_entropy']:.4f}",
        f"{metrics['gap']:+.4f}",
        f"{half['gap_interval']:.4f}",
    ]


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
    commands = {name: _quietly(command) for name, command in COMMANDS.items()}
    try:
        _print(*tyro.extras.subcommand_cli_from_dict(commands, prog="sqjax", args=arguments, description=_EPILOGUE))
    except InputError as error:
        print(f"sqjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sqjax: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
