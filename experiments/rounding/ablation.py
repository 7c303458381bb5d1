"""Every step of rounding on and off, shaping strengths from 0 to 1 on both sides, and the number of calibration tokens.

    python experiments/rounding/ablation.py MODEL --pool POOL.jsonl.gz --text heldout_*.jsonl --out OUT \
        --parts steps,tokens,strength --devices 0,1 --seconds 560
    python experiments/rounding/ablation.py MODEL --out OUT --report experiments/rounding

Statistics of all numbers of tokens come from one pass over the text: Grams are sums. Figures are of written files,
but for those of `strength`, which are rounded side by side (sqjax.variants) and then written. What is chosen is chosen
by watch, documents of the pool that nothing is calibrated on; the other texts are held out. What has its line in
OUT/results.jsonl is not done again.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import pool, workers  # noqa: E402
from experiments.workers import Job, say  # noqa: E402

PARTS = ("steps", "tokens", "strength", "sequential")
# What all steps together are, and what is left where one of them is not there.
FEEDBACK, CODES, SCALES = '"feedback"', '"descend_codes"', '"descend_scales"'
# The table has no output Gram, for which two-sided feedback would be the same as feedback.
TWO_SIDED, DESCENTS = '"two_sided_feedback"', (CODES, SCALES, CODES)
ALONE = ("equalize=false", "sequential=false", "gamma_out=0.0")


def _steps(*names: str) -> str:
    return f"steps=[{', '.join(names)}]"


# Label: recipe and settings. The first list adds one step after the other, the second takes one of them away.
ADDED = {
    "importance (llama.cpp)": ("imatrix", ()),
    "search of scales": ("spectral", (*ALONE, _steps('"search"'))),
    "feedback": ("spectral", (*ALONE, _steps(FEEDBACK))),
    "+ equalized": ("spectral", (*ALONE[1:], _steps(FEEDBACK))),
    "+ sequential": ("spectral", (*ALONE[2:], _steps(FEEDBACK))),
    "+ descent of codes": ("spectral", (*ALONE[2:], _steps(FEEDBACK, CODES))),
    "+ descent of scales": ("spectral", ALONE[2:]),
    "+ output Gram: all": ("spectral", ()),
}
WITHOUT = {
    "all but equalized": ("spectral", ("equalize=false",)),
    "all but sequential": ("spectral", ("sequential=false",)),
    "all but descents": ("spectral", (_steps(FEEDBACK),)),
    "all but descent of scales": ("spectral", (_steps(FEEDBACK, CODES),)),
    "all but descent of codes": ("spectral", (_steps(FEEDBACK, SCALES),)),
    "all but feedback": ("spectral", (_steps('"search"', *DESCENTS),)),
    "one sweep": ("spectral", ("sweeps=1",)),
    "two-sided feedback, no descents": ("spectral", (_steps(FEEDBACK, TWO_SIDED), f"embedding_{_steps(FEEDBACK)}")),
    "two-sided feedback, descents": (
        "spectral",
        (_steps(FEEDBACK, TWO_SIDED, *DESCENTS), f"embedding_{_steps(FEEDBACK, *DESCENTS)}"),
    ),
}
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TOKEN_RECIPES = ("imatrix", "gptq", "spectral")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def measure_at(arguments, counts: Sequence[int]) -> None:
    """Writes statistics of the first so many tokens, for each of the counts, a folder each, in one pass."""
    import jax
    import jax.numpy as jnp

    from sqjax import calibration, sources
    from sqjax.statistics import means

    checkpoint = sources.open_model(arguments.model)
    texts = sources.open_texts([arguments.split / "train.jsonl.gz"], seed=arguments.seed)
    windows_WT, _ = calibration.calibration_windows(texts, checkpoint.tokenizer, arguments.length, max(counts))
    model, total, first = sources.load_model(checkpoint), None, 0
    about = {"model": checkpoint.name, "text": ["pool"], "length": arguments.length, "seed": arguments.seed}
    for number, count in enumerate(sorted(counts)):
        last = min(len(windows_WT), max(first + 1, round(count / arguments.length)))
        # Labels depend on the seed and the number of a batch: parts that begin at zero must not draw the same ones.
        options = {"batch": arguments.batch, "seed": 1000 * arguments.seed + number}
        sums = calibration.collect(model, windows_WT[first:last], **options)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        measured = means(checkpoint.config, total, windows_WT[:last])
        calibration.save(arguments.out / "statistics" / f"{count}", measured, about)
        say(f"statistics on {measured.tokens:,} tokens")
        first = last


def statistics_of(arguments, count: int) -> Path:
    """The folder of the statistics on so many tokens; the first process that asks measures all of them."""
    folder = arguments.out / "statistics"
    counts = sorted({*arguments.counts, arguments.tokens})

    def make():
        measure_at(arguments, counts)
        (folder / "complete").touch()

    workers.make_once(arguments.out, folder / "complete", make)
    return folder / f"{count}"


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


class Bench:
    """What files are measured with, in one process."""

    def __init__(self, arguments):
        self.arguments = arguments

    @functools.cached_property
    def plain(self) -> Path:
        """Plain rounding's file."""
        from sqjax import making

        target = self.arguments.out / "files" / "plain.gguf"
        return workers.make_once(self.arguments.out, target, lambda: making.convert(self.arguments.model, target))

    @functools.cached_property
    def measure(self):
        """Scores files on the watched and on all given texts."""
        from experiments.written_files import Measure

        texts = {"watch": self.arguments.split / "watch.jsonl"} | self.arguments.text
        return Measure(self.arguments.model, texts, self.plain, self.arguments.windows)

    def rounded(self, part: str, label: str, recipe: str, settings: Sequence[str], tokens: int) -> dict:
        """The line of a file of a recipe."""
        from experiments.rounding.run import rounded
        from experiments.written_files import line

        statistics = statistics_of(self.arguments, tokens)
        file = self.arguments.out / "files" / f"{part}.{label}.gguf".replace(" ", "_")
        always = [] if recipe == "imatrix" else self.arguments.settings
        row = rounded(self.arguments.model, file, recipe, statistics, (*always, *settings), self.measure)
        file.unlink()
        say(f"{part}, {label}: {row['seconds']:.0f} s,", line(row["texts"]))
        return {"part": part, "label": label, "recipe": recipe, "settings": settings, "tokens": tokens} | row

    def side_by_side(self, gamma_in: Sequence[float], gamma_out: Sequence[float]) -> dict:
        """The lines of several strengths without the sequential pass, which are solved together."""
        import jax
        import numpy as np

        from experiments.written_files import line
        from sqjax import calibration, gguf_file, making, variants

        measured, _ = calibration.load(statistics_of(self.arguments, self.arguments.tokens))
        base = making.read_recipe("spectral", ("sequential=false", *self.arguments.settings))
        pairs = [(a, g) for a in gamma_in for g in gamma_out]
        recipes = [dataclasses.replace(base, gamma_in=a, gamma_out=g) for a, g in pairs]
        checkpoint = self.measure.checkpoint
        solved = variants.quantize_variants(checkpoint.config, checkpoint.tensors, measured, recipes)
        points = []
        for (a, g), tensors in zip(pairs, solved):
            file = self.arguments.out / "files" / f"strength.{a}.{g}.gguf"
            written = {name: jax.tree.map(np.asarray, tensor) for name, tensor in tensors.items()}
            gguf_file.write_gguf(file, checkpoint, written, file_type="q4_k")
            points.append({"gamma_in": a, "gamma_out": g, "texts": self.measure(file)})
            file.unlink()
            say(f"gamma {a:g}, {g:g}:", line(points[-1]["texts"]))
        return {"part": "strength", "tokens": self.arguments.tokens, "points": points}


def jobs(bench: Bench) -> Iterator[Job]:
    """The jobs of the parts that were asked for."""
    arguments = bench.arguments

    def job(part, label, recipe, settings, tokens):
        run = functools.partial(bench.rounded, part, label, recipe, tuple(settings), tokens)
        return Job(f"{part}: {label}", run)

    if "steps" in arguments.parts:
        for label, (recipe, settings) in (ADDED | WITHOUT).items():
            yield job("steps", label, recipe, settings, arguments.tokens)
    if "tokens" in arguments.parts:
        for count in sorted(arguments.counts):
            yield from (job("tokens", f"{name} {count}", name, (), count) for name in TOKEN_RECIPES)
    if "strength" in arguments.parts:
        # Without an output Gram the steps take another way, and can only be solved apart from the others.
        rows = [((gamma_in,), STRENGTHS[1:]) for gamma_in in STRENGTHS] + [(STRENGTHS, (0.0,))]
        for number, pair in enumerate(rows):
            yield Job(f"strength: {number}", functools.partial(bench.side_by_side, *pair))
    if "sequential" in arguments.parts:
        for name, others in (("gamma_in", STRENGTHS), ("gamma_out", STRENGTHS)):
            for value in others:
                yield job("sequential", f"{name} {value:g}", "spectral", (f"{name}={value}",), arguments.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Command


def main() -> None:
    arguments = parse()
    if arguments.report is not None:
        from experiments.rounding import report

        report.write(arguments.out, arguments.report)
        return
    from experiments.written_files import named

    arguments.text = named(arguments.text)
    if arguments.until is not None:
        sys.exit(0 if workers.work(list(jobs(Bench(arguments))), arguments.out, arguments.until) else 3)
    pool.split(arguments.pool, arguments.split)
    workers.spread([sys.executable, *sys.argv], arguments.devices, arguments.out, arguments.seconds)


def parse() -> argparse.Namespace:
    listed = lambda kind: lambda text: [kind(item) for item in text.split(",") if item]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model")
    add("--pool", type=Path, help="text to be split into what is calibrated on and what is watched")
    add("--split", type=Path, help="folder of the split pool, made unless it is there; OUT/text unless given")
    add("--text", nargs="+", default=["heldout120"], help="FILE or NAME=FILE; only evaluated")
    add("--out", type=Path, default=Path("runs/rounding"))
    add("--parts", type=listed(str), default=list(PARTS[:3]), help=f"of {', '.join(PARTS)}")
    add("--devices", type=listed(str), default=[], help="numbers of GPUs, a process each; one process unless given")
    add("--seconds", type=float, default=560.0, help="after which the processes stop")
    add("--counts", type=listed(int), default=[20_000, 64_000, 200_000, 650_000, 2_000_000])
    add("--tokens", type=int, default=650_000, help="of calibration in all parts but that of tokens")
    add("--length", type=int, default=512)
    add("--windows", type=int, default=32, help="of each text")
    add("--batch", type=int, default=32, help="of the statistics")
    add("--seed", type=int, default=0)
    add("--settings", nargs="+", default=[], help="overrides of every recipe but llama.cpp's, before a run's own")
    add("--report", type=Path, help="folder to write tables and figures to, from OUT/results.jsonl")
    add("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.split = arguments.split or arguments.out / "text"
    if unknown := set(arguments.parts) - {*PARTS}:
        parser.error(f"there are no parts {', '.join(sorted(unknown))}")
    return arguments


if __name__ == "__main__":
    main()
