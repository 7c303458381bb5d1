"""A small random Qwen3.5 checkpoint in Hugging Face layout, its names and shapes written out independently of sqjax."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
    "eos_token_id": 2,
}
# Fills super-blocks and has the head dimensions that llama.cpp's qwen35 graph is made for.
RUNNABLE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("in", "g"),
    ("Ġ", "Ġ"),
    ("Ã", "©"),
    ("a", "n"),
    ("an", "d"),
]


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' Qwen3_5ForCausalLM."""
    d, f, k = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads = c["linear_num_value_heads"]
    values = heads * c["linear_value_head_dim"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for i, kind in enumerate(c["layer_types"]):
        layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
        if kind == "linear_attention":
            mixer = {"in_proj_qkv.weight": (2 * keys + values, d), "in_proj_z.weight": (values, d)}
            mixer |= {"in_proj_a.weight": (heads, d), "in_proj_b.weight": (heads, d), "A_log": (heads,)}
            mixer |= {"dt_bias": (heads,), "conv1d.weight": (2 * keys + values, 1, c["linear_conv_kernel_dim"])}
            mixer |= {"norm.weight": (c["linear_value_head_dim"],), "out_proj.weight": (d, values)}
            layer |= {f"linear_attn.{name}": shape for name, shape in mixer.items()}
        else:
            q, kv = c["num_attention_heads"], c["num_key_value_heads"]
            mixer = {"q_proj.weight": (2 * q * k, d), "k_proj.weight": (kv * k, d), "v_proj.weight": (kv * k, d)}
            mixer |= {"o_proj.weight": (d, q * k), "q_norm.weight": (k,), "k_norm.weight": (k,)}
            layer |= {f"self_attn.{name}": shape for name, shape in mixer.items()}
        result |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    result["model.norm.weight"] = (d,)
    if not c["tie_word_embeddings"]:
        result["lm_head.weight"] = (c["vocab_size"], d)
    return result


def tokenizer(*, added: tuple[tokenizers.AddedToken, ...] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE with nine merges, Qwen3.5's pattern and three special tokens."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(a + b for a, b in MERGES)]
    core = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    core.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_letters])
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(words[:3])
    core.add_tokens(list(added))
    return core


def write(
    folder: Path,
    *,
    seed: int = 0,
    dtype: Any = ml_dtypes.bfloat16,
    shards: int = 1,
    conditional: bool = False,
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    added: tuple[tokenizers.AddedToken, ...] = (),
    **changes,
) -> dict[str, np.ndarray]:
    """Writes a checkpoint with the dimensions `changes` and the tensors that `edit` leaves; returns those tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = DIMENSIONS | changes
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        # Wide enough that every part of the network matters to the output, small enough that nothing saturates.
        spread = 0.5 if len(shape) < 2 else 2 / np.sqrt(shape[-1])
        tensors[name] = (spread * generator.standard_normal(shape)).astype(dtype)
    edit(tensors)
    outer: dict[str, Any] = {"architectures": ["Qwen3_5ForCausalLM"], **config}
    stored = tensors
    if conditional:
        outer = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": config}
        outer["tie_word_embeddings"] = config["tie_word_embeddings"]
        stored = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
        stored["model.visual.patch_embed.proj.weight"] = np.zeros((3, 4), dtype)
        stored["mtp.fc.weight"] = np.zeros((4, 8), dtype)
    (folder / "config.json").write_text(json.dumps(outer))
    core = tokenizer(added=added)
    core.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"chat_template": template}))
    _save(folder, stored, shards)
    return tensors


def _save(folder: Path, stored: dict[str, np.ndarray], shards: int) -> None:
    if shards == 1:
        save_file(stored, folder / "model.safetensors")
        return
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(stored)}
    for place in set(places.values()):
        save_file({name: stored[name] for name in stored if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
