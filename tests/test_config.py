"""The configuration against the sizes of the released Qwen3.5-0.8B file, and against what a user may give."""

import dataclasses
import math

import pytest

from sqjax.config import ModelConfig, is_matrix
from sqjax.run import InputError

TEXT = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    },
}
FLAT = {"architectures": ["Qwen3_5ForCausalLM"], **TEXT}
NESTED = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "tie_word_embeddings": True,
    "text_config": TEXT,
    "vision_config": {"hidden_size": 7},
}


def test_parameters_are_those_of_the_released_file():
    shapes = ModelConfig.from_huggingface(FLAT).tensor_shapes()
    matrices = {name for name, shape in shapes.items() if is_matrix(name, shape)}
    assert sum(math.prod(shapes[name]) for name in matrices) == 751_894_528
    assert sum(math.prod(shapes[name]) for name in shapes.keys() - matrices) == 498_496
    assert (len(matrices), len(shapes)) == (187, 320)


def test_nested_and_flat_configurations_mean_the_same():
    assert ModelConfig.from_huggingface(NESTED) == ModelConfig.from_huggingface(FLAT)


def test_older_rope_settings_mean_the_same():
    older = {key: value for key, value in FLAT.items() if key != "rope_parameters"}
    older |= {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    older["rope_scaling"] = {"type": "mrope", "mrope_section": [11, 11, 10]}
    assert ModelConfig.from_huggingface(older) == ModelConfig.from_huggingface(FLAT)


def test_newer_rope_settings_win():
    both = FLAT | {"rope_theta": 5.0}
    assert ModelConfig.from_huggingface(both).rope_theta == 1e7


def test_layer_types_follow_from_the_interval_or_are_taken_as_given():
    config = ModelConfig.from_huggingface(FLAT)
    full = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert full == [3, 7, 11, 15, 19, 23]
    assert config.period == 4
    given = ["full_attention"] + ["linear_attention"] * 23
    irregular = ModelConfig.from_huggingface(FLAT | {"layer_types": given})
    assert irregular.layer_types == tuple(given)
    assert irregular.period == 24
    assert "blk.0.attn_q.weight" in irregular.tensor_shapes()


def test_outer_tie_decides_for_nested_configurations():
    untied = ModelConfig.from_huggingface(NESTED | {"tie_word_embeddings": False})
    assert not untied.tie_word_embeddings
    assert untied.tensor_shapes()["output.weight"] == (248320, 1024)
    inner_only = {key: value for key, value in NESTED.items() if key != "tie_word_embeddings"}
    assert ModelConfig.from_huggingface(inner_only).tie_word_embeddings


def test_model_type_stands_in_for_missing_architectures():
    assert ModelConfig.from_huggingface(TEXT) == ModelConfig.from_huggingface(FLAT)


def test_query_rows_hold_queries_and_gates():
    assert ModelConfig.from_huggingface(FLAT).tensor_shapes()["blk.3.attn_q.weight"] == (8 * 2 * 256, 1024)


def test_config_can_be_static_under_jit():
    hash(ModelConfig.from_huggingface(FLAT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["Qwen3_5MoeForCausalLM"]}, "Qwen3_5MoeForCausalLM"),
        ({"architectures": None, "model_type": "gemma"}, "gemma"),
        ({"num_attention_heads": 7}, "num_attention_heads"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads"),
        ({"linear_value_head_dim": 64}, "linear_value_head_dim"),
        ({"head_dim": 6}, "head_dim"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types"),
        ({"full_attention_interval": 0}, "full_attention_interval"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_impossible_configurations_name_what_is_wrong(change, message):
    with pytest.raises(InputError, match=message) as error:
        ModelConfig.from_huggingface(FLAT | change)
    assert "\n" not in str(error.value)


def test_contradictions_are_found_however_a_config_is_made():
    with pytest.raises(InputError, match="num_key_value_heads"):
        dataclasses.replace(ModelConfig.from_huggingface(FLAT), num_key_value_heads=3)
