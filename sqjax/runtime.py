"""The same scores from real llama.cpp, through the C interface that the xllamacpp wheel exports.

Let B denote sequences decoded together, T time, V vocabulary. Files run as llama.cpp runs them by default: activations
of quantized matrices rounded to 8 bits, flash attention, keys and values in float16.
Source: include/llama.h of llama.cpp.
"""

import contextlib
import ctypes
import functools
import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, Int32

from sqjax import evaluation
from sqjax.evaluation import Sequences, TokenScores
from sqjax.run import InputError

_PIECE = 512
_CONTEXT_STEP = 256
_LOGITS_AT_ONCE = 1 << 27
_TOGETHER = 4
_ERROR_LEVEL = 4
_ROWS_AT_ONCE = 256


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _ContextParams(ctypes.Structure):
    """The head of llama_context_params; the tail, whose members vary with the version, is carried as it comes."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")),
        ("tail", ctypes.c_uint8 * 512),
    )


class _ModelParams(ctypes.Structure):
    """Larger than any version of llama_model_params; passed by value and never touched."""

    _fields_ = (("opaque", ctypes.c_uint8 * 512),)


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_POINTER, _INT, _UINT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
_LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _POINTER)
_SIGNATURES = {
    "llama_log_set": (None, _LOGGER, _POINTER),
    "llama_backend_init": (None,),
    "llama_model_default_params": (_ModelParams,),
    "llama_context_default_params": (_ContextParams,),
    "llama_model_load_from_file": (_POINTER, ctypes.c_char_p, _ModelParams),
    "llama_model_free": (None, _POINTER),
    "llama_init_from_model": (_POINTER, _POINTER, _ContextParams),
    "llama_free": (None, _POINTER),
    "llama_model_get_vocab": (_POINTER, _POINTER),
    "llama_vocab_n_tokens": (_INT, _POINTER),
    "llama_get_memory": (_POINTER, _POINTER),
    "llama_memory_clear": (None, _POINTER, ctypes.c_bool),
    "llama_decode": (_INT, _POINTER, _Batch),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), _POINTER),
    "llama_n_batch": (_UINT, _POINTER),
    "llama_n_seq_max": (_UINT, _POINTER),
    "llama_n_ctx_seq": (_UINT, _POINTER),
}


class _Library:
    """llama.cpp's functions, and what it last complained of."""

    def __init__(self):
        try:
            import xllamacpp
        except ImportError as error:
            raise InputError("llama.cpp is not installed; pip install 'sqjax[runtime]'") from error
        binaries = glob.glob(os.path.join(os.path.dirname(xllamacpp.__file__), "xllamacpp*.so"))
        try:
            library = ctypes.CDLL(binaries[0])
            for name, (result, *arguments) in _SIGNATURES.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        except (IndexError, AttributeError, OSError) as error:
            raise InputError(f"this build of xllamacpp does not export llama.cpp's C interface ({error})") from error
        self.complaint = "no reason given"
        self._logger = _LOGGER(self._log)  # kept: llama.cpp calls it for as long as the process lives
        self.llama_log_set(self._logger, None)
        self.llama_backend_init()

    def _log(self, level: int, text: bytes, _) -> None:
        if level == _ERROR_LEVEL and text.strip():
            self.complaint = text.decode(errors="replace").strip()


_library = functools.cache(_Library)


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, to be used in a `with` block.

    Args:
      path: the file.
      length: tokens of the longest sequence.
      sequences: how many are decoded together, at most; fewer where their logits would fill the memory.

    Raises:
      InputError: llama.cpp is missing, or does not load the file.
    """

    def __init__(self, path: str | Path, *, length: int, sequences: int = 1):
        self.library = library = _library()
        self._model = library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params())
        if not self._model:
            raise InputError(f"llama.cpp does not load {path}: {library.complaint}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self.sequences = sequences = max(1, min(sequences, _LOGITS_AT_ONCE // (_PIECE * self.vocabulary)))
        parameters = library.llama_context_default_params()
        # A sequence's share of the context comes in steps; without room for outputs only the last token has logits.
        padded = -(-length // _CONTEXT_STEP) * _CONTEXT_STEP
        parameters.n_seq_max, parameters.n_ctx = sequences, sequences * padded
        tokens = sequences * min(_PIECE, padded)
        parameters.n_batch = parameters.n_outputs_max = parameters.n_outputs_max_per_seq = tokens
        parameters.n_ubatch = min(_PIECE, tokens)
        # Its own default counts the machine's cores, not those that this process may use.
        parameters.n_threads = parameters.n_threads_batch = _cores()
        self._context = library.llama_init_from_model(self._model, parameters)
        # What the context says of itself shows that the structure was laid out as declared here.
        if not self._context or not (
            library.llama_n_seq_max(self._context) == sequences
            and library.llama_n_batch(self._context) == tokens
            and library.llama_n_ctx_seq(self._context) >= length
        ):
            self.close()
            raise InputError(f"llama.cpp makes no context for {path}: {library.complaint}; try another xllamacpp")

    def logits(self, tokens_BT: Int32[np.ndarray, "B T"]) -> Iterator[Float32[np.ndarray, "B P V"]]:
        """Yields logits after every token of up to `sequences` sequences, 512 positions P at a time.

        A yielded array is llama.cpp's own memory and lasts until the next one.

        Raises:
          InputError: llama.cpp fails to decode.
        """
        library = self.library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        for start in range(0, tokens_BT.shape[1], _PIECE):
            piece_BP = np.ascontiguousarray(tokens_BT[:, start : start + _PIECE], np.int32)
            batch, count = piece_BP.shape
            total = piece_BP.size
            positions = np.tile(np.arange(start, start + count, dtype=np.int32), batch)
            ones, output = np.ones(total, np.int32), np.ones(total, np.int8)
            owner = np.repeat(np.arange(batch, dtype=np.int32), count)
            owners = owner.ctypes.data + np.arange(total, dtype=np.uintp) * np.uintp(owner.itemsize)
            arrays = (piece_BP, None, positions, ones, owners, output)
            addresses = [None if array is None else array.ctypes.data for array in arrays]
            if code := library.llama_decode(self._context, _Batch(total, *addresses)):
                raise InputError(f"llama.cpp cannot decode ({code}): {library.complaint}")
            flat = np.ctypeslib.as_array(library.llama_get_logits(self._context), (total, self.vocabulary))
            yield flat.reshape(batch, count, self.vocabulary)

    def close(self) -> None:
        """Frees the file and its context."""
        if getattr(self, "_context", None):
            self.library.llama_free(self._context)
        if self._model:
            self.library.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def score(
    reference: str | Path,
    file: str | Path,
    sequences: Sequences,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Scores a GGUF file against its reference as a GGUF file, both run in llama.cpp; else as `evaluation.score`.

    Raises:
      InputError: llama.cpp is missing or does not load one of the files, or their vocabularies differ.
    """
    return score_all(reference, [file], sequences, progress=progress)[0]


def score_all(
    reference: str | Path,
    files: Iterable[str | Path],
    sequences: Sequences,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[TokenScores]:
    """Scores several GGUF files, which share one run of their reference; else as `score`."""
    longest = max(len(tokens) for tokens in sequences.tokens)
    done, total = 0, sum(len(tokens) - 1 for tokens in sequences.tokens)
    together = min(_TOGETHER, len(sequences.tokens))
    with contextlib.ExitStack() as stack:
        teacher, *students = (
            stack.enter_context(LlamaCpp(path, length=longest, sequences=together)) for path in (reference, *files)
        )
        for student in students:
            if teacher.vocabulary != student.vocabulary:
                raise InputError(
                    f"the vocabularies differ: {teacher.vocabulary} and {student.vocabulary} tokens; "
                    "give the model that the file was made from"
                )
        results = [[None] * len(sequences.tokens) for _ in students]
        for rows in _groups(sequences, teacher.sequences):
            scores = _score_rows(teacher, students, [sequences.tokens[index] for index in rows])
            for result, columns in zip(results, scores):
                for index, columns_of_row in zip(rows, columns):
                    result[index] = columns_of_row
            done += sum(len(sequences.tokens[index]) - 1 for index in rows)
            if progress is not None:
                progress(done, total)
    return [evaluation.collect(sequences, result) for result in results]


def logits_at(
    file: str | Path, tokens: list[Int32[np.ndarray, "T"]], positions: list[list[int]]
) -> list[Float32[np.ndarray, "P V"]]:
    """Returns, for each sequence, the logits after the tokens at its `positions`.

    Raises:
      InputError: llama.cpp is missing or does not load the file.
    """
    with LlamaCpp(file, length=max(len(row) for row in tokens)) as model:
        return [_rows_at(model, *pair) for pair in zip(tokens, positions)]


def _rows_at(model: LlamaCpp, tokens_T: np.ndarray, positions: list[int]) -> np.ndarray:
    kept, start = {}, 0
    for logits_BPV in model.logits(tokens_T[None]):
        end = start + logits_BPV.shape[1]
        kept |= {place: logits_BPV[0, place - start].copy() for place in positions if start <= place < end}
        start = end
    return np.stack([kept[place] for place in positions])


def _groups(sequences: Sequences, size: int) -> Iterator[list[int]]:
    """Indices of sequences of about one length, so that little is decoded in vain."""
    order = sorted(range(len(sequences.tokens)), key=lambda index: len(sequences.tokens[index]))
    return (order[start : start + size] for start in range(0, len(order), size))


_divergence = jax.jit(evaluation.divergence)


def _score_rows(teacher: LlamaCpp, students: list[LlamaCpp], tokens: list[np.ndarray]) -> list[list[list[np.ndarray]]]:
    """Scores of a few sequences: student by student, row by row, column by column."""
    longest = max(len(row) for row in tokens)
    tokens_BT = np.zeros((len(tokens), longest), np.int32)
    for row, ids in enumerate(tokens):
        tokens_BT[row, : len(ids)] = ids
    target_BT = np.roll(tokens_BT, -1, axis=1)
    pieces, start = [[] for _ in students], 0
    for logits, *quantized in zip(teacher.logits(tokens_BT), *(student.logits(tokens_BT) for student in students)):
        batch, count, width = logits.shape
        target_N = target_BT[:, start : start + count].reshape(-1)
        for parts, student_logits in zip(pieces, quantized):
            columns = _in_steps(logits.reshape(-1, width), student_logits.reshape(-1, width), target_N)
            parts.append([column.reshape(batch, count) for column in columns])
        start += count
    joined = [[np.concatenate(column, axis=1) for column in zip(*parts)] for parts in pieces]
    return [[[x_BT[row, : len(ids) - 1] for x_BT in x] for row, ids in enumerate(tokens)] for x in joined]


def _in_steps(logits_NV: np.ndarray, student_NV: np.ndarray, target_N: np.ndarray) -> list[np.ndarray]:
    """Divergence of rows, a fixed number at a time, so that one shape is compiled."""
    parts = []
    for start in range(0, len(target_N), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        missing = max(0, start + _ROWS_AT_ONCE - len(target_N))
        step = [np.pad(x[rows], ((0, missing), (0, 0))) for x in (logits_NV, student_NV)]
        scores = _divergence(*step, np.pad(target_N[rows], (0, missing)))
        parts.append([np.asarray(x)[: _ROWS_AT_ONCE - missing] for x in scores])
    return [np.concatenate(column) for column in zip(*parts)]
