"""Hugging Face checkpoints in GGUF layout: tensors under GGUF names, transformed as llama.cpp's converter does.

Let O denote output features, I input features, V the vocabulary, C convolution channels.
Source of the table and its transforms: conversion/qwen.py of llama.cpp at 0c1e5709, `Qwen3_5TextModel`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401 (registers bfloat16 with numpy, without which safetensors cannot name it)
import numpy as np
import safetensors

from sqjax import hub
from sqjax.config import ModelConfig, is_matrix
from sqjax.run import InputError, OnDemand
from sqjax.tokens import Tokenizer

_SHOWN = 12
_SCANNED_BYTES = 1 << 26
_STORED_TYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Checkpoint:
    """A model as sqjax sees it, whatever file it came from.

    Attributes:
      config: dimensions.
      tensors: GGUF name -> numpy array [out, in] in GGUF layout, read and transformed at each access; matrices in the
        type they are stored in (bfloat16, float16 or float32; float32 when dequantized), all else float32.
      tokenizer: with chat template and special tokens.
      name: for people.
      general: `general.*` metadata of a GGUF file (licence, base model, ...) as key -> GGUFValue.
    """

    config: ModelConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer
    name: str
    general: Mapping[str, gguf.gguf_writer.GGUFValue] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms from Hugging Face to GGUF


def tile_value_heads(
    x: np.ndarray, config: ModelConfig, *, axis: int = 0, head_dim: int = 1, first: int = 0
) -> np.ndarray:
    """Reorders value heads from grouped (head k * r + j reads key head k) to tiled (head j * n_k + k reads key head k).

    Heads are runs of `head_dim` entries along `axis`, after `first` entries that stay; r = n_v / n_k. llama.cpp pairs
    value head h with key head h % n_k.
    """
    n_k, n_v = config.linear_num_key_heads, config.linear_num_value_heads
    if n_k == n_v:
        return x
    heads = np.arange(n_v * head_dim).reshape(n_k, n_v // n_k, head_dim).swapaxes(0, 1).ravel()
    return np.take(x, np.concatenate([np.arange(first), first + heads]), axis)


def _as_is(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return x


def _gain(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    # The checkpoint stores a gain's distance from one; added in float32, bfloat16 would round it away.
    return x.astype(np.float32) + np.float32(1)


def _decay(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    # float64, rounded once: float32 exponentials differ between processors in the last bit.
    return tile_value_heads(-np.exp(x.astype(np.float64)).astype(np.float32), config)


def _per_value_head(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return tile_value_heads(x, config)


def _value_rows(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return tile_value_heads(x, config, head_dim=config.linear_value_head_dim)


def _value_columns(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return tile_value_heads(x, config, axis=1, head_dim=config.linear_value_head_dim)


def _query_key_value_rows(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    first = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return tile_value_heads(x, config, head_dim=config.linear_value_head_dim, first=first)


def _kernel(x: np.ndarray, config: ModelConfig) -> np.ndarray:
    return _query_key_value_rows(x[:, 0, :], config)


Transform = Callable[[np.ndarray, ModelConfig], np.ndarray]

_TOP: dict[str, tuple[str, Transform]] = {
    "token_embd.weight": ("model.embed_tokens.weight", _as_is),
    "output_norm.weight": ("model.norm.weight", _gain),
    "output.weight": ("lm_head.weight", _as_is),
}
_BLOCK: dict[str, tuple[str, Transform]] = {
    "attn_norm.weight": ("input_layernorm.weight", _gain),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", _gain),
    "ffn_gate.weight": ("mlp.gate_proj.weight", _as_is),
    "ffn_up.weight": ("mlp.up_proj.weight", _as_is),
    "ffn_down.weight": ("mlp.down_proj.weight", _as_is),
    "attn_q.weight": ("self_attn.q_proj.weight", _as_is),
    "attn_k.weight": ("self_attn.k_proj.weight", _as_is),
    "attn_v.weight": ("self_attn.v_proj.weight", _as_is),
    "attn_output.weight": ("self_attn.o_proj.weight", _as_is),
    "attn_q_norm.weight": ("self_attn.q_norm.weight", _gain),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", _gain),
    "attn_qkv.weight": ("linear_attn.in_proj_qkv.weight", _query_key_value_rows),
    "attn_gate.weight": ("linear_attn.in_proj_z.weight", _value_rows),
    "ssm_alpha.weight": ("linear_attn.in_proj_a.weight", _per_value_head),
    "ssm_beta.weight": ("linear_attn.in_proj_b.weight", _per_value_head),
    "ssm_conv1d.weight": ("linear_attn.conv1d.weight", _kernel),
    "ssm_norm.weight": ("linear_attn.norm.weight", _as_is),
    "ssm_out.weight": ("linear_attn.out_proj.weight", _value_columns),
    "ssm_a": ("linear_attn.A_log", _decay),
    "ssm_dt.bias": ("linear_attn.dt_bias", _per_value_head),
}


def huggingface_name(name: str) -> tuple[str, Transform]:
    """Returns the Hugging Face name of the tensor that GGUF calls `name`, and the transform into GGUF layout."""
    if name in _TOP:
        return _TOP[name]
    _, layer, attribute = name.split(".", 2)
    suffix, transform = _BLOCK[attribute]
    return f"model.layers.{layer}.{suffix}", transform


def huggingface_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a Hugging Face checkpoint gives the tensor of GGUF name and shape."""
    return (shape[0], 1, shape[1]) if name.endswith("ssm_conv1d.weight") else shape


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its file, its name there, its shape and type."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        with safetensors.safe_open(self.file, "numpy") as file:
            return file.get_tensor(self.key)

    def finite(self) -> bool:
        """Whether no entry is NaN or infinite; reads a slice of rows at a time."""
        rows = max(1, _SCANNED_BYTES // (4 * int(np.prod(self.shape[1:]))))
        with safetensors.safe_open(self.file, "numpy") as file:
            stored = file.get_slice(self.key)
            starts = range(0, self.shape[0], rows)
            return all(_exponents_finite(stored[i : min(i + rows, self.shape[0])]) for i in starts)


def _exponents_finite(x: np.ndarray) -> bool:
    # An all-ones exponent is NaN or infinity; integers are compared because bfloat16's own isfinite is slow.
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    infinity = np.array(np.inf, x.dtype).view(unsigned)
    magnitude = x.view(unsigned) & (np.iinfo(unsigned).max >> 1)
    return bool(magnitude.max(initial=0) < infinity)


def _tensors(config: ModelConfig, stored: Mapping[str, _Stored]) -> OnDemand:
    """The tensors of a Hugging Face checkpoint in GGUF layout, each read and transformed when it is asked for."""

    def read(name: str) -> np.ndarray:
        key, transform = huggingface_name(name)
        tensor = transform(stored[key].read(), config)
        return tensor if is_matrix(name, tensor.shape) else tensor.astype(np.float32)

    return OnDemand(config.tensor_shapes(), read)


def load_checkpoint(path_or_hub_id: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a Qwen3.5 checkpoint, checks every tensor and leaves them on disk until they are asked for.

    Vision towers and multi-token prediction heads are skipped, and counted on standard error.

    Args:
      path_or_hub_id: a folder with config.json, *.safetensors and tokenizer.json, or a hub id such as
        Qwen/Qwen3.5-0.8B.
      revision: branch, tag or commit of the hub repository.

    Raises:
      InputError: there is no such checkpoint, its architecture is another, its tokenizer does not fit, or tensors are
        missing, surplus, misshapen, of another type or not finite; all such tensors are named in one message.
    """
    folder = Path(path_or_hub_id).resolve()
    name = folder.name
    if not folder.exists() and hub.is_hub_id(str(path_or_hub_id)):
        folder, name = hub.download(str(path_or_hub_id), revision=revision), str(path_or_hub_id).rpartition("/")[2]
    raw_config = _read_config(folder)
    config = ModelConfig.from_huggingface(raw_config)
    stored = _open_tensors(folder, config)
    tokenizer = _read_tokenizer(folder, config, raw_config)
    return Checkpoint(
        config=config,
        tensors=_tensors(config, stored),
        tokenizer=tokenizer,
        name=name,
        general=_general_metadata(folder, name, config),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a Hugging Face folder, a hub id or a qwen35 GGUF file")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder that holds the checkpoint's files")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is no JSON object; take the one that came with the weights")
    return config


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; the index decides where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is no index of safetensors files: {error}") from error
        if absent := [name for name in names if not (folder / name).is_file()]:
            raise InputError(f"{folder} lacks {', '.join(absent)}, which its index names; complete the download")
        return [folder / name for name in names]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")):
        raise InputError(f"{folder} holds pickled weights ({pickled[0]}), which are never loaded; save as safetensors")
    raise InputError(f"{folder} has no *.safetensors file; give a checkpoint with its weights")


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Every stored tensor under its name without the wrapper that a vision model puts around its language model."""
    stored = {}
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, "numpy") as file:
                for key in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    part = file.get_slice(key)
                    name = key.replace("language_model.", "", 1)
                    stored[name] = _Stored(path, key, tuple(part.get_shape()), part.get_dtype())
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is no whole safetensors file ({error}); download it again") from error
    return stored


def _open_tensors(folder: Path, config: ModelConfig) -> dict[str, _Stored]:
    """Headers of all needed tensors, after every check; the checks' findings are reported together."""
    stored = _read_headers(folder)
    expected = {huggingface_name(n)[0]: huggingface_shape(n, s) for n, s in config.tensor_shapes().items()}
    skipped = {
        "vision": [n for n in stored if re.match(r"(model\.)?(visual|vision_tower)\.", n)],
        "multi-token prediction": [n for n in stored if re.match(r"(model\.)?mtp\.", n)],
        "tied head": ["lm_head.weight"] if config.tie_word_embeddings and "lm_head.weight" in stored else [],
        "rotary table": [n for n in stored if n.endswith("rotary_emb.inv_freq")],
    }
    passed_over = {name for names in skipped.values() for name in names}
    right = {n: s for n, s in stored.items() if expected.get(n) == s.shape and s.dtype in _STORED_TYPES}
    findings = {
        "missing": [n for n in expected if n not in stored],
        "surplus": sorted(stored.keys() - expected.keys() - passed_over),
        "misshapen": [
            f"{n} {list(stored[n].shape)} instead of {list(s)}"
            for n, s in expected.items()
            if n in stored and stored[n].shape != s
        ],
        "neither BF16, F16 nor F32": [
            f"{n} {stored[n].dtype}" for n in expected if n in stored and stored[n].dtype not in _STORED_TYPES
        ],
        "not finite": [n for n, s in right.items() if not s.finite()],
    }
    if any(findings.values()):
        listed = "; ".join(f"{len(names)} {what}: {_shortened(names)}" for what, names in findings.items() if names)
        raise InputError(f"{folder} does not hold the tensors that its config.json describes: {listed}")
    if passed_over:
        counts = ", ".join(f"{len(names)} {what}" for what, names in skipped.items() if names)
        print(f"skipped tensors of {folder.name}: {counts}", file=sys.stderr)
    return right


def _shortened(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and metadata


def _read_tokenizer(folder: Path, config: ModelConfig, raw_config: Mapping[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    largest = max(tokenizer.core.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has token {largest}, the model only {config.vocab_size} embeddings; "
            "give the tokenizer that belongs to the checkpoint"
        )
    text_config = raw_config.get("text_config") or {}
    for kind in ("bos", "eos", "pad"):
        identity = raw_config.get(f"{kind}_token_id", text_config.get(f"{kind}_token_id"))
        if getattr(tokenizer, f"{kind}_token") is None and isinstance(identity, int):
            tokenizer = replace(tokenizer, **{f"{kind}_token": tokenizer.core.id_to_token(identity)})
    return tokenizer


def _general_metadata(folder: Path, name: str, config: ModelConfig) -> dict[str, gguf.gguf_writer.GGUFValue]:
    """What llama.cpp's converter reads from the model card and the name, as metadata of a GGUF file."""
    parameters = sum(int(np.prod(shape)) for shape in config.tensor_shapes().values())
    try:
        metadata = gguf.Metadata.load(None, folder, None, parameters)
        if folder.name != name:  # a snapshot of the hub lies in a folder named after its commit
            card, described = gguf.Metadata.load_model_card(folder), gguf.Metadata.load_hf_parameters(folder)
            named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, described, Path(name), parameters)
            for key in ("name", "organization", "basename", "finetune", "version", "size_label"):
                setattr(metadata, key, getattr(named, key))
    except Exception as error:  # a model card is written by hand, and its YAML fails in many ways
        print(f"the model card of {name} is left out: {next(iter(str(error).splitlines()), error)}", file=sys.stderr)
        metadata = gguf.Metadata()
    metadata.name = metadata.name or name
    metadata.size_label = metadata.size_label or gguf.size_label(parameters, parameters, 0, 0)
    writer = gguf.GGUFWriter(None, "qwen35")
    metadata.set_gguf_meta_model(writer)
    return {key: value for key, value in writer.kv_data[0].items() if key != "general.architecture"}
