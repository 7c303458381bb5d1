"""Rounds a model by several recipes and measures the written files on every text: one line of JSON a file.

python experiments/rounding/run.py MODEL --calibration POOL.jsonl --text heldout_c4.jsonl heldout_code.jsonl ...
    --recipes rtn imatrix gptq spectral --tokens 1000000 --seeds 0 1 2 --out results.jsonl

A recipe may carry settings: spectral:gamma_in=1,gamma_out=0.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import sqjax
from sqjax import evaluation, measuring, sources


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", nargs="+", default=[sources.CALIBRATION_SUITE])
    parser.add_argument("--text", nargs="+", default=[sources.DEFAULT_SUITE])
    parser.add_argument("--recipes", nargs="+", default=["rtn", "imatrix", "gptq", "spectral"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--windows", type=int, default=None, help="windows of each text; all unless given")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", default="results.jsonl")
    parser.add_argument("--keep", help="folder for statistics and files; a temporary one unless given")
    args = parser.parse_args()

    start = time.monotonic()
    say = lambda *words: print(f"[{time.monotonic() - start:7.1f}]", *words, file=sys.stderr, flush=True)  # noqa: E731
    checkpoint = sources.open_model(args.model)
    sequences = {Path(text).stem: measuring.prepare(checkpoint, text, windows=args.windows) for text in args.text}
    reference = sources.load_model(checkpoint)
    hidden = {name: evaluation.hidden_states(reference, sequence) for name, sequence in sequences.items()}
    plain: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or scratch
        for seed in args.seeds:
            statistics = Path(folder) / f"{checkpoint.name}.statistics{seed}"
            measured = sqjax.calibrate(
                args.model, statistics, text=args.calibration, tokens=args.tokens, seed=seed, batch=args.batch
            )
            say(f"statistics on {measured['tokens']:,} tokens in {measured['seconds']:.0f} s")
            for recipe in args.recipes:
                name, _, settings = recipe.partition(":")
                if name == "rtn" and seed != args.seeds[0]:
                    continue
                file = Path(folder) / f"{checkpoint.name}.{name}.{seed}.gguf"
                made = sqjax.quantize(
                    args.model,
                    file,
                    recipe=name,
                    statistics=None if name == "rtn" else statistics,
                    settings=[setting for setting in settings.split(",") if setting],
                )
                row = {"model": checkpoint.name, "recipe": recipe, "seed": seed, "tokens": measured["tokens"]}
                row |= {key: made[key] for key in ("file_bytes", "bits_per_weight", "sha256", "seconds", "device")}
                row["statistics_seconds"] = measured["seconds"]
                for text, sequence in sequences.items():
                    scores = measuring.score_file(file, checkpoint, sequence, reference=reference, hidden=hidden[text])
                    summary = evaluation.summarize(scores, sequence)
                    row[text] = {key: summary[key] for key in ("kl", "kl_interval", "top1", "gap", "tokens")}
                    if name == "rtn":
                        plain[text] = summary["kl"]
                row["ratio"] = {text: row[text]["kl"] / plain[text] for text in sequences if text in plain}
                with open(args.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                ratios = " ".join(
                    f"{text.removeprefix('heldout_')} {ratio:.3f}" for text, ratio in row["ratio"].items()
                )
                say(f"{recipe} seed {seed}: {made['seconds']:.0f} s, {ratios}")


if __name__ == "__main__":
    main()
