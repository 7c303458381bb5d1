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
InFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.gguf")]
OutFile = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.gguf")]
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
    return result, json, lambda result: _evaluation_table({Path(file).name: result})


def calibrate(
    model: Model,
    out_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT_DIR")],
    text: Text = (),
    tokens: int = 1_000_000,
    length: int = 512,
    batch: int = 8,
    shard: int = 1,
    passes: int = 1,
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
        seed=seed,
        imatrix=imatrix,
    )
    return result, json, _record_table


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
    return result, json, _file_table


def refine(
    model: Model,
    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN.gguf")],
    out: OutFile,
    text: Text = (),
    tokens: int = 1_000_000,
    run: str | None = None,
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
    return result, json, _plan_table


def demo(out: str = "runs/demo", json: Json = False) -> Shown:
    """Run the pipeline on the embedded model.

    Args:
        out: folder for the files
        json: print one JSON object and nothing else
    """
    from sqjax import pipeline

    return pipeline.demo(out), json, lambda result: _evaluation_table(result["files"])


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

    return pipeline.make(config, model, out_dir, settings=set), json, _made_table


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
    return result, json, _sweep_table


COMMANDS: dict[str, Callable[..., Shown]] = {
    "demo": demo,
    "convert": convert,
    "calibrate": calibrate,
    "quantize": quantize,
    "refine": refine,
    "evaluate": evaluate,
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


def _plan_table(result: Result) -> Any:
    columns = ("", "stage", "fits", "shard", "batch", "passes", "GB a device", "from", "least time", "bound by")
    table = _new_table(f"{result['model']}: what a device holds, and the least time of each stage", *columns)
    for topology, rows in result["plans"].items():
        for row in rows:
            if row["fits"]:
                fits, time = "yes", f"{row['seconds']:.1f} s"
            else:
                fits, time = f"from {row['needs']}" if row.get("needs") else "no", ""
            cells = (row.get("shard"), row.get("batch"), row.get("passes"))
            shown = ["" if cell is None else str(cell) for cell in cells]
            source = (f"{row['bytes'] / 1e9:.1f}", row["source"])
            table.add_row(topology, row["stage"], fits, *shown, *source, time, row.get("bound", ""))
        table.add_section()
    return table


def _inspection_table(result: Result) -> Any:
    table = _file_table(result)
    table.add_section()
    for key, value in result["metadata"].items():
        shown = f"{value['length']:,} entries" if isinstance(value, dict) else str(value)
        table.add_row(key, shown if len(shown) <= 60 else shown[:57] + "...")
    return table


def _made_table(result: Result) -> Any:
    results = {Path(result["file"]).name: "quantized", "plain rounding": "plain"}
    return _evaluation_table({name: result["evaluation"][key] for name, key in results.items()})


def _sweep_table(result: Result) -> Any:
    """One row for each setting that was tried, the best first."""
    rows = result["ranking"]
    texts, names = list(rows[0]["ratio"]), list(rows[0]["settings"])
    counts = ", ".join(f"{count} {state}" for state, count in result["trials"].items())
    title = f"{result['study']}: KL over that of plain rounding; {counts}; * on the Pareto front"
    table = _new_table(title, "", *(name.split(".")[-1] for name in names), *result["objectives"], "±", *texts, "seeds")
    for row in rows:
        values = [f"{value:.4f}" for value in row["values"]]
        ratios = [f"{row['ratio'][text]:.4f}" for text in texts]
        settings = [f"{row['settings'].get(name)}" for name in names]
        spread = f"{max(row['spread']):.4f}"
        table.add_row("*" if row["on_front"] else "", *settings, *values, spread, *ratios, str(len(row["trials"])))
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
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        from sqjax import mesh

        mesh.connect()
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
