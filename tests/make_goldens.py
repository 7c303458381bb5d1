"""Writes the reference arrays of tests/data from transformers; run it where PyTorch and transformers are installed.

    python tests/make_goldens.py OUT_FOLDER [--demo8 FOLDER] [--nano34 FOLDER]

Three models: one of random weights (two value heads per key head, two key/value heads, an untied head), made here from
a seed by NumPy alone, so that a test makes the same one; and two trained ones. Everything is float32 on a CPU.
"""

import argparse
import json
from pathlib import Path

import numpy as np

TINY_CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}

# Longer than two chunks of the delta rule, and no multiple of one.
TINY_TIME = 150
# Logits of a trained model are kept at every POSITION_STEP-th position and every VOCABULARY_STEP-th entry.
POSITION_STEP, VOCABULARY_STEP = 7, 64

TEXT = """The harbour was quiet before sunrise. Two fishermen mended a net under the lamp, and neither of them spoke
until the first boat came in. "How was the night?" asked the older one. "Cold," said the captain, "but the sea is kind."

def running_mean(values, window):
    total = 0.0
    means = []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means

A mean over a window forgets: each step adds the newest value and takes the oldest away. Ein Mittelwert vergisst also,
was lange her ist. What remains to be chosen is how long a memory should be, and that depends on the 3 or 4 questions
one wants to ask of it later. She closed the notebook, looked at the harbour once more, and went to buy bread.
"""


def uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 values in (-1, 1) from the raw bits of PCG64, whose stream no release of NumPy may change."""
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).astype(np.float32).reshape(shape)


def tiny_tokens() -> np.ndarray:
    """Returns [2, TINY_TIME] tokens for the random model."""
    return ((uniform(1, (2, TINY_TIME)) + 1.0) * 0.5 * TINY_CONFIG["vocab_size"]).astype(np.int64)


def tiny_weights() -> dict[str, np.ndarray]:
    """Returns the random model under Hugging Face names, every tensor away from its neutral value."""
    c = TINY_CONFIG
    width, inner, vocabulary = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads, key_heads, head = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    values, dim = c["linear_num_value_heads"], c["linear_key_head_dim"]
    channels = (2 * c["linear_num_key_heads"] + values) * dim
    linear = {
        "linear_attn.in_proj_qkv.weight": (channels, width),
        "linear_attn.in_proj_z.weight": (values * dim, width),
        "linear_attn.in_proj_a.weight": (values, width),
        "linear_attn.in_proj_b.weight": (values, width),
        "linear_attn.conv1d.weight": (channels, 1, c["linear_conv_kernel_dim"]),
        "linear_attn.A_log": (values,),
        "linear_attn.dt_bias": (values,),
        "linear_attn.norm.weight": (dim,),
        "linear_attn.out_proj.weight": (width, values * dim),
    }
    full = {
        "self_attn.q_proj.weight": (heads * 2 * head, width),
        "self_attn.k_proj.weight": (key_heads * head, width),
        "self_attn.v_proj.weight": (key_heads * head, width),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.o_proj.weight": (width, heads * head),
    }
    common = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer, kind in enumerate(c["layer_types"]):
        block = common | (linear if kind == "linear_attention" else full)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {name: _tiny_tensor(100 + i, name, shape) for i, (name, shape) in enumerate(shapes.items())}


def _tiny_tensor(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = uniform(seed, shape)
    if len(shape) == 2:
        return noise * np.float32((6.0 / shape[1]) ** 0.5)
    if name.endswith(("A_log", "dt_bias")):
        # Decays per token from about 0.05 to 0.95: some heads forget at once, some remember the whole window.
        return noise * np.float32(1.5) - np.float32(1.0)
    return noise * np.float32(0.5) + np.float32(0.8 if name.endswith("linear_attn.norm.weight") else 0.0)


def build(config: dict, weights):
    """Returns the transformers model of a parsed config.json, in float32, with the given state."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    settings = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**settings)).float().eval()
    state = {name: torch.as_tensor(value).float() for name, value in weights.items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}, (missing, surplus)
    model.tie_weights()
    return model


def logits(model, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits [B, T, V]."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.as_tensor(tokens), use_cache=False).logits.float().numpy()


def sublayers(model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the first sequence at the entry of the first two blocks, after each sub-layer and at their end."""
    arrays, hooks = {}, []

    def record(name):
        def hook(module, args, kwargs, output):
            arrays[name] = (output[0] if isinstance(output, tuple) else output)[0].numpy()
            if name.endswith("block"):
                arrays[f"{name}.in"] = (args[0] if args else kwargs["hidden_states"])[0].numpy()

        return hook

    for index in range(2):
        layer = model.model.layers[index]
        parts = {
            "attn_norm": layer.input_layernorm,
            "mixer": layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn,
            "post_attention_norm": layer.post_attention_layernorm,
            "mlp": layer.mlp,
            "block": layer,
        }
        hooks += [part.register_forward_hook(record(f"{index}.{n}"), with_kwargs=True) for n, part in parts.items()]
    logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return arrays


def load(folder: Path):
    """Returns the transformers model of a checkpoint folder, in float32."""
    from safetensors.torch import load_file

    weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return build(json.loads((folder / "config.json").read_text()), weights)


def trained(folder: Path) -> dict[str, np.ndarray]:
    """Returns tokens of TEXT and a trained model's logits on them, thinned, with each position's log-normalizer."""
    import torch
    from tokenizers import Tokenizer

    tokens = np.array([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids])
    full = logits(load(folder), tokens)[0]
    return {
        "tokens": tokens.astype(np.int32),
        "logits": full[::POSITION_STEP, ::VOCABULARY_STEP],
        "log_normalizer": torch.logsumexp(torch.as_tensor(full), -1).numpy(),
    }


def main() -> None:
    """Writes tiny.npz and, for each folder given, demo8.npz and nano34.npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--demo8", type=Path)
    parser.add_argument("--nano34", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    model, tokens = build(TINY_CONFIG, tiny_weights()), tiny_tokens()
    arrays = {"logits": logits(model, tokens)[:, ::3]} | sublayers(model, tokens)
    np.savez_compressed(arguments.out / "tiny.npz", **arrays)
    for name in ("demo8", "nano34"):
        if folder := getattr(arguments, name):
            np.savez_compressed(arguments.out / f"{name}.npz", **trained(folder))


if __name__ == "__main__":
    main()
