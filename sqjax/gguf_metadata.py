"""A Qwen3.5 model's dimensions and tokenizer as GGUF metadata, and back.

Source: conversion/qwen.py and conversion/base.py of llama.cpp at 0c1e5709.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf.gguf_writer import GGUFValue

from sqjax.checkpoint import Checkpoint
from sqjax.config import FULL, LINEAR, ModelConfig
from sqjax.run import InputError
from sqjax.tokens import Tokenizer

ARCHITECTURE = "qwen35"
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
# llama.cpp's expression for the pre-tokenizer qwen35, which is that of Qwen3.5's tokenizer.json.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE = (
    "I'm We'LL 12345 x=3.14!?  \n\n \t tabs\r\n   "
    "trailing  naïve cafe\u0301 हिन्दी កាន់ 我想在 🚀👍🏽 'quoted' __a__ //b "
)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def header(checkpoint: Checkpoint, file_type: str) -> dict[str, GGUFValue]:
    """Returns all metadata but general.architecture, key by key what llama.cpp's converter writes.

    Nothing in it depends on how codes were chosen: files of one model and type have headers of one size.

    Raises:
      InputError: the tokenizer is not byte-level BPE.
    """
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in checkpoint.general.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    if "general.name" not in checkpoint.general:
        writer.add_name(checkpoint.name)
    _add_dimensions(writer, checkpoint.config, FILE_TYPES[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, checkpoint.tokenizer, checkpoint.config.vocab_size)
    return {key: value for key, value in writer.kv_data[0].items() if key != "general.architecture"}


def _add_dimensions(writer: gguf.GGUFWriter, config: ModelConfig, file_type: gguf.LlamaFileType) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_sections((*config.mrope_section, 0, 0, 0, 0)[:4])
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(file_type)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_uint32(f"{ARCHITECTURE}.ssm.group_count", config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_array(f"{ARCHITECTURE}.attention.recurrent_layers", [kind == LINEAR for kind in config.layer_types])
    writer.add_uint32(f"{ARCHITECTURE}.full_attention_interval", config.full_attention_interval)
    writer.add_rope_dimension_count(config.rope_dim)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    tokens, types = vocabulary(tokenizer, vocab_size)
    model = json.loads(tokenizer.core.to_str())["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer is {model['type']}, not byte-level BPE; give the one of a Qwen3.5 checkpoint")
    if not _splits_as_qwen35(tokenizer.core):
        print(
            "the tokenizer splits text otherwise than qwen35's does; llama.cpp will tokenize otherwise", file=sys.stderr
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(ARCHITECTURE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "pad"):
        if (identity := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(identity)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _splits_as_qwen35(core: tokenizers.Tokenizer) -> bool:
    """Whether words are cut where llama.cpp's pre-tokenizer `qwen35` cuts them, on text full of hard cases."""
    if core.pre_tokenizer is None:
        return False
    return core.pre_tokenizer.pre_tokenize_str(_PROBE) == _pre_tokenizer().pre_tokenize_str(_PROBE)


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Returns every token and its type; rows of the embedding that no token uses are `[PAD{i}]` of type UNUSED."""
    by_id = {identity: token for token, identity in tokenizer.core.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.core.get_added_tokens_decoder()
    tokens, types = [], []
    for identity in range(vocab_size):
        tokens.append(by_id.get(identity, f"[PAD{identity}]"))
        if identity not in by_id:
            types.append(gguf.TokenType.UNUSED)
        elif identity in added:
            special = added[identity].special
            types.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    return tokens, types


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def general(fields: Mapping[str, GGUFValue]) -> dict[str, GGUFValue]:
    """Returns the metadata about the model itself: its name, licence, origin."""
    about_file = ("architecture", "type", "file_type", "quantization_version", "alignment")
    kept = (key for key in fields if key.startswith("general.") and key.removeprefix("general.") not in about_file)
    return {key: fields[key] for key in kept}


def read_config(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Returns the dimensions that the metadata (key -> value) and the tensors' shapes state.

    Raises:
      KeyError: a key is missing.
    """

    def of(key: str) -> Any:
        return values[f"{ARCHITECTURE}.{key}"]

    layers = of("block_count") - values.get(f"{ARCHITECTURE}.nextn_predict_layers", 0)
    interval = values.get(f"{ARCHITECTURE}.full_attention_interval", 4)
    recurrent = values.get(f"{ARCHITECTURE}.attention.recurrent_layers")
    if recurrent is None:
        recurrent = [(layer + 1) % interval != 0 for layer in range(layers)]
    sections = of("rope.dimension_sections")
    heads = of("ssm.time_step_rank")
    return ModelConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=layers,
        layer_types=tuple(LINEAR if linear else FULL for linear in recurrent[:layers]),
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        head_dim=of("attention.key_length"),
        linear_num_key_heads=of("ssm.group_count"),
        linear_num_value_heads=heads,
        linear_key_head_dim=of("ssm.state_size"),
        linear_value_head_dim=of("ssm.inner_size") // heads,
        linear_conv_kernel_dim=of("ssm.conv_kernel"),
        rms_norm_eps=_shortest(of("attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(of("rope.freq_base")),
        partial_rotary_factor=of("rope.dimension_count") / of("attention.key_length"),
        mrope_section=tuple(sections[:3]),
        tie_word_embeddings="output.weight" not in shapes,
        max_position_embeddings=of("context_length"),
        full_attention_interval=interval,
    )


def _shortest(value: float) -> float:
    # A GGUF file holds float32: 1e-6 comes back as 9.999999974752427e-07 unless the shortest decimal is taken.
    return float(str(np.float32(value)))


def read_tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """Returns the tokenizer that the metadata describes: byte-level BPE behind Qwen3.5's pre-tokenizer.

    Raises:
      ValueError: it is of another kind.
    """

    def of(key: str) -> Any:
        return values.get(f"tokenizer.{key}")

    if (of("ggml.model"), of("ggml.pre")) != ("gpt2", ARCHITECTURE):
        raise ValueError(f"its tokenizer is {of('ggml.model')} {of('ggml.pre')}, not gpt2 {ARCHITECTURE}")
    tokens, types, merges = of("ggml.tokens"), of("ggml.token_type"), of("ggml.merges") or []
    core = _byte_level_bpe(
        {token: i for i, token in enumerate(tokens) if types[i] != gguf.TokenType.UNUSED},
        [tuple(merge.split(" ")) for merge in merges],
    )
    for i, kind in enumerate(types):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            core.add_tokens([tokenizers.AddedToken(tokens[i], special=special, normalized=False)])
    special_tokens = {
        f"{kind}_token": None if (i := of(f"ggml.{name}_token_id")) is None else tokens[i]
        for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return Tokenizer(core=core, chat_template=of("chat_template"), **special_tokens)


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Qwen3.5's tokenizer, as its tokenizer.json describes it, for a vocabulary."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    core.normalizer = tokenizers.normalizers.NFC()
    core.pre_tokenizer = _pre_tokenizer()
    core.decoder = tokenizers.decoders.ByteLevel()
    return core


def _pre_tokenizer() -> tokenizers.pre_tokenizers.PreTokenizer:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated")
    bytes_to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return tokenizers.pre_tokenizers.Sequence([split, bytes_to_letters])
