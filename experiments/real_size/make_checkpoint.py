"""Writes a checkpoint of exactly Qwen3.5-0.8B's shape with random weights, for size, memory and speed.

    python experiments/real_size/make_checkpoint.py /tmp/random-0.8B

The folder has the layout of the hub's: config.json, safetensors shards with an index in bfloat16, and a tokenizer with
as many tokens and merges as the real one, grown from the embedded model's by joining random pairs of its tokens. Needs
numpy, ml_dtypes and safetensors, 1.5 GB of disk and 1.5 GB of memory. The same seed gives the same files.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DEMO = Path(__file__).resolve().parents[2] / "sqjax" / "demo8"
# The real tokenizer has fewer tokens than the embedding has rows; the rest of the rows stay unused.
TOKENS, ROWS = 248_077, 248_320
ROWS_AT_ONCE = 1 << 14
CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": ROWS,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "full_attention_interval": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    },
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR = {
    "linear_attn.in_proj_qkv.weight": (6144, 1024),
    "linear_attn.in_proj_z.weight": (2048, 1024),
    "linear_attn.in_proj_a.weight": (16, 1024),
    "linear_attn.in_proj_b.weight": (16, 1024),
    "linear_attn.conv1d.weight": (6144, 1, 4),
    "linear_attn.A_log": (16,),
    "linear_attn.dt_bias": (16,),
    "linear_attn.norm.weight": (128,),
    "linear_attn.out_proj.weight": (1024, 2048),
}
FULL = {
    "self_attn.q_proj.weight": (4096, 1024),
    "self_attn.k_proj.weight": (512, 1024),
    "self_attn.v_proj.weight": (512, 1024),
    "self_attn.o_proj.weight": (1024, 2048),
    "self_attn.q_norm.weight": (256,),
    "self_attn.k_norm.weight": (256,),
}
BOTH = {
    "input_layernorm.weight": (1024,),
    "post_attention_layernorm.weight": (1024,),
    "mlp.gate_proj.weight": (3584, 1024),
    "mlp.up_proj.weight": (3584, 1024),
    "mlp.down_proj.weight": (1024, 3584),
}


def random_tensor(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a magnitude at which a forward pass neither dies nor explodes."""
    if name.endswith("A_log"):
        return np.log(generator.uniform(0.05, 8, shape)).astype(ml_dtypes.bfloat16)
    if name.endswith("linear_attn.norm.weight"):
        return (1 + 0.1 * generator.standard_normal(shape)).astype(ml_dtypes.bfloat16)
    spread = 0.1 if len(shape) == 1 else 0.3 if len(shape) == 3 else 1 / np.sqrt(shape[-1])
    result = np.empty(shape, ml_dtypes.bfloat16)
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = result[start : start + ROWS_AT_ONCE]
        rows[...] = generator.standard_normal(rows.shape, np.float32) * np.float32(spread)
    return result


def shards(generator: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """The embedding, then four layers at a time."""
    name = "model.embed_tokens.weight"
    yield {name: random_tensor(generator, name, (ROWS, 1024))}
    for first in range(0, 24, 4):
        shapes = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(first, first + 4)
            for name, shape in (BOTH | (LINEAR if CONFIG["layer_types"][layer] == "linear_attention" else FULL)).items()
        }
        yield {name: random_tensor(generator, name, shape) for name, shape in shapes.items()}
    yield {"model.norm.weight": random_tensor(generator, "model.norm.weight", (1024,))}


def write_weights(folder: Path, seed: int) -> None:
    places, size = {}, 0
    for i, tensors in enumerate(shards(np.random.default_rng(seed)), 1):
        file = f"model-{i:05d}-of-00008.safetensors"
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, seed: int) -> None:
    """Grows the vocabulary by merges of random pairs of tokens, so that readers meet the real numbers of both."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    parts = [token for token in vocabulary if token not in special and len(token) < 8]
    generator = np.random.default_rng(seed)
    while len(vocabulary) < TOKENS:
        left, right = (parts[i] for i in generator.integers(len(parts), size=2))
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copy(DEMO / "tokenizer_config.json", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    write_tokenizer(arguments.folder, arguments.seed)
    write_weights(arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
