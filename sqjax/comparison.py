"""Files side by side: every file on every suite against one reference, with paired intervals and gap recovery."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sqjax import cache, contributions, evaluation, report
from sqjax.checkpoint import Checkpoint
from sqjax.evaluation import HISTOGRAM_EDGES, Sequences, TokenScores
from sqjax.fingerprints import Seen
from sqjax.measuring import Runtime, look_up, prepare, seen_by
from sqjax.run import InputError, atomic_path
from sqjax.scoring import Scored, Scorer, Student, Suite
from sqjax.sources import SUITES, DType, Sources, usage

DEFAULT_SUITES = ("convergence60", "heldout120")
# Prose, where the suites are conversations: unlike the calibration as far as the package can tell.
DEFAULT_OUT_OF_DOMAIN = (SUITES / "demo.txt",)
C4_SUITE, C4_SOURCE = "c4-64x256", "allenai/c4:en:validation"
_NAMED = re.compile(r"([\w.-]+)=(.+)")
# A name that ends in a number of windows and their length says how its text is cut.
_SHAPED = re.compile(r"[\w.-]*-(\d+)x(\d+)")


def compare(
    files: Sequence[str | Path],
    *,
    reference: str | Path,
    text: Sources | None = None,
    out_of_domain: Sources = (),
    out: str | Path | None = None,
    length: int = 512,
    windows: int | None = None,
    runtime: Literal["jax", "llama.cpp", "both"] = "jax",
    dtype: DType = "f32",
    groups: contributions.Grouping = "none",
    disagreements: int = 12,
    calibration: Sequence[str | Path] = (),
    allow_overlap: bool = False,
    statistics: str | Path | None = None,
    run: Sequence[str | Path] = (),
    fresh: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares files of one model on suites of text: metrics, paired intervals and recovery of plain rounding's gap.

    Args:
      files: GGUF files of any type, Hugging Face folders or hub ids.
      reference: the model that they were made from.
      text: suites, each a source of text, `NAME=SOURCE` or a suite of the package. A name ending in `-64x256` means 64
        windows of 256 tokens; `c4-64x256` alone stands for those of allenai/c4 on the hub.
      out_of_domain: suites that the calibration never resembled; scored like the others and marked.
      out: folder for comparison.json and the report.
      length, windows, dtype, calibration, allow_overlap, seed: as of `evaluate`, for each suite.
      runtime: where models are run; "both" adds llama.cpp's figures, against llama.cpp's own reference.
      groups: quantize only one at a time: a kind of matrices, a layer, a tensor; or nothing.
      disagreements: how many of the largest are shown for each file.
      statistics: folder that `calibrate` wrote, for the report's spectra.
      run: folders that `refine` wrote, for the report's curves.
      fresh: score again what is kept from before.

    Returns:
      files: name -> the keys of `evaluate` over all suites together, `suites` (name -> the same of one), `recovery`,
        `difference_from_plain`, `histogram`, `disagreements`, `groups` and, with "both", `llama.cpp`.
      baseline: the same of plain rounding, which is made where it is not among the files (`given`).
      calibration_checked, windows_compared, disjoint_from_calibration: of all files together.
      reference_facts, suites, differences, settings, histogram_edges, versions and what `evaluate` says of the run.

    Raises:
      InputError: one of them cannot be read, they do not belong together, or calibration text is in a suite.
    """
    start = datetime.now(UTC)
    kind: Runtime = "llama.cpp" if runtime == "llama.cpp" else "jax"
    with Scorer(reference, dtype=dtype, fresh=fresh) as scorer:
        suites = open_suites(scorer.checkpoint, text, out_of_domain, length, windows)
        students, facts = _open_files(scorer, files)
        check = _keep_apart(scorer, suites, students, facts, calibration, allow_overlap)
        table = _Table(scorer, suites, students, facts, reference, seed)
        entries = table.entries(kind)
        for name, entry in entries.items():
            entry |= table.details(name, kind, groups, disagreements)
        if runtime == "both":
            for name, entry in table.entries("llama.cpp").items():
                entries[name]["llama.cpp"] = entry
        settings = {"runtime": runtime, "dtype": dtype, "length": length, "windows": windows, "seed": seed}
        result = {"reference": str(reference), "settings": settings} | table.about(entries)
        result |= check | {"differences": table.differences(kind)}
    result |= {"histogram_edges": list(HISTOGRAM_EDGES), "versions": cache.versions(), **usage()}
    now = datetime.now(UTC)
    result |= {"date": now.isoformat(timespec="seconds"), "seconds": (now - start).total_seconds()}
    return result if out is None else result | {"report": write(result, out, statistics=statistics, run=run)}


def write(
    result: Mapping[str, Any], out: str | Path, *, statistics: str | Path | None = None, run: Sequence[str | Path] = ()
) -> dict[str, str]:
    """Writes a comparison as JSON and as a report into a folder; returns the paths by kind.

    Raises:
      InputError: the folder cannot be written.
    """
    out = Path(out)
    with atomic_path(out / "comparison.json") as path:
        path.write_text(json.dumps(result, indent=1, allow_nan=False), encoding="utf-8")
    return {"json": str(out / "comparison.json")} | report.write(result, out, statistics=statistics, runs=run)


# ---------------------------------------------------------------------------------------------------------------------
# Suites and files


def open_suites(
    checkpoint: Checkpoint,
    text: Sources | None,
    out_of_domain: Sources,
    length: int,
    windows: int | None,
) -> list[Suite]:
    """Reads and encodes each suite; arguments as of `compare`.

    Raises:
      InputError: a suite cannot be read or does not fill a window.
    """
    if text is None:
        text, out_of_domain = DEFAULT_SUITES, out_of_domain or DEFAULT_OUT_OF_DOMAIN
    marked = [(spec, False) for spec in _listed(text)] + [(spec, True) for spec in _listed(out_of_domain)]
    suites: dict[str, Suite] = {}
    for spec, is_outside in marked:
        name, source = _named(str(spec))
        if name in suites:
            name = next(f"{name}-{n}" for n in itertools.count(2) if f"{name}-{n}" not in suites)
        shape = _SHAPED.fullmatch(name)
        count, size = (int(number) for number in shape.groups()) if shape else (windows, length)
        sequences = prepare(checkpoint, source, length=size, windows=count)
        suites[name] = Suite(name, source, sequences, size, count, is_outside)
    return list(suites.values())


def _listed(sources: Sources) -> list[str | Path]:
    return [sources] if isinstance(sources, str | Path) else list(sources)


def _named(spec: str) -> tuple[str, str]:
    """A suite's name and its source: what is said before `=`, else the stem of a file or the name of a data set."""
    if (match := _NAMED.fullmatch(spec)) and not Path(spec).exists():
        return match.group(1), match.group(2)
    if spec == C4_SUITE and not Path(spec).exists():
        return C4_SUITE, C4_SOURCE
    path = Path(spec)
    if path.exists():
        return re.sub(r"(\.(txt|jsonl))?(\.gz)?$", "", path.resolve().name), spec
    return spec.split(":")[0].rsplit("/", 1)[-1], spec


def _open_files(scorer: Scorer, files: Sequence[str | Path]) -> tuple[list[Student], dict[str, dict[str, Any]]]:
    """Students under the names of their files, or under their paths where two files have one name."""
    if not files:
        raise InputError("there is nothing to compare; give one or more files")
    names = [Path(file).name for file in files]
    names = [str(file) if names.count(name) > 1 else name for name, file in zip(names, files)]
    if len(set(names)) < len(names):
        raise InputError("a file was given twice; give each once")
    students, facts = [], {}
    for file, name in zip(files, names):
        student, facts[name] = scorer.student(file, name)
        facts[name] = {"file": str(file)} | facts[name]
        students.append(student)
    return students, facts


def _keep_apart(scorer, suites, students, facts, calibration, allow: bool) -> dict[str, Any]:
    """Looks for text that files were made on; adds to the facts of each what came of it, and returns what of all."""
    # Plain rounding has seen no text, whoever wrote it.
    seen = {
        student.name: Seen() if scorer.is_plain(student) else seen_by(facts[student.name]["file"], calibration)
        for student in students
    }
    texts = {suite.name: suite.sequences for suite in suites}
    checks = look_up(seen, texts, scorer.checkpoint.tokenizer, allow=allow)
    for name, check in checks.items():
        facts[name] |= check
    disjoint = {check["disjoint_from_calibration"] for check in checks.values()}
    return {
        "calibration_checked": all(check["calibration_checked"] for check in checks.values()),
        "windows_compared": min(check["windows_compared"] for check in checks.values()),
        "disjoint_from_calibration": False if False in disjoint else None if None in disjoint else True,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The table


class _Table:
    """All scores, and what is said of them."""

    def __init__(
        self,
        scorer: Scorer,
        suites: Sequence[Suite],
        students: Sequence[Student],
        facts: dict[str, dict[str, Any]],
        reference: str | Path,
        seed: int,
    ):
        self.scorer, self.suites, self.seed, self.facts = scorer, suites, seed, facts
        self.given = [student.name for student in students]
        self.students = {student.name: student for student in students}
        plain = [student.name for student in students if scorer.is_plain(student)]
        if plain:
            self.plain = plain[0]
        else:
            student, facts = scorer.plain()
            self.plain = student.name
            self.students[self.plain] = student
            self.facts[self.plain] = {"file": None} | facts
        for name in self.facts:
            self.facts[name]["reference"] = str(reference)
        self.scores: dict[str, dict[str, dict[str, Scored]]] = {}

    def entries(self, kind: Runtime) -> dict[str, dict[str, Any]]:
        """Metrics of each file over all suites and on each."""
        self.scores[kind] = self.scorer.score(list(self.students.values()), self.suites, kind)
        return {name: self._entry(name, kind) for name in self.students}

    def _entry(self, name: str, kind: Runtime) -> dict[str, Any]:
        scored = self.scores[kind][name]
        summaries = {
            suite.name: self._summary(scored[suite.name].scores, suite.sequences)
            | self._against_plain(name, kind, suite)
            for suite in self.suites
        }
        entry = self.facts[name] | self._summary(*self._joined(name, kind)) | self._against_plain(name, kind)
        entry["recovery"]["suites"] = {suite: summary["recovery"] for suite, summary in summaries.items()}
        seconds = sum(one.seconds for one in scored.values())
        cached = all(one.cached for one in scored.values())
        entry |= {"seconds": seconds, "tokens_per_second": entry["tokens"] / max(seconds, 1e-9), "cached": cached}
        return entry | {"suites": summaries, "is_plain": name == self.plain, "runtime": kind}

    def _summary(self, scores: TokenScores, sequences: Sequences) -> dict[str, Any]:
        summary = evaluation.summarize(scores, sequences, seed=self.seed)
        return summary | {"histogram": evaluation.histogram(scores.kl)}

    def details(self, name: str, kind: Runtime, groups: contributions.Grouping, count: int) -> dict[str, Any]:
        """What groups of a file's tensors contribute alone, and its `count` largest disagreements."""
        student, scored = self.students[name], self.scores[kind][name]
        found = contributions.disagreements(self.scorer, student, self.suites, scored, kind, count)
        apart = contributions.groups(self.scorer, student, self.suites, groups, self.seed)
        return {"disagreements": found, "groups": apart}

    def _joined(self, name: str, kind: Runtime) -> tuple[TokenScores, Sequences]:
        scored = self.scores[kind][name]
        return evaluation.join([(scored[suite.name].scores, suite.sequences) for suite in self.suites])

    def _pair(self, first: str, second: str, kind: Runtime, suite: Suite | None) -> list[TokenScores]:
        if suite is None:
            return [self._joined(name, kind)[0] for name in (first, second)]
        return [self.scores[kind][name][suite.name].scores for name in (first, second)]

    def _against_plain(self, name: str, kind: Runtime, suite: Suite | None = None) -> dict[str, Any]:
        """Recovery of plain rounding's gap, and the paired difference of the divergences."""
        scores, plain = self._pair(name, self.plain, kind, suite)
        recovery: dict[str, Any] = {"value": None, "interval": None}
        if name == self.plain:
            recovery["label"] = "plain rounding"
        else:
            found = evaluation.recovery(plain, scores, seed=self.seed)
            recovery = found or recovery | {"label": "gap within its interval"}
        change = evaluation.difference(scores, plain, seed=self.seed)
        mean = float(np.mean(plain.kl, dtype=np.float64))
        ratio = float(np.mean(scores.kl, dtype=np.float64)) / mean if mean > 0 else None
        return {"recovery": recovery, "difference_from_plain": change | {"ratio": ratio}}

    def differences(self, kind: Runtime) -> list[dict[str, Any]]:
        """KL of one file minus that of another, paired over the sequences of all suites, for every two files."""
        joined = {name: self._joined(name, kind)[0] for name in self.students}
        return [
            {"first": first, "second": second} | evaluation.difference(joined[first], joined[second], seed=self.seed)
            for first, second in itertools.combinations(joined, 2)
        ]

    def about(self, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The files, the baseline, the reference and the suites, as `compare` returns them."""
        first = entries[self.given[0]]
        losses = {name: {"cross_entropy": suite["cross_entropy_reference"]} for name, suite in first["suites"].items()}
        facts = {"name": self.scorer.checkpoint.name, "cross_entropy": first["cross_entropy_reference"]}
        return {
            "reference_facts": facts | self.scorer.facts | {"suites": losses},
            "suites": {suite.name: _about(suite) for suite in self.suites},
            "files": {name: entries[name] for name in self.given},
            "baseline": {"name": self.plain, "given": self.plain in self.given} | entries[self.plain],
        }


def _about(suite: Suite) -> dict[str, Any]:
    spoken = sum(roles is not None for roles in suite.sequences.roles)
    return {
        "source": Path(suite.source).name if Path(suite.source).exists() else suite.source,
        "kind": "conversations" if spoken == len(suite.sequences.roles) else "mixed" if spoken else "packed",
        "sequences": len(suite.sequences.tokens),
        "tokens": suite.tokens,
        "length": suite.length,
        "windows": suite.windows,
        "scored": "every token after the first of a sequence",
        "out_of_domain": suite.out_of_domain,
        "sha256": suite.sha256,
    }
