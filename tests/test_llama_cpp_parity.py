"""Written files in stock llama.cpp: the same function as ours in float32, the same tokens as `tokenizers`, greedy text.

SQJAX_REFERENCE names a folder with further checkpoints (nano34), SQJAX_TEXT one with held-out text (heldout_*.jsonl).
"""

import json
import os
import struct
import unicodedata
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoint

import sqjax
from sqjax import runtime
from sqjax.checkpoint import Checkpoint, load_checkpoint
from sqjax.gguf_file import read_gguf, write_gguf
from sqjax.model import Qwen35

xllamacpp = pytest.importorskip("xllamacpp")

PACKAGE = Path(sqjax.__file__).parent
REFERENCE = Path(os.environ.get("SQJAX_REFERENCE", ""))
TEXT = Path(os.environ.get("SQJAX_TEXT", ""))
PASSAGE = (
    "The town stood where two rivers met, and for as long as anyone could remember its people had argued about the "
    "bridge. In 1872 the council voted, by eleven to nine, to build it of stone; the mason asked for three years."
)
TRICKY = [
    "",
    " ",
    "a",
    "\n",
    "  \n\n \t x\r\n\r\n  y   ",
    "I'm you'RE it's WE'LL they'd 'tis ''quoted''",
    "x=1;y=22;z=333.4444e-5 0xDEADBEEF 1,234,567 ½ ² ٣ ४",
    "snake_case camelCase kebab-case //comment /* block */ <!-- html --> {{jinja}}",
    "naïve façade Ångström ǅ ﬁ ß İ ı",  # noqa: RUF001
    "Здравствуй, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم",  # noqa: RUF001
    "हिन्दी में लिखा ไทยไม่มีช่องว่าง 한국어 띄어쓰기 日本語の文章、漢字とかな。我想在apple工作",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 👍🏽 ☕️ ❤️",
    "zero\u200bwidth no\u00a0break soft\u00adhyphen thin\u2009space line\u2028sep ideographic\u3000space",
    "a\u0301\u0327 q\u0307\u0323 \u0915\u093c",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start |> <|endoftext|><|endoftext|> |im_end|> <|im_end|",
    "\U00010348\U0001d54f\U000e0041 \ufffd \u0001\u0007",
    "=" * 100 + "-" * 33 + " " * 70 + "end",
]


@contextmanager
def _exact(monkeypatch) -> Iterator[None]:
    """llama.cpp without its approximations for speed: keys and values in float32, attention not fused.

    By default both are on and move a log-probability by up to 2e-3; so small a tolerance as below needs them off.
    """
    library = runtime._library()
    defaults = library.llama_context_default_params

    def exact():
        parameters = defaults()
        tail = bytearray(parameters.tail)
        struct.pack_into("<i", tail, 16, 0)  # flash_attn_type
        struct.pack_into("<ii", tail, 68, 0, 0)  # type_k, type_v: GGML_TYPE_F32
        parameters.tail[:] = tail
        return parameters

    with monkeypatch.context() as patch:
        patch.setattr(library, "llama_context_default_params", exact)
        yield


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _llama_cpp(path: Path, tokens_BT: np.ndarray) -> np.ndarray:
    with runtime.LlamaCpp(path, length=512) as model:
        return _log_probabilities(np.concatenate([piece.copy() for piece in model.logits(tokens_BT)], axis=1))


_forward = jax.jit(lambda model, tokens_BT: model.logits(model.hidden(tokens_BT)))


def _ours(checkpoint: Checkpoint, tokens_BT: np.ndarray) -> np.ndarray:
    model = Qwen35.from_tensors(checkpoint.config, checkpoint.tensors)
    return _log_probabilities(np.asarray(_forward(model, jnp.asarray(tokens_BT))))


def _folder(name: str, tmp_path: Path) -> Path:
    """A checkpoint: the embedded one, a random one with two value heads to a key head, or one of SQJAX_REFERENCE."""
    if name == "demo8":
        return PACKAGE / "demo8"
    if name.startswith("random"):
        changes = random_checkpoint.RUNNABLE | {"tie_word_embeddings": name == "random"}
        random_checkpoint.write(tmp_path / name, conditional=name == "random", **changes)
        return tmp_path / name
    if not (REFERENCE / name / "config.json").is_file():
        pytest.skip(f"SQJAX_REFERENCE names no folder with {name}")
    return REFERENCE / name


@pytest.mark.parametrize("name", ["demo8", "random", "random-untied", "nano34"])
def test_log_probabilities_of_the_f32_file(tmp_path, monkeypatch, name):
    checkpoint = load_checkpoint(_folder(name, tmp_path))
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="f32")
    tokens_BT = np.resize(checkpoint.tokenizer.encode(PASSAGE), (1, 64))
    with _exact(monkeypatch):
        llama_cpp = _llama_cpp(tmp_path / "a.gguf", tokens_BT)
    ours = _ours(checkpoint, tokens_BT)
    assert ours.std() > 0.5  # the model says something
    np.testing.assert_allclose(llama_cpp, ours, atol=2e-4)


def test_log_probabilities_of_the_q4_k_file(tmp_path, monkeypatch):
    """llama.cpp rounds activations of quantized products to 8 bits: a KL divergence of 0.0025 nats from ours.

    Rounding the weights costs 0.039, sixteen times as much: an error in the file would show.
    """
    checkpoint = load_checkpoint(PACKAGE / "demo8")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    tokens_BT = np.resize(checkpoint.tokenizer.encode(PASSAGE), (1, 64))
    with _exact(monkeypatch):
        llama_cpp = _llama_cpp(tmp_path / "a.gguf", tokens_BT)
    ours, full = _ours(read_gguf(tmp_path / "a.gguf"), tokens_BT), _ours(checkpoint, tokens_BT)

    def divergence(p, q):
        return (np.exp(p) * (p - q)).sum(-1).mean()

    assert 0 < divergence(ours, llama_cpp) < 0.005
    assert 0.02 < divergence(full, ours) < 0.08


# ---------------------------------------------------------------------------------------------------------------------
# The server: text in, text out


@contextmanager
def _server(path: Path) -> Iterator["xllamacpp.Server"]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 512, 1, False, -1
    yield xllamacpp.Server(parameters)


def _tokenize(server: "xllamacpp.Server", text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(request) as answer:
        return json.load(answer)["tokens"]


def _texts(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.glob(pattern)):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            yield from [entry["text"]] if entry.get("text") else (m["content"] for m in entry.get("messages", []))


def test_text_through_the_file(tmp_path):
    """llama.cpp reads text as `tokenizers` does, and continues it greedily as our model does."""
    checkpoint = load_checkpoint(PACKAGE / "demo8")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="f32")
    documents = [*TRICKY, PASSAGE, *(p.read_text(encoding="utf-8") for p in sorted(PACKAGE.glob("*.py")))]
    if str(TEXT) != ".":
        documents += _texts(TEXT, "heldout_*.jsonl")
    prompt = checkpoint.tokenizer.encode(PASSAGE)[:40].tolist()
    with _server(tmp_path / "a.gguf") as server:
        for document in documents:
            # tokenizer.json normalises text to NFC, which llama.cpp leaves to its caller.
            normal = unicodedata.normalize("NFC", document)
            assert _tokenize(server, normal) == checkpoint.tokenizer.encode(document).tolist()
        request = {"prompt": prompt, "max_tokens": 8, "temperature": 0.0}
        answer = server.handle_completions(request)["choices"][0]["text"]
    answered = checkpoint.tokenizer.encode(answer).tolist()
    likeliest = _ours(checkpoint, np.resize(prompt + answered, (1, 64)))[0].argmax(-1)
    assert len(answered) == 8
    assert answered == likeliest[len(prompt) - 1 : len(prompt) + 7].tolist()


def test_greedy_text_of_the_q4_k_file(tmp_path):
    checkpoint = load_checkpoint(PACKAGE / "demo8")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    with _server(tmp_path / "a.gguf") as server:
        request = {"messages": messages, "max_tokens": 16, "temperature": 0.0}
        first, second = (server.handle_chat_completions(request)["choices"][0] for _ in range(2))
    assert first["message"]["content"].strip()
    assert first["message"] == second["message"]
