"""Scores of many files against one reference on many suites, each computed once and kept by content."""

import contextlib
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sqjax import cache, evaluation, gguf_file, runtime
from sqjax.checkpoint import Checkpoint
from sqjax.evaluation import Sequences, TokenScores
from sqjax.measuring import Runtime, tokens_sha256
from sqjax.model import Qwen35
from sqjax.run import InputError, progress
from sqjax.sources import DType, load_model, open_model

# Of the reference's hidden states, kept while several files meet it.
_KEPT_BYTES = 1 << 31
# Files that llama.cpp holds open beside the reference.
_OPEN_FILES = 4


@dataclass(frozen=True)
class Suite:
    """Sequences under a name, and how they came about.

    Attributes:
      windows: how many were asked for; None for all there are.
      out_of_domain: whether it was declared to be unlike the calibration text.
    """

    name: str
    source: str
    sequences: Sequences
    length: int
    windows: int | None
    out_of_domain: bool = False

    @cached_property
    def sha256(self) -> str:
        """Of the tokens and of where each sequence ends."""
        lengths = ",".join(str(len(tokens)) for tokens in self.sequences.tokens)
        return hashlib.sha256(f"{tokens_sha256(self.sequences)} {lengths}".encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """Scored tokens: all but the first of each sequence."""
        return sum(len(tokens) - 1 for tokens in self.sequences.tokens)


@dataclass(frozen=True)
class Student:
    """A model to be scored: its name, a hash of its content, and how to get at it."""

    name: str
    identity: str
    open: Callable[[], Checkpoint]
    gguf: Callable[[], Path] | None = None


@dataclass(frozen=True)
class Scored:
    """Scores of a student on a suite, the seconds that they took when they were computed, and whether they were."""

    scores: TokenScores
    seconds: float
    cached: bool


def model_facts(spec: str | Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what a table states of a model, be it a GGUF file or a checkpoint of another form.

    Keys as of `gguf_file.inspect`, without its metadata. Bits of a checkpoint are counted in GGUF layout, matrices in
    their stored type; its SHA-256 is that of its tensors' names and bytes in that layout.
    """
    path = Path(spec)
    if path.is_file():
        facts = gguf_file.inspect(path)
        return {name: fact for name, fact in facts.items() if name != "metadata"}
    digest, types, tensor_bytes, parameters = hashlib.sha256(repr(asdict(checkpoint.config)).encode()), Counter(), 0, 0
    for name in sorted(checkpoint.tensors):
        tensor = np.ascontiguousarray(checkpoint.tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.view(np.uint8))
        types[{"bfloat16": "BF16", "float16": "F16"}.get(tensor.dtype.name, "F32")] += 1
        tensor_bytes, parameters = tensor_bytes + tensor.nbytes, parameters + tensor.size
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    return {
        "file_bytes": stored or tensor_bytes,
        "tensor_bytes": tensor_bytes,
        "parameters": parameters,
        "bits_per_weight": 8 * tensor_bytes / parameters,
        "types": dict(types.most_common()),
        "sha256": digest.hexdigest(),
        "provenance": None,
    }


class Scorer:
    """Scores students against a reference, in a `with` block that holds its temporary files.

    Args:
      spec: Hugging Face folder, hub id or GGUF file of the reference.
      dtype: of the matrices in JAX.
      fresh: compute even what is kept.

    Raises:
      InputError: the reference cannot be read.
    """

    def __init__(self, spec: str | Path, *, dtype: DType = "f32", fresh: bool = False):
        self.checkpoint = open_model(spec)
        self.facts = model_facts(spec, self.checkpoint)
        self.dtype, self.fresh = dtype, fresh
        self._stack = contextlib.ExitStack()
        self._hidden: dict[str, list[np.ndarray]] = {}

    def __enter__(self) -> "Scorer":
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sqjax-")))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @cached_property
    def reference(self) -> Qwen35:
        """The reference on the device."""
        return load_model(self.checkpoint, dtype=self.dtype)

    @cached_property
    def reference_file(self) -> Path:
        """The reference as an F32 file: in llama.cpp, matrices of fewer bits would have their activations rounded."""
        return self.as_gguf("reference", self.checkpoint, "f32")

    def as_gguf(self, name: str, checkpoint: Checkpoint, file_type: str) -> Path:
        """Writes a checkpoint into the temporary folder."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.{file_type}.gguf"
        if not path.exists():
            gguf_file.write_gguf(path, checkpoint, file_type=file_type)
        return path

    def student(self, spec: str | Path, name: str) -> tuple[Student, dict[str, Any]]:
        """Returns a file or checkpoint as a student, and its facts.

        Raises:
          InputError: it cannot be read, or its vocabulary is another.
        """
        checkpoint = open_model(spec)
        ours, theirs = self.checkpoint.config.vocab_size, checkpoint.config.vocab_size
        if ours != theirs:
            raise InputError(
                f"{name} has {theirs} tokens, the reference {ours}; give the model that the file was made from"
            )
        facts = model_facts(spec, checkpoint)
        gguf = lambda: Path(spec) if Path(spec).is_file() else self.as_gguf(name, checkpoint, "f32")  # noqa: E731
        return Student(name, facts["sha256"], lambda: checkpoint, gguf), facts

    def is_plain(self, student: Student) -> bool:
        """Whether a file is the plain rounding of the reference, whoever wrote it: a sample of its blocks says so."""
        checkpoint, shapes = student.open(), self.checkpoint.config.tensor_shapes()
        expected = {name: gguf_file.tensor_type(name, shape, "q4_k").name for name, shape in shapes.items()}
        if getattr(checkpoint.tensors, "types", None) != expected or "Q4_K" not in expected.values():
            return False
        name = self.key(student, detail="plain")
        kept = cache.load(name)
        if kept is None:
            rows = {name: self.checkpoint.tensors[name][:8] for name, kind in expected.items() if kind == "Q4_K"}
            same = [checkpoint.tensors.is_plain(name, weight_OI).ravel() for name, weight_OI in rows.items()]
            kept = {}, {"share": float(np.mean(np.concatenate(same)))}
            cache.store(name, *kept)
        # llama.cpp's compilers differ in the last bit of a sum, which now and then turns a code: not in every other
        # block.
        return kept[1]["share"] > 0.5

    def plain(self) -> tuple[Student, dict[str, Any]]:
        """Returns llama.cpp's plain rounding of the reference, and its facts; it is written when it is needed."""
        path = lambda: self.as_gguf("plain", self.checkpoint, "q4_k")  # noqa: E731
        name = cache.key(plain=self.facts["sha256"], name=self.checkpoint.name)
        kept = None if self.fresh else cache.load(name)
        facts = kept[1] if kept else model_facts(path(), self.checkpoint)
        if not kept:
            cache.store(name, {}, facts)
        return Student("plain Q4_K", facts["sha256"], lambda: gguf_file.read_gguf(path()), path), facts

    def key(self, student: Student, kind: Runtime = "jax", **parts: Any) -> str:
        """Returns the key under which something of a student and this reference is kept."""
        dtype = self.dtype if kind == "jax" else None
        models = {"student": student.identity, "reference": self.facts["sha256"]}
        return cache.key(kind=kind, dtype=dtype, device=jax.default_backend(), **models, **parts)

    def score(
        self, students: Sequence[Student], suites: Sequence[Suite], kind: Runtime = "jax"
    ) -> dict[str, dict[str, Scored]]:
        """Returns the scores of every student on every suite: student's name -> suite's name -> scores.

        What is computed is kept at once, so that an interrupted table goes on where it stopped.

        Raises:
          InputError: a file cannot be read or run, or the text has tokens outside of the vocabulary.
        """
        found = {
            (student.name, suite.name): self._kept(student, suite, kind) for student in students for suite in suites
        }
        missing = [student for student in students if any(found[student.name, suite.name] is None for suite in suites)]
        compute = self._in_jax if kind == "jax" else self._in_llama_cpp
        wanted = lambda student, suite: found[student.name, suite.name] is None  # noqa: E731
        for student, suite, scored in compute(missing, suites, wanted):
            columns = {name: getattr(scored.scores, name) for name in ("kl", "loss", "loss_reference", "agree")}
            cache.store(self.key(student, kind, suite=suite.sha256), columns, {"seconds": scored.seconds})
            found[student.name, suite.name] = scored
        return {student.name: {suite.name: found[student.name, suite.name] for suite in suites} for student in students}

    def _kept(self, student: Student, suite: Suite, kind: Runtime) -> Scored | None:
        kept = None if self.fresh else cache.load(self.key(student, kind, suite=suite.sha256))
        if kept is None:
            return None
        columns, record = kept
        ends = np.cumsum([len(tokens) - 1 for tokens in suite.sequences.tokens])[:-1]
        rows = zip(*(np.split(columns[name], ends) for name in ("kl", "loss", "loss_reference", "agree")))
        return Scored(evaluation.collect(suite.sequences, list(rows)), record["seconds"], True)

    def _in_jax(self, students, suites, wanted) -> Iterator[tuple[Student, Suite, Scored]]:
        for student in students:
            model = load_model(student.open(), dtype=self.dtype)
            for suite in suites:
                if not wanted(student, suite):
                    continue
                hidden = self._hidden_states(suite) if len(students) > 1 else None
                start = time.monotonic()
                with progress(f"scoring {student.name} on {suite.name}") as report:
                    scores = evaluation.score(self.reference, model, suite.sequences, hidden=hidden, progress=report)
                yield student, suite, Scored(scores, time.monotonic() - start, False)

    def _hidden_states(self, suite: Suite) -> list[np.ndarray] | None:
        if suite.name not in self._hidden:
            held = sum(array.nbytes for arrays in self._hidden.values() for array in arrays)
            # Batches are padded to buckets of powers of two.
            if held + 8 * suite.tokens * self.checkpoint.config.hidden_size > _KEPT_BYTES:
                return None
            self._hidden[suite.name] = evaluation.hidden_states(self.reference, suite.sequences)
        return self._hidden[suite.name]

    def _in_llama_cpp(self, students, suites, wanted) -> Iterator[tuple[Student, Suite, Scored]]:
        for suite in suites:
            left = [student for student in students if wanted(student, suite)]
            for start in range(0, len(left), _OPEN_FILES):
                together = left[start : start + _OPEN_FILES]
                begin = time.monotonic()
                names = ", ".join(student.name for student in together)
                with progress(f"llama.cpp: {names} on {suite.name}") as report:
                    files = [student.gguf() for student in together]
                    results = runtime.score_all(self.reference_file, files, suite.sequences, progress=report)
                seconds = (time.monotonic() - begin) / len(together)
                for student, scores in zip(together, results):
                    yield student, suite, Scored(scores, seconds, False)
