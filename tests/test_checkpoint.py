"""Hugging Face checkpoints: every transform against a loop over heads, and every way in which a folder can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
import random_checkpoint
from safetensors.numpy import save_file

from sqjax.checkpoint import load_checkpoint
from sqjax.run import InputError


def _f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def test_value_heads_are_tiled_over_key_heads(tmp_path):
    stored = random_checkpoint.write(tmp_path)
    tensors = load_checkpoint(tmp_path).tensors
    keys, values, e = 2, 4, 16
    linear = {
        name.removeprefix("model.layers.0.linear_attn."): x for name, x in stored.items() if "linear_attn" in name
    }
    first = 2 * keys * e
    for head in range(values):
        # llama.cpp lets value head h read key head h % n_k; transformers repeats each key head r times in a row.
        key, repeat = head % keys, head // keys
        origin = key * (values // keys) + repeat
        here, there = slice(head * e, (head + 1) * e), slice(origin * e, (origin + 1) * e)
        shifted_here, shifted_there = (slice(s.start + first, s.stop + first) for s in (here, there))
        qkv = tensors["blk.0.attn_qkv.weight"]
        np.testing.assert_array_equal(qkv[shifted_here], linear["in_proj_qkv.weight"][shifted_there])
        convolution = tensors["blk.0.ssm_conv1d.weight"]
        np.testing.assert_array_equal(convolution[shifted_here], _f32(linear["conv1d.weight"][shifted_there, 0]))
        np.testing.assert_array_equal(tensors["blk.0.attn_gate.weight"][here], linear["in_proj_z.weight"][there])
        np.testing.assert_array_equal(tensors["blk.0.ssm_alpha.weight"][head], linear["in_proj_a.weight"][origin])
        np.testing.assert_array_equal(tensors["blk.0.ssm_beta.weight"][head], linear["in_proj_b.weight"][origin])
        np.testing.assert_array_equal(tensors["blk.0.ssm_out.weight"][:, here], linear["out_proj.weight"][:, there])
        assert tensors["blk.0.ssm_a"][head] == pytest.approx(-np.exp(float(linear["A_log"][origin])), rel=1e-6)
        assert tensors["blk.0.ssm_dt.bias"][head] == float(linear["dt_bias"][origin])
    np.testing.assert_array_equal(tensors["blk.0.attn_qkv.weight"][:first], linear["in_proj_qkv.weight"][:first])
    np.testing.assert_array_equal(tensors["blk.0.ssm_conv1d.weight"][:first], _f32(linear["conv1d.weight"][:first, 0]))


def test_gains_are_stored_around_one_except_the_gated_one(tmp_path):
    stored = random_checkpoint.write(tmp_path)
    tensors = load_checkpoint(tmp_path).tensors
    one_more = {
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.1.post_attention_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for name, origin in one_more.items():
        np.testing.assert_array_equal(tensors[name], _f32(stored[origin]) + np.float32(1))
    gated = _f32(stored["model.layers.0.linear_attn.norm.weight"])
    np.testing.assert_array_equal(tensors["blk.0.ssm_norm.weight"], gated)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_matrices_keep_their_type_and_vectors_are_float32(tmp_path, dtype):
    stored = random_checkpoint.write(tmp_path, dtype=dtype)
    tensors = load_checkpoint(tmp_path).tensors
    untouched = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    }
    for name, origin in untouched.items():
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name], stored[origin])
    vectors = [tensor for tensor in tensors.values() if tensor.ndim == 1]
    assert len(vectors) == 10
    assert all(vector.dtype == np.float32 for vector in vectors)
    assert tensors["blk.0.ssm_conv1d.weight"].dtype == np.float32


def test_shards_and_the_vision_wrapper_hold_the_same_model(tmp_path, capsys):
    random_checkpoint.write(tmp_path / "plain")
    random_checkpoint.write(tmp_path / "wrapped", shards=3, conditional=True)
    plain, wrapped = load_checkpoint(tmp_path / "plain"), load_checkpoint(tmp_path / "wrapped")
    assert plain.config == wrapped.config
    assert list(plain.tensors) == list(wrapped.tensors)
    for name, tensor in plain.tensors.items():
        np.testing.assert_array_equal(tensor, wrapped.tensors[name])
    assert "1 vision, 1 multi-token prediction" in capsys.readouterr().err


def test_untied_head(tmp_path):
    stored = random_checkpoint.write(tmp_path, tie_word_embeddings=False)
    np.testing.assert_array_equal(load_checkpoint(tmp_path).tensors["output.weight"], stored["lm_head.weight"])


def test_a_tied_checkpoint_may_repeat_its_head(tmp_path, capsys):
    random_checkpoint.write(
        tmp_path, edit=lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    assert "output.weight" not in load_checkpoint(tmp_path).tensors
    assert "1 tied head" in capsys.readouterr().err


def test_special_tokens_fall_back_on_the_configuration(tmp_path):
    random_checkpoint.write(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_checkpoint(tmp_path).tokenizer.eos_token == "<|im_end|>"


def test_the_model_card_goes_into_the_metadata(tmp_path, capsys):
    random_checkpoint.write(tmp_path / "Some-Model-0.5B")
    (tmp_path / "Some-Model-0.5B" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a, b]\n---\n# Text\n")
    general = load_checkpoint(tmp_path / "Some-Model-0.5B").general
    assert general["general.license"].value == "apache-2.0"
    assert general["general.tags"].value == ["a", "b"]
    (tmp_path / "Some-Model-0.5B" / "README.md").write_text("---\nlicense: [\n---\n")
    assert load_checkpoint(tmp_path / "Some-Model-0.5B").general["general.name"].value == "Some-Model-0.5B"
    assert "model card of Some-Model-0.5B is left out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What can be wrong


def _fails(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_all_findings_are_reported_together(tmp_path):
    def edit(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros(63, np.float32)
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.nan
        tensors["model.layers.0.linear_attn.dt_bias"][1] = -np.inf
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((96, 64), np.int8)

    random_checkpoint.write(tmp_path, edit=edit)
    _fails(
        tmp_path,
        "1 missing: model.layers.1.self_attn.k_proj.weight",
        "1 surplus: model.layers.7.mlp.up_proj.weight",
        "1 misshapen: model.norm.weight [63] instead of [64]",
        "1 neither BF16, F16 nor F32: model.layers.1.mlp.up_proj.weight I8",
        "2 not finite: model.layers.0.linear_attn.dt_bias, model.layers.0.mlp.down_proj.weight",
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_entry_that_is_not_finite_is_found(tmp_path, dtype, value):
    def edit(tensors):
        tensors["model.embed_tokens.weight"][-1, -1] = value
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = ml_dtypes.finfo(dtype).max  # the largest that is finite

    random_checkpoint.write(tmp_path, dtype=dtype, edit=edit)
    _fails(tmp_path, "1 not finite: model.embed_tokens.weight")


def test_folder_that_is_no_checkpoint(tmp_path):
    _fails(tmp_path, "has no config.json")
    _fails(tmp_path / "absent" / "deeper" / "still", "is no folder")
    (tmp_path / "config.json").write_text("{")
    _fails(tmp_path, "cannot be read")
    (tmp_path / "config.json").write_text("[]")
    _fails(tmp_path, "is no JSON object")


def test_other_architecture(tmp_path):
    random_checkpoint.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    _fails(tmp_path, "LlamaForCausalLM", "Qwen3_5ForCausalLM")


def test_configuration_that_contradicts_the_tensors(tmp_path):
    random_checkpoint.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    _fails(tmp_path, "6 misshapen", "model.layers.0.mlp.gate_proj.weight [96, 64] instead of [128, 64]")


def test_truncated_safetensors(tmp_path):
    random_checkpoint.write(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    _fails(tmp_path, "model.safetensors is no whole safetensors file", "download it again")


def test_absent_shard(tmp_path):
    random_checkpoint.write(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    _fails(tmp_path, "lacks model-00002-of-00002.safetensors")


def test_pickle_is_never_loaded(tmp_path):
    random_checkpoint.write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    _fails(tmp_path, "pytorch_model.bin", "never loaded")


def test_no_weights(tmp_path):
    random_checkpoint.write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    _fails(tmp_path, "has no *.safetensors file")


def test_no_tokenizer(tmp_path):
    random_checkpoint.write(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    _fails(tmp_path, "has no tokenizer.json")


def test_tokenizer_larger_than_the_vocabulary(tmp_path):
    random_checkpoint.write(tmp_path, vocab_size=267)
    _fails(tmp_path, "token 267", "267 embeddings")
    random_checkpoint.write(tmp_path, vocab_size=268)
    assert load_checkpoint(tmp_path).config.vocab_size == 268


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def test_hub_id_is_downloaded_without_pickles(tmp_path, monkeypatch):
    random_checkpoint.write(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(hub_id, *, revision, allow_patterns):
        asked.update(hub_id=hub_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = load_checkpoint("Qwen/Qwen3.5-0.8B", revision="abc")
    assert checkpoint.name == "Qwen3.5-0.8B"
    named = {key: checkpoint.general[f"general.{key}"].value for key in ("name", "basename")}
    assert named == {"name": "Qwen3.5 0.8B", "basename": "Qwen3.5"}
    assert (asked["hub_id"], asked["revision"]) == ("Qwen/Qwen3.5-0.8B", "abc")
    assert {"*.json", "*.safetensors"} <= set(asked["patterns"])
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["patterns"])


def test_no_network(monkeypatch):
    def snapshot_download(*arguments, **options):
        raise ConnectionError("no route to host\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    _fails("Qwen/Qwen3.5-0.8B", "no route to host", "into a folder by hand")


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    _fails("Qwen/Qwen3.5-0.8B", "pip install 'sqjax[hub]'", "folder")


def test_offline_cache_is_honoured(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    random_checkpoint.write(repository / "snapshots" / commit)
    program = "from sqjax.hub import download; print(download('some/model'))"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == repository / "snapshots" / commit


def test_surplus_names_are_shortened(tmp_path):
    surplus = {f"model.extra.{i:03d}": np.zeros(1, np.float32) for i in range(100)}
    random_checkpoint.write(tmp_path)
    save_file(surplus, tmp_path / "surplus.safetensors")
    _fails(tmp_path, "100 surplus: model.extra.000", "and 88 more")
