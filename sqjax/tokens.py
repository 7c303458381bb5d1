"""Text to tokens: the tokenizer with its chat template, sources of text, packed windows, conversations, overlap.

Let W denote windows, T the tokens of one.
"""

import datetime
import gzip
import hashlib
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import tokenizers
from jaxtyping import Int32, UInt64

from sqjax.run import InputError

END_OF_TEXT = "<|endoftext|>"
TEMPLATE, PROMPT, RESPONSE = 0, 1, 2
ROLES = ("template", "prompt", "response")

_SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_BATCH_CHARACTERS = 1 << 20
_SHINGLE_WORDS = 16
_SHINGLE_SAMPLE = 8


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as chat messages; exactly one of the two is set."""

    text: str | None
    messages: tuple[Mapping, ...] | None
    source: str
    domain: str


@dataclass(frozen=True)
class Conversation:
    """Tokens of one rendered conversation and the role of each: template, prompt or response."""

    tokens_T: Int32[np.ndarray, "T"]
    roles_T: Int32[np.ndarray, "T"]
    document: Document


@dataclass(frozen=True)
class Windows:
    """Packed windows, and of each the domain and source that most of its tokens come from."""

    tokens_WT: Int32[np.ndarray, "W T"]
    domains: tuple[str, ...]
    sources: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer, its chat template (jinja source) and its special tokens, as strings."""

    core: tokenizers.Tokenizer
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja of a Hugging Face folder.

        Raises:
          InputError: tokenizer.json is missing, or one of the files is broken.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder} has no tokenizer.json; save the model with its fast tokenizer")
        try:
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        config_path = folder / "tokenizer_config.json"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{config_path} is not JSON: {error}") from error
        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        special = {key: _token_text(config.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        return cls(core=core, chat_template=template, **special)

    def __post_init__(self):
        self.core.no_truncation()
        self.core.no_padding()

    def token_id(self, token: str | None) -> int | None:
        return None if token is None else self.core.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self.token_id(self.pad_token)

    @property
    def end_of_text_id(self) -> int:
        """The id that closes a document: `<|endoftext|>`, or the end-of-sequence token where that is unknown."""
        for token in (END_OF_TEXT, self.eos_token):
            if (identity := self.token_id(token)) is not None:
                return identity
        raise InputError(f"the tokenizer has neither {END_OF_TEXT} nor an end-of-sequence token")

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        return np.asarray(self.core.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.core.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)

    def render(self, messages: Sequence[Mapping], *, add_generation_prompt: bool = False, **variables) -> str:
        """Renders chat messages as transformers' `apply_chat_template(..., tokenize=False)` does.

        Raises:
          InputError: the model has no chat template, or the template rejects the messages.
        """
        import jinja2

        if self._template is None:
            raise InputError("the model has no chat template, which `messages` need; give texts with a field `text`")
        names = {"tools": None, "documents": None, "bos_token": self.bos_token or "", "eos_token": self.eos_token or ""}
        names |= {"pad_token": self.pad_token or ""} | variables
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **names)
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"the chat template rejects the messages: {error}") from error

    @cached_property
    def _template(self):
        """The compiled template; the sandbox matters because a template is code that came with the weights."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            return environment.from_string(self.chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is not valid jinja: {error}") from error


def _token_text(token: str | Mapping | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes HTML, which no chat model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _generation_tag() -> type:
    """transformers' block that marks what an assistant says, `{% generation %}`; here it renders its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


# ---------------------------------------------------------------------------------------------------------------------
# Sources


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
        missing = object()
        for row in itertools.zip_longest((local[i] for i in order), *streams, fillvalue=missing):
            yield from (document for document in row if document is not missing)


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
        raise InputError(f"data set {source} cannot be read ({reason}); check the name and the network") from error


# ---------------------------------------------------------------------------------------------------------------------
# Windows and conversations


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, Int32[np.ndarray, "T"]]]:
    """Yields each document with its tokens, encoded in parallel batches of about a million characters.

    Conversations are rendered with the chat template first. No token is added.
    """
    batch: list[tuple[Document, str]] = []
    characters = 0
    for document in documents:
        text = document.text if document.messages is None else tokenizer.render(document.messages)
        batch.append((document, text))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield from _tokenize_batch(batch, tokenizer)
            batch, characters = [], 0
    yield from _tokenize_batch(batch, tokenizer)


def _tokenize_batch(batch, tokenizer):
    encodings = tokenizer.core.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    for (document, _), encoding in zip(batch, encodings):
        yield document, np.asarray(encoding.ids, np.int32)


def pack_windows(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, windows: int | None = None
) -> Windows:
    """Joins documents, each closed by the end-of-text token, and cuts consecutive windows of `length` tokens.

    The last incomplete window is dropped and the first `windows` are kept; no more text is read than they need.

    Raises:
      InputError: `length` is below 2 or `windows` below 1, or the text does not fill one window.
    """
    if length < 2 or (windows is not None and windows < 1):
        raise InputError(f"windows of {length} tokens, {windows} of them: need at least 2 tokens and 1 window")
    needed = None if windows is None else windows * length
    end = np.asarray([tokenizer.end_of_text_id], np.int32)
    pieces, owners, total = [], [], 0
    for document, tokens in tokenize(documents, tokenizer):
        pieces += [tokens, end]
        total += len(tokens) + 1
        owners.append((total, document))
        if needed is not None and total >= needed:
            break
    count = total // length if windows is None else min(windows, total // length)
    if count == 0:
        raise InputError(f"the text has {total} tokens and does not fill one window of {length}; give more text")
    tokens_WT = np.concatenate(pieces)[: count * length].reshape(count, length)
    ends = np.asarray([end for end, _ in owners])
    # A window belongs to the document at its middle token: one that owns half of the window or more owns that one.
    middles = np.searchsorted(ends, np.arange(count) * length + length // 2, side="right")
    chosen = [owners[i][1] for i in middles]
    return Windows(tokens_WT, tuple(d.domain for d in chosen), tuple(d.source for d in chosen))


def pack(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, windows: int | None = None
) -> Int32[np.ndarray, "W T"]:
    """Returns the tokens of `pack_windows`."""
    return pack_windows(documents, tokenizer, length, windows).tokens_WT


def encode_conversation(document: Document, tokenizer: Tokenizer) -> Conversation:
    """Renders and encodes one conversation; a token's role is that of the text in which it begins.

    What an assistant says is response, what others say is prompt, and everything the template adds is template.

    Raises:
      InputError: the chat template is missing or rejects the messages.
    """
    text = tokenizer.render(document.messages)
    roles = np.full(len(text) + 1, TEMPLATE, np.int32)
    position = 0
    for message in document.messages:
        role = RESPONSE if message["role"] == "assistant" else PROMPT
        for part in _spoken(message):
            start = text.find(part, position)
            if start >= 0:
                position = start + len(part)
                roles[start:position] = role
    encoding = tokenizer.core.encode(text, add_special_tokens=False)
    starts = np.asarray([start for start, _ in encoding.offsets], np.int32).reshape(-1)
    return Conversation(np.asarray(encoding.ids, np.int32), roles[starts], document)


def _spoken(message: Mapping) -> Iterator[str]:
    """What a message says, in the order templates print it; many templates strip it, so it is stripped here."""
    for content in (message.get("reasoning_content"), message.get("content")):
        parts = content if isinstance(content, (list, tuple)) else [content]
        for part in parts:
            part = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(part, str) and part.strip():
                yield part.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


def fingerprints(documents: Iterable[Document]) -> UInt64[np.ndarray, "N"]:
    """Returns sorted hashes of whole documents and of an eighth of their runs of 16 words, letters folded.

    The sample is by the hash's own value, so the same run is in every document's sample or in none's (Manber,
    Finding Similar Files in a Large File System, 1994).
    """
    parts = [_document_prints(document) for document in documents]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def overlap(
    calibration: Iterable[Document] | UInt64[np.ndarray, "N"], evaluation: Iterable[Document]
) -> list[Document]:
    """Returns the evaluated documents whose text is for the most part in the calibration text too.

    `calibration` is documents or their `fingerprints`. A document counts when it is there as a whole or when more than
    half of its sampled runs of 16 words are: a licence header shared by two files does not make them one.
    """
    known = calibration if isinstance(calibration, np.ndarray) else fingerprints(calibration)
    if not len(known):
        return []
    found = []
    for document in evaluation:
        prints = _document_prints(document)
        seen = known[np.searchsorted(known, prints).clip(max=len(known) - 1)] == prints
        if seen[0] or (len(seen) > 1 and seen[1:].mean() > 0.5):
            found.append(document)
    return found


def _document_prints(document: Document) -> UInt64[np.ndarray, "N"]:
    text = document.text
    if text is None:
        text = "\n".join(part for message in document.messages for part in _spoken(message))
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    digest = hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()
    whole = np.frombuffer(digest, np.uint64)
    if len(words) < _SHINGLE_WORDS:
        return whole
    word = np.asarray([zlib.crc32(w.encode()) for w in words], np.uint64)
    # A polynomial in an odd base modulo 2^64, then a mixing step: the low bits, by which runs are sampled, would else
    # depend on the low bits of the words alone.
    base, runs = np.uint64(0x9E3779B97F4A7C15), len(words) - _SHINGLE_WORDS + 1
    rolling = np.zeros(runs, np.uint64)
    for offset in range(_SHINGLE_WORDS):
        rolling = rolling * base + word[offset : offset + runs]
    rolling ^= rolling >> np.uint64(31)
    rolling *= np.uint64(0xBF58476D1CE4E5B9)
    rolling ^= rolling >> np.uint64(29)
    return np.concatenate([whole, rolling[rolling % np.uint64(_SHINGLE_SAMPLE) == 0]])
