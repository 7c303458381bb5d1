"""What a written GGUF file lost, text by text, beside plain rounding's file: the figures of a line of results."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqjax import evaluation, gguf_file, measuring, runtime, sources
from sqjax.evaluation import Sequences, TokenScores

KEYS = ("tokens", "kl", "kl_interval", "kl_p99", "top1", "cross_entropy", "cross_entropy_reference", "gap")


class Measure:
    """Scores files of one checkpoint on several texts, windows of 512 tokens; the reference runs once.

    Args:
      model: the checkpoint that the files were made from.
      texts: files, or names and files, to be scored.
      plain: plain rounding's file of it, which ratios and recoveries refer to.
      windows: how many of each text; all of them where None.
    """

    def __init__(
        self, model: str | Path, texts: Mapping[str, str | Path], plain: str | Path, windows: int | None = None
    ):
        self.checkpoint = sources.open_model(model)
        self.texts = {name: measuring.prepare(self.checkpoint, text, windows=windows) for name, text in texts.items()}
        self.reference = sources.load_model(self.checkpoint)
        self.hidden = {name: evaluation.hidden_states(self.reference, text) for name, text in self.texts.items()}
        self.plain = self.scores(plain)

    def scores(self, file: str | Path) -> dict[str, TokenScores]:
        """Scores of every token of every text."""
        student = sources.load_model(gguf_file.read_gguf(file))
        return {
            name: evaluation.score(self.reference, student, text, hidden=self.hidden[name])
            for name, text in self.texts.items()
        }

    def __call__(self, file: str | Path) -> dict[str, dict[str, Any]]:
        """Returns for each text the keys of `evaluate`, the ratio of the KL to plain rounding's, and the recovery."""
        return compared(self.scores(file), self.plain, self.texts)


def in_llama_cpp(
    model: str | Path, plain: str | Path, files: Sequence[str | Path], texts: Mapping[str, str | Path], windows: int
) -> list[dict[str, dict[str, Any]]]:
    """Returns for each file what `Measure` does, from llama.cpp itself; the reference is the model as F32 there too."""
    checkpoint = sources.open_model(model)
    prepared = {name: measuring.prepare(checkpoint, text, windows=windows) for name, text in texts.items()}
    found: list[dict[str, dict[str, Any]]] = [{} for _ in files]
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference.f32.gguf"
        gguf_file.write_gguf(reference, checkpoint, file_type="f32")
        for name, text in prepared.items():
            first, *others = runtime.score_all(reference, [plain, *files], text)
            for result, scores in zip(found, others):
                result |= compared({name: scores}, {name: first}, {name: text})
    return found


def compared(
    scores: Mapping[str, TokenScores], plain: Mapping[str, TokenScores], texts: Mapping[str, Sequences]
) -> dict[str, dict[str, Any]]:
    """The figures of each text, against the reference and against plain rounding."""
    result = {}
    for name, own in scores.items():
        summary = evaluation.summarize(own, texts[name])
        ratio = summary["kl"] / float(plain[name].kl.astype(float).mean())
        result[name] = {key: summary[key] for key in KEYS} | {"ratio": ratio}
        result[name]["recovery"] = evaluation.recovery(plain[name], own)
    return result


def named(texts: Sequence[str]) -> dict[str, str]:
    """Reads texts given as FILE or NAME=FILE; a file's name is its own, without `heldout_`."""
    pairs = {}
    for text in texts:
        name, _, path = text.rpartition("=")
        pairs[name or Path(text).name.split(".")[0].removeprefix("heldout_")] = path
    return pairs


def line(texts: Mapping[str, Mapping[str, Any]]) -> str:
    """The ratios of a result in one line."""
    return " ".join(f"{name} {figures['ratio']:.3f}" for name, figures in texts.items())
