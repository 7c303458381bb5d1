"""Text and conversations from files, folders and hub data sets."""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sqjax.run import InputError

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as chat messages; exactly one of the two is set."""

    text: str | None
    messages: tuple[Mapping, ...] | None
    source: str
    domain: str


@dataclass(frozen=True)
class Texts:
    """Documents of several sources, read anew and lazily at every iteration: a data set may be larger than memory.

    Without `seed` the order is that of the sources; with it, files are permuted as a whole, data sets in a buffer, and
    the two kinds take turns.
    """

    files: tuple[Path | str, ...]
    seed: int | None = None

    def __iter__(self) -> Iterator[Document]:
        if self.seed is None:
            for file in self.files:
                yield from _read_hub(file, None) if isinstance(file, str) else _read_file(file)
            return
        local = [document for file in self.files if not isinstance(file, str) for document in _read_file(file)]
        order = np.random.default_rng(self.seed).permutation(len(local))
        streams = [_read_hub(file, self.seed) for file in self.files if isinstance(file, str)]
        for row in itertools.zip_longest((local[i] for i in order), *streams):
            yield from (document for document in row if document is not None)

    def by_kind(self) -> tuple["Texts", "Texts"]:
        """Splits the sources into those of plain text and those of conversations, as their first documents are."""
        spoken = {file for file in self.files if (d := next(iter(Texts((file,))), None)) and d.messages is not None}
        return (
            Texts(tuple(file for file in self.files if file not in spoken), self.seed),
            Texts(tuple(file for file in self.files if file in spoken), self.seed),
        )


def read_texts(sources: Sequence[str | Path], *, seed: int | None = None) -> Texts:
    """Returns the documents of files, folders and hub data sets, to be iterated over as often as needed.

    A source is a `.txt` (one document), a `.jsonl` (a line has `text` or `messages`, perhaps `domain`), either with
    `.gz`, a folder of them (in the order of their names), or a hub data set `owner/name[:configuration[:split]]`,
    which is streamed.

    Raises:
      InputError: a source does not exist; while iterating, it cannot be read or a line lacks `text` and `messages`.
    """
    return Texts(tuple(file for source in sources for file in _resolve(source)), seed)


def _resolve(source: str | Path) -> list[Path | str]:
    """Files that a source stands for; a hub id stays a string."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(_SUFFIXES))
        if not files:
            raise InputError(f"{path} holds no text; give a folder with {', '.join(_SUFFIXES)}")
        return list(files)
    if path.exists():
        if not path.name.endswith(_SUFFIXES):
            raise InputError(f"{path} is no text that can be read; give {', '.join(_SUFFIXES)} or a folder of them")
        return [path]
    if path.name.endswith(_SUFFIXES) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]*){0,2}", str(source)):
        raise InputError(f"{source} does not exist; give a text file, a folder, or a hub data set id")
    return [str(source)]


def _read_file(path: Path) -> Iterator[Document]:
    domain = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if path.name.removesuffix(".gz").endswith(".txt"):
                yield Document(file.read(), None, str(path), domain)
                return
            for number, line in enumerate(file, 1):
                if line := line.strip().lstrip("\ufeff"):
                    yield _parse_line(line, f"{path}:{number}", domain, str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _parse_line(line: str, place: str, domain: str, source: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}") from error
    return _document(row, place, domain, source)


def _document(row: Mapping, place: str, domain: str, source: str) -> Document:
    if not isinstance(row, Mapping) or ("text" not in row and "messages" not in row):
        fields = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise InputError(f"{place} has neither `text` nor `messages` (it has: {fields})")
    stated = row.get("domain")
    domain = stated if isinstance(stated, str) else domain
    messages = row.get("messages")
    if messages is None:
        if not isinstance(row.get("text"), str):
            raise InputError(f"{place}: `text` must be a string")
        return Document(row["text"], None, source, domain)
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise InputError(f"{place}: `messages` must be a list of objects with `role` and `content`")
    return Document(None, tuple(messages), source, domain)


def _read_hub(source: str, seed: int | None) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source} is neither a file nor a folder, and hub data sets need: pip install 'sqjax[hub]'"
        ) from error
    name, configuration, split = [*source.split(":"), "", ""][:3]
    try:
        stream = datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=10_000)
        for number, row in enumerate(stream):
            yield _document(row, f"{source}[{number}]", name.rsplit("/", 1)[-1], source)
    except InputError:
        raise
    except Exception as error:  # the client raises dozens of kinds: network, permission, missing names
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{source} is neither a file here nor a data set that can be read ({reason}); check name and network"
        ) from error


def spoken(message: Mapping) -> Iterator[str]:
    """What a message says, in the order in which templates print it."""
    for content in (message.get("reasoning_content"), message.get("content")):
        parts = content if isinstance(content, (list, tuple)) else [content]
        for part in parts:
            part = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(part, str) and part.strip():
                yield part
