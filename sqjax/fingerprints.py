"""What a model was made on, as hashes of runs of words: kept beside its file, and looked up before it is measured.

A *piece* is a document, or what is said in a conversation. It is represented by an eighth of its runs of 16 words,
letters folded, and by all of itself where it is shorter than that. The sample is by the hash's own value, so that a run
is in the sample of every text that holds it or of none's, wherever windows are cut: a million tokens are about 0.6 MB.

Texts that have nothing to do with each other share licence headers, quotations and common lines. Held-out text of five
domains against 16 million tokens of the same domains: 7 of 895 windows of 512 tokens were for the most part known, of
code 4% of all words and up to 217 words in a row, but of no document more than half. So an overlap is grave where a
document or conversation is for the most part known, 300 words in a row, or more than a tenth of the text.

References:
  Manber, Finding Similar Files in a Large File System, 1994.
  Brown et al., Language Models are Few-Shot Learners, 2020, appendix C (overlap by runs of 13 words).
"""

import functools
import hashlib
import io
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt64

from sqjax.run import InputError, atomic_path
from sqjax.texts import Document, spoken
from sqjax.tokens import TEMPLATE, Tokenizer

Prints = UInt64[np.ndarray, "N"]
_RUN = 16
_SAMPLED = 8
# Scripts that put no spaces between words: each letter is one.
_LETTERS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_LETTERS}]|[^\W{_LETTERS}]+")
# A greeting may be a whole conversation, in any two texts.
_FEW_WORDS = 32
_STRETCH = 300
_SHARE = 0.1
NOTHING: Prints = np.zeros(0, np.uint64)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces and their hashes


def piece_of(document: Document) -> str:
    """Returns a text, or what is said in a conversation."""
    if document.text is not None:
        return document.text
    return "\n".join(part for message in document.messages for part in spoken(message))


def pieces_of(
    tokens_T: Int32[np.ndarray, "T"], roles_T: Int32[np.ndarray, "T"] | None, tokenizer: Tokenizer
) -> list[str]:
    """Returns the text of packed tokens, document by document, or of a conversation without what its template adds."""
    if roles_T is None:
        ends = np.flatnonzero(tokens_T == tokenizer.end_of_text_id)
        return [tokenizer.decode(part[part != tokenizer.end_of_text_id]) for part in np.split(tokens_T, ends)]
    changes = np.flatnonzero(np.diff(roles_T != TEMPLATE)) + 1
    parts = zip(np.split(tokens_T, changes), np.split(roles_T, changes))
    return ["\n".join(tokenizer.decode(part) for part, role in parts if len(role) and role[0] != TEMPLATE)]


def words_of(piece: str) -> list[str]:
    """Returns the words of a text, letters folded, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", piece).casefold())


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode())


def _hashes(words: Sequence[str]) -> Prints:
    """Hashes of a piece: the sampled runs, or the smallest where none is; of all of it where it holds no run."""
    if len(words) < _RUN:
        return np.frombuffer(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), np.uint64)
    word = np.asarray([*map(_word_hash, words)], np.uint64)
    # A polynomial in an odd base modulo 2^64, then a mixing step: the low bits, by which runs are sampled, would else
    # depend on the low bits of the words alone.
    base, runs = np.uint64(0x9E3779B97F4A7C15), len(words) - _RUN + 1
    rolling = np.zeros(runs, np.uint64)
    for offset in range(_RUN):
        rolling = rolling * base + word[offset : offset + runs]
    rolling ^= rolling >> np.uint64(31)
    rolling *= np.uint64(0xBF58476D1CE4E5B9)
    rolling ^= rolling >> np.uint64(29)
    sampled = rolling[rolling % np.uint64(_SAMPLED) == 0]
    return sampled if len(sampled) else rolling.min(keepdims=True)


def prints_of(pieces: Iterable[str]) -> Prints:
    """Returns the sorted hashes of pieces; those without words have none."""
    found = [_hashes(words) for piece in pieces if (words := words_of(piece))]
    return union(*found)


def union(*prints: Prints) -> Prints:
    """Returns the sorted hashes of all of them."""
    return np.unique(np.concatenate([NOTHING, *prints]))


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


@dataclass(frozen=True)
class Sample:
    """Hashes of a text in its order: of each its value, the words that it stands for, and the piece that it is of."""

    hash_N: Prints
    words_N: Float64[np.ndarray, "N"]
    piece_N: Int64[np.ndarray, "N"]


@dataclass(frozen=True)
class Overlap:
    """What of a text is known.

    Attributes:
      share: of its words.
      pieces: documents and conversations of more than a few words, more than half of which are known.
      stretch: words of the longest passage that is known.
    """

    share: float
    pieces: int
    stretch: float

    @property
    def is_grave(self) -> bool:
        """Whether it is more than licence headers, quotations and common lines make up."""
        return self.pieces > 0 or self.stretch >= _STRETCH or self.share > _SHARE

    def __str__(self) -> str:
        whole = f", {self.pieces} documents or conversations for the most part" if self.pieces else ""
        return f"{self.share:.1%} of its words{whole}, up to {self.stretch:,.0f} words in a row"


def sample(pieces: Iterable[str]) -> Sample:
    """Hashes a text, given by its pieces."""
    hashes, words, owners = [NOTHING], [], []
    for index, found in enumerate(filter(None, map(words_of, pieces))):
        hashes.append(_hashes(found))
        words += [len(found) / len(hashes[-1])] * len(hashes[-1])
        owners += [index] * len(hashes[-1])
    return Sample(np.concatenate(hashes), np.asarray(words, np.float64), np.asarray(owners, np.int64))


def overlap(known: Prints, text: Sample) -> Overlap:
    """Looks a text up in sorted hashes."""
    if not (len(known) and len(text.hash_N)):
        return Overlap(0.0, 0, 0.0)
    # A hash beyond the last one is compared with the first, which is another.
    is_known_N = known[np.searchsorted(known, text.hash_N) % len(known)] == text.hash_N
    known_N = text.words_N * is_known_N
    words_P, known_P = (np.bincount(text.piece_N, weights) for weights in (text.words_N, known_N))
    # Hashes up to the next one that is not known are a passage.
    passages = np.bincount(np.cumsum(~is_known_N), known_N)
    pieces = int(((known_P > 0.5 * words_P) & (words_P >= _FEW_WORDS)).sum())
    return Overlap(float(known_N.sum() / text.words_N.sum()), pieces, float(passages.max()))


def known_documents(known: Prints, documents: Iterable[Document]) -> list[Document]:
    """Returns the documents and conversations more than half of whose words are known."""
    return [document for document in documents if overlap(known, sample([piece_of(document)])).share > 0.5]


# ---------------------------------------------------------------------------------------------------------------------
# Beside a file


@dataclass(frozen=True)
class Seen:
    """Hashes of all text that a file was made on, as far as it is known; `is_complete` where that is all of it."""

    prints: Prints = field(default_factory=lambda: NOTHING)
    is_complete: bool = True

    def __or__(self, other: "Seen") -> "Seen":
        return Seen(union(self.prints, other.prints), self.is_complete and other.is_complete)


UNKNOWN = Seen(is_complete=False)


def write_beside(path: str | Path, seen: Seen) -> dict[str, Any]:
    """Writes hashes to `path` with .seen.npy appended, and returns the record by which `read_beside` knows them.

    Raises:
      InputError: the folder cannot be written.
    """
    content = io.BytesIO()
    np.save(content, seen.prints)
    target = _beside(path)
    if len(seen.prints):
        with atomic_path(target) as temporary:
            temporary.write_bytes(content.getvalue())
    else:
        target.unlink(missing_ok=True)
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    return {"file": target.name, "hashes": len(seen.prints), "sha256": digest, "complete": seen.is_complete}


def read_beside(path: str | Path, record: Mapping[str, Any] | None) -> Seen:
    """Reads what `write_beside` wrote for `path`; UNKNOWN where there is no record, or the hashes are not those of it.

    A record without its hashes is said on standard error: somebody moved a file and left half of it behind.
    """
    if not isinstance(record, Mapping) or "hashes" not in record:
        return UNKNOWN
    complete = bool(record.get("complete"))
    if not record["hashes"]:
        return Seen(is_complete=complete)
    try:
        content = _beside(path).read_bytes()
        if hashlib.sha256(content).hexdigest() == record.get("sha256"):
            return Seen(np.load(io.BytesIO(content), allow_pickle=False), complete)
    except (OSError, ValueError):
        pass
    print(f"{_beside(path)} is missing or another file's: its text cannot be compared", file=sys.stderr)
    return UNKNOWN


def _beside(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f"{path.name}.seen.npy")


def refuse(found: Overlap, text: str, owner: str, remedy: str) -> None:
    """Raises InputError where an overlap is grave, naming the text and what was made on it."""
    if found.is_grave:
        raise InputError(f"{text} is calibration text, {found}: {owner} was made on it; {remedy}")
