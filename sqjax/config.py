"""What a Qwen3.5 text model is: its dimensions, and from them the name and shape of every tensor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sqjax.run import InputError

LINEAR = "linear_attention"
FULL = "full_attention"

# Matrices of a block in the order in which their inputs arise; those of one tuple read the same input.
READERS = {
    LINEAR: (("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"), ("ssm_out",), ("ffn_gate", "ffn_up"), ("ffn_down",)),
    FULL: (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",)),
}

# Qwen3.5's own values, where a config.json is silent; llama.cpp's converter assumes the same sections.
_ROPE_DEFAULTS = {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": (11, 11, 10)}
# Architectures and, where a config.json has none, model types; the value says whether the text part is nested.
_ARCHITECTURES = {
    "Qwen3_5ForCausalLM": False,
    "Qwen3_5ForConditionalGeneration": True,
    "qwen3_5_text": False,
    "qwen3_5": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of a Qwen3.5 text model, under the names of its Hugging Face configuration.

    Raises:
      InputError: the dimensions contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    full_attention_interval: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise InputError(f"config: {field.name} is {getattr(self, field.name)}; it must be at least 1")
        rope = self.rope_dim
        contradictions = {
            f"num_hidden_layers is {self.num_hidden_layers} but layer_types has {len(self.layer_types)} entries": (
                len(self.layer_types) != self.num_hidden_layers
            ),
            f"layer_types may hold {LINEAR!r} and {FULL!r} only": not {LINEAR, FULL}.issuperset(self.layer_types),
            "num_attention_heads is no multiple of num_key_value_heads": (
                self.num_attention_heads % self.num_key_value_heads != 0
            ),
            "linear_num_value_heads is no multiple of linear_num_key_heads": (
                self.linear_num_value_heads % self.linear_num_key_heads != 0
            ),
            "linear_key_head_dim differs from linear_value_head_dim, which the qwen35 graph cannot hold": (
                self.linear_key_head_dim != self.linear_value_head_dim
            ),
            f"head_dim * partial_rotary_factor is {rope}; it must be even, positive and at most head_dim": (
                rope < 2 or rope % 2 != 0 or rope > self.head_dim
            ),
            "rms_norm_eps and rope_theta must be positive": not (self.rms_norm_eps > 0 and self.rope_theta > 0),
        }
        for message, contradicted in contradictions.items():
            if contradicted:
                raise InputError(f"config: {message}; correct config.json")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Reads a parsed config.json of Qwen3_5ForCausalLM, or the text part of Qwen3_5ForConditionalGeneration's.

        Rotary settings are found in `rope_parameters`, in `rope_scaling`, or as plain keys, as successive versions of
        transformers wrote them; missing `layer_types` follow from `full_attention_interval`.

        Raises:
          InputError: another architecture, a missing entry, a contradiction, or an option that Qwen3.5 does not have.
        """
        architecture = (config.get("architectures") or [config.get("model_type", "nothing")])[0]
        if architecture not in _ARCHITECTURES:
            raise InputError(f"config.json names architecture {architecture}; give a checkpoint of Qwen3_5ForCausalLM")
        text = dict(config.get("text_config") or config) if _ARCHITECTURES[architecture] else dict(config)
        # The head belongs to the outer model, so its entry decides when both parts have one.
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        _refuse_options(text)
        text |= _rope_settings(text)
        interval = text.setdefault("full_attention_interval", 4)
        if not text.get("layer_types"):
            if not isinstance(interval, int) or interval < 1:
                raise InputError(f"config.json sets full_attention_interval to {interval!r}; it must be at least 1")
            count = text.get("num_hidden_layers") or 0
            text["layer_types"] = [LINEAR if (layer + 1) % interval else FULL for layer in range(count)]
        missing = [field.name for field in dataclasses.fields(cls) if text.get(field.name) is None]
        if missing:
            raise InputError(f"config.json lacks {', '.join(missing)}; take the config.json that came with the weights")
        return cls(**{field.name: _parse(field, text[field.name]) for field in dataclasses.fields(cls)})

    @property
    def rope_dim(self) -> int:
        """Number of leading dimensions of an attention head that rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values of the linear mixer, in that order."""
        key_width = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * key_width + self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def period(self) -> int:
        """Smallest p that divides the number of layers such that layer i has the type of layer i mod p."""
        count = self.num_hidden_layers
        return next(
            period
            for period in range(1, count + 1)
            if count % period == 0 and self.layer_types == self.layer_types[:period] * (count // period)
        )

    def block_shapes(self, layer_type: str) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor of a block in GGUF layout, by its bare name (`attn_norm`, `ssm_dt`)."""
        hidden, inner = self.hidden_size, self.intermediate_size
        heads, key_heads, head = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        value_heads, value = self.linear_num_value_heads, self.linear_value_head_dim
        if layer_type == LINEAR:
            mixer = {
                "attn_qkv": (self.conv_channels, hidden),
                "attn_gate": (value_heads * value, hidden),
                "ssm_alpha": (value_heads, hidden),
                "ssm_beta": (value_heads, hidden),
                "ssm_conv1d": (self.conv_channels, self.linear_conv_kernel_dim),
                "ssm_a": (value_heads,),
                "ssm_dt": (value_heads,),
                "ssm_norm": (value,),
                "ssm_out": (hidden, value_heads * value),
            }
        else:
            mixer = {
                # Each head holds its query and, after it, its output gate.
                "attn_q": (heads * 2 * head, hidden),
                "attn_k": (key_heads * head, hidden),
                "attn_v": (key_heads * head, hidden),
                "attn_q_norm": (head,),
                "attn_k_norm": (head,),
                "attn_output": (hidden, heads * head),
            }
        mlp = {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)}
        return {"attn_norm": (hidden,)} | mixer | {"post_attention_norm": (hidden,)} | mlp

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns every tensor's GGUF name and its shape as [out, in], in the order of the layers."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (self.vocab_size, self.hidden_size)}
        for layer, layer_type in enumerate(self.layer_types):
            for attribute, shape in self.block_shapes(layer_type).items():
                shapes[tensor_name(layer, attribute)] = shape
        shapes["output_norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


def tensor_name(layer: int, attribute: str) -> str:
    """Returns the GGUF name of a block's tensor, given the block's index and the tensor's bare name."""
    suffix = {"ssm_a": "", "ssm_dt": ".bias"}.get(attribute, ".weight")
    return f"blk.{layer}.{attribute}{suffix}"


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantized in a pure file: all that have two dimensions but the convolution.

    References:
      llama.cpp, src/llama-quant.cpp, tensor_allows_quantization.
    """
    return len(shape) == 2 and "ssm_conv1d" not in name


def _refuse_options(text: Mapping[str, Any]) -> None:
    expected = {"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True}
    for key, value in expected.items():
        if text.get(key, value) != value:
            raise InputError(f"config.json sets {key} to {text[key]!r}; Qwen3.5 text models have {value!r}")


def _rope_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """Merges rotary settings; the newest place that states a value wins."""
    settings = dict(_ROPE_DEFAULTS)
    for place in (text, text.get("rope_scaling") or {}, text.get("rope_parameters") or {}):
        settings |= {key: place[key] for key in _ROPE_DEFAULTS if place.get(key) is not None}
        kind = place.get("rope_type", place.get("type", "default"))
        if kind not in ("default", "mrope"):
            raise InputError(
                f"config.json asks for rotary scaling {kind!r}; only the unscaled rotary embedding is supported"
            )
    return settings


def _parse(field: dataclasses.Field, value: Any) -> Any:
    """Casts a JSON value to a field's type; lists become tuples, so that a config hashes and is static under jit."""
    try:
        if isinstance(value, list | tuple):
            return tuple(value)
        return field.type(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"config.json sets {field.name} to {value!r}; correct it") from error
