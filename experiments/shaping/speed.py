"""Times the rounding of a model at several shaping strengths, side by side and one at a time, programs compiled before.

python experiments/shaping/speed.py MODEL STATISTICS --variants 16 --singles 2 --out speed.jsonl
    --set steps='["feedback"]'
"""

import argparse
import itertools
import json
import time

import jax

from sqjax import calibration, making, quantizer, sources, variants


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("statistics", help="folder that sqjax calibrate wrote")
    parser.add_argument("--variants", type=int, default=16)
    parser.add_argument("--singles", type=int, default=2, help="of them that are also rounded alone")
    parser.add_argument("--recipe", default="spectral")
    parser.add_argument("--set", nargs="+", default=[], dest="settings")
    parser.add_argument("--out", default="speed.jsonl")
    args = parser.parse_args()

    checkpoint = sources.open_model(args.model)
    statistics, _ = calibration.load(args.statistics)
    strengths = [0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 1.25]
    recipes = [
        making.read_recipe(args.recipe, [*args.settings, "sequential=false", f"gamma_in={a}", f"gamma_out={b}"])
        for a, b in itertools.islice(itertools.product(strengths, strengths), args.variants)
    ]

    def seconds(function, *arguments) -> tuple[list[float], float]:
        times, cpu = [], []
        for _ in range(2):
            start, start_cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(function(checkpoint.config, checkpoint.tensors, statistics, *arguments))
            times.append(time.monotonic() - start)
            cpu.append(time.process_time() - start_cpu)
        return times, cpu[1]

    together, together_cpu = seconds(variants.quantize_variants, recipes)
    alone = [seconds(quantizer.quantize, recipe) for recipe in recipes[: args.singles]]
    mean_alone = sum(times[1] for times, _ in alone) / len(alone)
    mean_cpu = sum(cpu for _, cpu in alone) / len(alone)
    row = {
        "model": checkpoint.name,
        "device": sources.usage()["device"],
        "steps": recipes[0].steps,
        "sweeps": recipes[0].sweeps,
        "variants": args.variants,
        "together_seconds": together[1],
        "together_seconds_a_variant": together[1] / args.variants,
        "alone_seconds": mean_alone,
        "speed_up": mean_alone * args.variants / together[1],
        # On a machine that others use, seconds of the processor say more than those of the clock.
        "speed_up_in_processor_time": mean_cpu * args.variants / together_cpu,
        "first_time_seconds": {"together": together[0], "alone": alone[0][0][0]},
    }
    with open(args.out, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
