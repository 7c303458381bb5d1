"""Rounds a model by several recipes and measures the written files on every text: one line of JSON a file.

python experiments/rounding/run.py MODEL --calibration POOL.jsonl --text heldout_c4.jsonl heldout_code.jsonl ...
    --recipes rtn imatrix gptq spectral --tokens 1000000 --seeds 0 1 2 --out results.jsonl

A recipe may carry settings: spectral:gamma_in=1,gamma_out=0.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.workers import say  # noqa: E402
from experiments.written_files import Measure, line, named  # noqa: E402
from sqjax import making, sources  # noqa: E402

FACTS = ("file_bytes", "bits_per_weight", "sha256", "seconds", "device")


def rounded(
    model: str | Path, file: Path, recipe: str, statistics: Path | None, settings: Sequence[str], measure: Measure
) -> dict[str, Any]:
    """Writes a file by a recipe and returns its facts and what it lost on every text."""
    made = making.quantize(model, file, recipe=recipe, statistics=statistics, settings=settings)
    return {key: made[key] for key in FACTS} | {"texts": measure(file)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", default=[sources.CALIBRATION_SUITE])
    parser.add_argument("--text", nargs="+", default=[sources.DEFAULT_SUITE], help="FILE or NAME=FILE")
    parser.add_argument("--recipes", nargs="+", default=["rtn", "imatrix", "gptq", "spectral"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=None, help="windows of each text; all unless given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", default="results.jsonl")
    parser.add_argument("--keep", help="folder for statistics and files; a temporary one unless given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch)
        name = sources.open_model(args.model).name
        making.convert(args.model, folder / f"{name}.plain.gguf")
        measure = Measure(args.model, named(args.text), folder / f"{name}.plain.gguf", args.windows)
        for seed in args.seeds:
            statistics = folder / f"{name}.statistics{seed}"
            options = {"text": args.calibration, "tokens": args.tokens, "seed": seed, "batch": args.batch}
            measured = making.calibrate(args.model, statistics, **options)
            say(f"statistics on {measured['tokens']:,} tokens in {measured['seconds']:.0f} s")
            for given in args.recipes:
                recipe, _, settings = given.partition(":")
                if recipe == "rtn" and seed != args.seeds[0]:
                    continue
                own = None if recipe == "rtn" else statistics
                file = folder / f"{name}.{recipe}.{seed}.gguf"
                row = {"model": name, "recipe": given, "seed": seed, "tokens": measured["tokens"]}
                row |= {"statistics_seconds": measured["seconds"]}
                row |= rounded(args.model, file, recipe, own, [s for s in settings.split(",") if s], measure)
                with open(args.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                say(f"{given} seed {seed}: {row['seconds']:.0f} s,", line(row["texts"]))


if __name__ == "__main__":
    main()
