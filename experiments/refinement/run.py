"""Distillation into the format: how much it brings with how many tokens, which settings matter, and what prompts do.

    python experiments/refinement/run.py MODEL --pool POOL.jsonl.gz --text heldout_*.jsonl --out OUT \
        --parts start,curve,seeds,ablation,chosen --devices 0,1 --seconds 560
    python experiments/refinement/run.py MODEL --out OUT --report experiments/refinement

Every run is `sqjax refine`; every figure is of the file that it wrote. What has its line in OUT/results.jsonl is not
done again, and a run that was out of time goes on with the same command. Settings are chosen by watch: documents of
the pool that nothing was trained on, and of which none is held out. The parts are in parts.py.
"""

import argparse
import functools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments import pool, workers  # noqa: E402
from experiments.refinement import parts  # noqa: E402
from experiments.refinement.parts import Run, Start  # noqa: E402
from experiments.workers import Busy, Job, say  # noqa: E402

# Looks at the watched text in a run.
_LOOKS = 16


def encode_once(most: int) -> None:
    """Lets a process encode a text once: the windows for fewer tokens are the first of those for more.

    Encoding the pool takes as long as a short run does, and the runs of an ablation all read the same.
    """
    from sqjax import calibration

    encode, known = calibration.calibration_windows, {}

    def windows(texts, tokenizer, length, tokens):
        key = (texts.files, texts.seed, length, tokenizer.core.get_vocab_size())
        if key not in known or known[key][0] < tokens:
            known[key] = max(most, tokens), encode(texts, tokenizer, length, max(most, tokens))
        windows_WT, prints = known[key][1]
        # The hashes stay those of all of the text.
        return windows_WT[: max(1, round(tokens / length))], prints

    calibration.calibration_windows = windows


# ---------------------------------------------------------------------------------------------------------------------
# What the jobs make


class Bench:
    """Files of an experiment's folder, each made by whoever needs it first, and what they are measured with."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.out: Path = arguments.out
        self.models = {"even": arguments.model, "uneven": arguments.uneven}

    def text(self, name: str) -> Path:
        """A part of the pool."""
        if name == "languages":
            target = self.out / "languages.jsonl.gz"
            return workers.make_once(self.out, target, lambda: pool.repeat(self.text("train"), target, "multilingual"))
        return self.arguments.split / f"{name}.jsonl{'.gz' * (name == 'train')}"

    def plain(self, model: str) -> Path:
        """Plain rounding's file."""
        from sqjax import making

        target = self.out / "files" / f"{model}.plain.gguf"
        return workers.make_once(self.out, target, lambda: making.convert(self.models[model], target))

    def started(self, start: Start) -> Path:
        """The file of `spectral` that refinement starts from."""
        return workers.make_once(self.out, self.out / "files" / f"{start.name}.gguf", lambda: self._start(start))

    def _start(self, start: Start) -> None:
        from sqjax import making

        folder, target = self.out / "statistics" / start.name, self.out / "files" / f"{start.name}.gguf"
        options = {"text": [self.text(start.calibration)], "tokens": self.arguments.start_tokens, "seed": start.seed}
        measured = making.calibrate(self.models[start.model], folder, batch=self.arguments.batch, **options)
        making.quantize(
            self.models[start.model], target, statistics=folder, settings=self.arguments.recipe, seed=start.seed
        )
        say(f"{start.name}: {measured['tokens']:,} tokens of statistics in {measured['seconds']:.0f} s")
        shutil.rmtree(folder)

    @functools.cache  # noqa: B019, one of them lives as long as its process
    def measure(self, model: str):
        """Scores files of a model on every text, the watched one and the prompts among them."""
        from experiments.written_files import Measure

        own = {"watch": self.text("watch"), "trained": self.text("chat")}
        return Measure(self.models[model], self.arguments.text | own, self.plain(model), self.arguments.windows)

    def refined(self, run: Run) -> dict:
        """Runs or resumes `sqjax refine` and returns the line of its file."""
        from sqjax import making

        start, target = self.started(run.start), self.out / "files" / f"{run.name}.gguf"
        folder = self.out / "runs" / run.name
        tokens = run.tokens * (self.prompt_tokens(run.start.model) if run.text == "chat" else 1)
        looks = [f'watch="{self.text("watch_chat" if run.text == "chat" else "watch")}"']
        looks += [f"watch_windows={self.arguments.watch_windows}", f"watch_every={self.every(tokens, run)}"]
        settings = (*looks, "checkpoint_every=1000", *self.arguments.settings, *run.settings)
        result = making.refine(
            self.models[run.start.model],
            start,
            target,
            text=[self.text(run.text)],
            tokens=tokens,
            run=folder,
            resume=(folder / "run.json").exists(),
            settings=settings,
            seed=run.start.seed,
        )
        rates = [json.loads(line)["tokens_per_second"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        # Two states with Adam's moments a run would fill the disk.
        shutil.rmtree(folder / "checkpoints")
        row = parts.summary(run, result) | {"tokens_per_second": rates[-1], "asked": run.tokens, "text": run.text}
        row["texts"] = self.measure(run.start.model)(target)
        say(f"{run.part}, {run.label}: watch {row['best_kl']:.5f} nats;", _line(row["texts"]))
        return row

    def every(self, tokens: int, run: Run) -> int:
        """Updates between two looks: a look costs as much as several updates."""
        from sqjax.refinement import Refinement
        from sqjax.settings import build, parse_overrides

        settings = build(Refinement, parse_overrides([*self.arguments.settings, *run.settings]), run.label)
        return max(1, settings.planned(tokens).updates // _LOOKS)

    def prompt_tokens(self, model: str) -> int:
        """Tokens of the prompts, in whole windows."""
        from sqjax import measuring, sources

        length = int(dict(s.split("=", 1) for s in self.arguments.settings).get("length", 512))
        checkpoint = sources.open_model(self.models[model])
        return length * len(measuring.prepare(checkpoint, self.text("chat"), length=length).tokens)


def _line(texts: dict) -> str:
    from experiments.written_files import line

    return line(texts)


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def jobs(bench: Bench) -> list[Job]:
    """The jobs of the parts that were asked for, in order; what two parts share is done once."""
    arguments = bench.arguments
    options = {"curve": arguments.curve, "budget": arguments.budget, "most": arguments.most}
    options |= {"uneven": arguments.uneven_tokens, "seeds": arguments.seeds, "groups": arguments.groups}
    found: dict[str, Job] = {}
    for part in arguments.parts:
        if part == "uneven" and arguments.uneven is None:
            continue
        planned = list(parts.runs(part, **options))
        models = {run.start.model for run in planned} | ({"even"} if part == "start" else set())
        for model in sorted(models):
            found.setdefault(f"plain.{model}", Job(f"plain.{model}", functools.partial(plain, bench, model)))
        starts = dict.fromkeys(run.start for run in planned) | (
            {Start(seed=arguments.seeds[0]): None} if models else {}
        )
        for start in [start for start in starts if start.model in models]:
            found.setdefault(start.name, Job(start.name, functools.partial(begin, bench, start)))
        for run in planned:
            found.setdefault(run.name, Job(run.name, functools.partial(bench.refined, run)))
        for name, job in (("chosen", chosen), ("also", also), ("runtime", in_runtime), ("size", size)):
            if part == name:
                found[name] = Job(name, functools.partial(job, bench))
    return list(found.values())


def plain(bench: Bench, model: str) -> dict:
    """Plain rounding itself, and whether what is evaluated was trained on."""
    row = {"part": "plain", "label": "plain rounding", "texts": bench.measure(model)(bench.plain(model))}
    return row | {"disjoint": pool.checked(bench.arguments.split)}


def begin(bench: Bench, start: Start) -> dict:
    """A file that refinement starts from."""
    file = bench.started(start)
    row = {
        "part": "start",
        "label": start.name,
        "start": start.name,
        "asked": 0,
        "texts": bench.measure(start.model)(file),
    }
    say(f"{start.name}:", _line(row["texts"]))
    return row


def chosen(bench: Bench) -> dict:
    """The best of each group of the ablation together, at its budget and at the most tokens."""
    arguments = bench.arguments
    planned = list(parts.runs("ablation", curve=(), budget=arguments.budget, most=0, uneven=0, seeds=arguments.seeds))
    lines = {row["job"]: row for row in workers.results(arguments.out)}
    missing = [run.label for run in planned if run.name not in lines]
    if missing and "ablation" in arguments.parts:
        raise Busy(f"the ablation lacks {missing}")
    watched = {run.label: lines[run.name]["best_kl"] for run in planned if "best_kl" in lines.get(run.name, {})}
    settings = parts.choose(watched)
    first = Start(seed=arguments.seeds[0])
    row = {"part": "chosen", "settings": settings, "missing": missing, "files": {}}
    for tokens in (arguments.budget, arguments.most) if settings else ():
        run = Run("chosen", "chosen", first, tokens, settings)
        line = workers.done(arguments.out).get(run.name)
        if line is None:
            line = bench.refined(run)
            workers.write(arguments.out, {"job": run.name} | line)
        row["files"][f"{tokens}"] = run.name
    return row


def also(bench: Bench) -> dict:
    """Files that were made elsewhere, as llama.cpp's own mixtures."""
    files = {Path(file).name: bench.measure("even")(file) for file in bench.arguments.also}
    return {
        "part": "also",
        "sizes": {Path(file).name: file.stat().st_size for file in bench.arguments.also},
        "files": files,
    }


def in_runtime(bench: Bench) -> dict:
    """The start, what refinement made of it and the given files in llama.cpp itself."""
    from experiments.written_files import in_llama_cpp

    arguments, first = bench.arguments, Start(seed=bench.arguments.seeds[0])
    longest = Run("curve", "", first, arguments.curve[-1]).name
    if "curve" in arguments.parts and longest not in {row["job"] for row in workers.results(arguments.out)}:
        raise Busy(longest)
    refined = arguments.out / "files" / f"{longest}.gguf"
    files = [file for file in (bench.started(first), refined, *arguments.also) if file.exists()]
    rows = in_llama_cpp(arguments.model, bench.plain("even"), files, arguments.text, arguments.runtime_windows)
    return {"part": "runtime", "files": {file.name: row for file, row in zip(files, rows)}}


def size(bench: Bench) -> dict:
    """Updates at the shape of Qwen3.5-0.8B with random weights: rate, memory, seconds of each stage."""
    from sqjax import making

    arguments = bench.arguments
    model = arguments.large or bench.out / "random-0.8B"
    if not model.exists():
        script = ROOT / "experiments" / "real_size" / "make_checkpoint.py"
        subprocess.run([sys.executable, script, model], check=True)
    begin, target = bench.out / "files" / "large.plain.gguf", bench.out / "files" / "large.refined.gguf"
    converted = making.convert(model, begin)
    settings = [f"updates={arguments.size_updates}", "watch_every=100000", "checkpoint_every=100000", "watch_windows=4"]
    settings += ['watch="heldout"', *arguments.settings]
    folder = bench.out / "runs" / "large"
    shutil.rmtree(folder, ignore_errors=True)
    result = making.refine(model, begin, target, text=[bench.text("watch")], run=folder, settings=settings)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder / "checkpoints")
    row = {"part": "size", "tokens_per_second": lines[-1]["tokens_per_second"], "updates": len(lines)}
    row |= {key: result[key] for key in ("device", "peak_memory_bytes", "peak_device_memory_bytes", "file_bytes")}
    row |= {"convert_seconds": converted["seconds"], "refine_seconds": result["seconds"]}
    return row | {"same_size_as_plain": result["file_bytes"] == begin.stat().st_size}


# ---------------------------------------------------------------------------------------------------------------------
# Command


def main() -> None:
    arguments = parse()
    if arguments.report is not None:
        from experiments.refinement import report

        report.write(arguments.out, arguments.report)
        return
    from experiments.written_files import named

    arguments.text = named(arguments.text)
    if arguments.until is not None:
        encode_once(max(arguments.most, *arguments.curve))
        sys.exit(0 if workers.work(jobs(Bench(arguments)), arguments.out, arguments.until) else 3)
    pool.split(arguments.pool, arguments.split, arguments.prompts)
    if arguments.parts == ["split"]:
        pool.check(arguments.split, arguments.text)
        return
    # Peak memory is a process's: the large model has one of its own.
    alone = [part for part in arguments.parts if part == "size"]
    together = [part for part in arguments.parts if part != "size"]
    deadline = time.monotonic() + arguments.seconds
    for group, devices in ((together, arguments.devices), (alone, arguments.devices[:1])):
        if group:
            command = [sys.executable, *sys.argv, "--parts", ",".join(group)]
            workers.spread(command, devices, arguments.out, max(1.0, deadline - time.monotonic()))


def parse() -> argparse.Namespace:
    listed = lambda kind: lambda text: [kind(item) for item in text.split(",") if item]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model")
    add("--uneven", type=Path, help="the same model with uneven channels, for the part of that name")
    add("--large", type=Path, help="checkpoint of the part size; one of random weights is made unless given")
    add("--pool", type=Path, help="text to be split into what is trained on and what is watched")
    add("--split", type=Path, help="folder of the split pool, made unless it is there; OUT/text unless given")
    add("--text", nargs="+", default=["heldout120"], help="FILE or NAME=FILE; only evaluated")
    add("--also", nargs="+", type=Path, default=[], help="files made elsewhere, for the parts also and runtime")
    add("--out", type=Path, default=Path("runs/refinement"))
    add("--parts", type=listed(str), default=["start", "curve"], help=f"split, or of {', '.join(parts.PARTS)}")
    add("--devices", type=listed(str), default=[], help="numbers of GPUs, a process each; one process unless given")
    add("--seconds", type=float, default=560.0, help="after which the processes stop")
    add("--curve", type=listed(int), default=[10**6 * 2**i for i in range(6)])
    add("--budget", type=int, default=8_000_000, help="tokens of a run of the ablation")
    add("--groups", nargs="+", default=list(parts.GROUPS), choices=list(parts.GROUPS), help="of the ablation")
    add("--most", type=int, default=32_000_000, help="tokens of the seeds' runs and of what is chosen")
    add("--uneven-tokens", type=int, default=30_000_000)
    add("--start-tokens", type=int, default=1_000_000, help="of calibration")
    add("--seeds", type=listed(int), default=[0, 1, 2])
    add("--prompts", type=int, default=360)
    add("--windows", type=int, default=64, help="of each evaluated text")
    add("--watch-windows", type=int, default=96)
    add("--runtime-windows", type=int, default=8, help="of each text in llama.cpp")
    add("--size-updates", type=int, default=24)
    add("--batch", type=int, default=32, help="of the statistics")
    add("--settings", nargs="+", default=[], help="overrides of configs/refine.toml in every run")
    add("--recipe", nargs="+", default=[], help="overrides of configs/spectral.toml in every start")
    add("--report", type=Path, help="folder to write tables and figures to, from OUT/results.jsonl")
    add("--until", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.split = arguments.split or arguments.out / "text"
    if unknown := set(arguments.parts) - {*parts.PARTS, "split"}:
        parser.error(f"there are no parts {', '.join(sorted(unknown))}")
    return arguments


if __name__ == "__main__":
    main()
