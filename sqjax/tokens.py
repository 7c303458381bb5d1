"""Text to tokens: the tokenizer with its chat template, packed windows, conversations with roles.

Let W denote windows, T the tokens of one.
"""

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import tokenizers
from jaxtyping import Int32

from sqjax.run import InputError
from sqjax.texts import Document, spoken

END_OF_TEXT = "<|endoftext|>"
TEMPLATE, PROMPT, RESPONSE = 0, 1, 2
ROLES = ("template", "prompt", "response")

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Conversation:
    """Tokens of one rendered conversation and the role of each: template, prompt or response."""

    tokens_T: Int32[np.ndarray, "T"]
    roles_T: Int32[np.ndarray, "T"]
    document: Document


@dataclass(frozen=True)
class Windows:
    """Packed windows, the domain that most of each one's tokens come from, and the documents that were read."""

    tokens_WT: Int32[np.ndarray, "W T"]
    domains: tuple[str, ...]
    documents: tuple[Document, ...]


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
        special = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token")}
        special = {key: token["content"] if isinstance(token, dict) else token for key, token in special.items()}
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
    documents = tuple(document for _, document in owners)
    return Windows(tokens_WT, tuple(documents[i].domain for i in middles), documents)


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
        for part in spoken(message):
            # Many templates strip what is said.
            for form in (part, part.strip()):
                if (start := text.find(form, position)) >= 0:
                    position = start + len(form)
                    roles[start:position] = role
                    break
    encoding = tokenizer.core.encode(text, add_special_tokens=False)
    starts = np.asarray([start for start, _ in encoding.offsets], np.int32).reshape(-1)
    return Conversation(np.asarray(encoding.ids, np.int32), roles[starts], document)
