"""GGUF files against gguf-py's own reader and decoders, against the sizes of the release, and against broken input."""

import errno
import json
import math
import os
import resource
import tempfile
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import random_checkpoint
import tokenizers

from sqjax import q4_k
from sqjax.checkpoint import Checkpoint, load_checkpoint
from sqjax.config import ModelConfig
from sqjax.gguf_file import file_order, inspect, read_contents, read_gguf, tensor_type, write_gguf
from sqjax.run import InputError, sha256

# Rows that fill super-blocks; the vocabulary has 500 entries, the tokenizer 268.
QUANTIZABLE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "vocab_size": 500}
QUANTIZABLE |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
QUANTIZABLE |= {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [8, 4, 4]}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("random") / "model"
    random_checkpoint.write(folder, **QUANTIZABLE)
    return load_checkpoint(folder)


def _reference(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


@pytest.mark.parametrize("tied", [True, False])
def test_f32_round_trip(tmp_path, tied):
    random_checkpoint.write(tmp_path / "model", tie_word_embeddings=tied, rms_norm_eps=1e-6)
    before = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", before, file_type="f32")
    after = read_gguf(tmp_path / "a.gguf")
    assert after.config == before.config
    assert after.general == before.general
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], tensor.astype(np.float32))
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    assert (after.tokenizer.eos_token, after.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("file_type", ["f32", "bf16", "q4_k"])
def test_gguf_py_reads_the_same(tmp_path, checkpoint, file_type):
    path = tmp_path / "a.gguf"
    written = write_gguf(path, checkpoint, file_type=file_type)
    reader, contents = _reference(path), read_contents(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {key: field.value for key, field in contents.fields.items()}
    assert fields["general.file_type"] == {"f32": 0, "bf16": 32, "q4_k": 15}[file_type]
    assert fields["general.quantization_version"] == 2
    assert [tensor.name for tensor in reader.tensors] == list(contents.tensors)
    checked = read_gguf(path).tensors
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(checked[tensor.name].astype(np.float32), decoded)
    assert written.tensor_bytes == sum(tensor.n_bytes for tensor in reader.tensors)
    assert (written.file_bytes, written.sha256) == (path.stat().st_size, sha256(path))


def test_bf16_rounds_as_ggml_does(tmp_path):
    random_checkpoint.write(tmp_path / "model", dtype=np.float32)
    checkpoint = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="bf16")
    for name, stored in read_contents(tmp_path / "a.gguf").tensors.items():
        if stored.type is gguf.GGMLQuantizationType.BF16:
            expected = gguf.quants.quantize(checkpoint.tensors[name], gguf.GGMLQuantizationType.BF16)
            np.testing.assert_array_equal(stored.data, expected.ravel())


def test_order_of_tensors_is_that_of_llama_quantize(tmp_path, checkpoint):
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="f32")
    names = list(read_contents(tmp_path / "a.gguf").tensors)
    assert names[:2] == ["output_norm.weight", "token_embd.weight"]
    linear = "attn_gate attn_norm attn_qkv ffn_down ffn_gate ffn_up post_attention_norm"
    linear += " ssm_a ssm_alpha ssm_beta ssm_conv1d ssm_dt ssm_norm ssm_out"
    assert [name.split(".")[2] for name in names if name.startswith("blk.0.")] == linear.split()
    eleven = ModelConfig.from_huggingface(_huge(num_hidden_layers=12))
    layers = [int(name.split(".")[1]) for name in file_order(eleven) if name.startswith("blk.")]
    assert layers == sorted(layers)


def test_same_input_same_bytes(tmp_path, checkpoint):
    """From the checkpoint, from codes, from packed bytes, and from the file itself: one file."""
    first = write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    again = write_gguf(tmp_path / "b.gguf", checkpoint, file_type="q4_k")
    back = read_gguf(tmp_path / "a.gguf")
    codes = {name: back.tensors.codes(name) for name, kind in back.tensors.types.items() if kind == "Q4_K"}
    assert len(codes) == sum(tensor.ndim == 2 for tensor in back.tensors.values()) - 1
    packed = {name: q4_k.pack(code).reshape(len(code.d_OS), -1) for name, code in codes.items()}
    from_codes = write_gguf(tmp_path / "c.gguf", back, codes, file_type="q4_k")
    from_bytes = write_gguf(tmp_path / "d.gguf", checkpoint, packed, file_type="q4_k")
    assert first == again == from_codes == from_bytes
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()


def test_size_depends_on_the_model_alone(tmp_path, checkpoint):
    plain = write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    generator = np.random.default_rng(0)
    other = {
        "blk.0.ffn_up.weight": generator.standard_normal((512, 256), np.float32),
        "blk.0.attn_norm.weight": generator.standard_normal(256, np.float32),
    }
    long_story = {"recipe": "x" * 10_000}
    changed = write_gguf(tmp_path / "b.gguf", checkpoint, other, file_type="q4_k", provenance=long_story)
    assert changed.sha256 != plain.sha256
    assert changed.file_bytes == plain.file_bytes
    np.testing.assert_array_equal(
        read_gguf(tmp_path / "b.gguf").tensors["blk.0.attn_norm.weight"], other["blk.0.attn_norm.weight"]
    )


def test_jax_codes_are_written(tmp_path, checkpoint):
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    name = "blk.1.attn_output.weight"
    codes = read_gguf(tmp_path / "a.gguf").tensors.codes(name)
    on_device = jax.tree.map(jax.numpy.asarray, codes)
    write_gguf(tmp_path / "b.gguf", checkpoint, {name: on_device}, file_type="q4_k")
    assert sha256(tmp_path / "a.gguf") == sha256(tmp_path / "b.gguf")


# ---------------------------------------------------------------------------------------------------------------------
# Sizes of released and of trained models


def _huge(**changes) -> dict:
    dimensions = random_checkpoint.DIMENSIONS | {
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "layer_types": None,
        "full_attention_interval": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
    }
    return {"architectures": ["Qwen3_5ForCausalLM"], **dimensions, **changes}


@pytest.mark.parametrize(
    ("changes", "quantized", "plain", "total_bytes"),
    [
        pytest.param({}, 187, 133, 424_934_656, id="Qwen3.5-0.8B"),
        pytest.param(
            {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1280, "num_hidden_layers": 8}
            | {"num_attention_heads": 2, "num_key_value_heads": 1}
            | {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
            *(63, 45, 19_372_736),
            id="nano34",
        ),
    ],
)
def test_tensor_bytes_of_pure_q4_k(changes, quantized, plain, total_bytes):
    shapes = file_order(ModelConfig.from_huggingface(_huge(**changes)))
    kinds = [tensor_type(name, shape, "q4_k") for name, shape in shapes.items()]
    assert kinds.count(gguf.GGMLQuantizationType.Q4_K) == quantized
    assert kinds.count(gguf.GGMLQuantizationType.F32) == plain
    per_weight = {gguf.GGMLQuantizationType.Q4_K: 144 / 256, gguf.GGMLQuantizationType.F32: 4}
    assert sum(math.prod(shape) * per_weight[kind] for shape, kind in zip(shapes.values(), kinds)) == total_bytes


def test_rows_that_fill_no_super_block(tmp_path, capsys):
    """As llama.cpp does: Q5_0 where 32 divides the columns, else F16; one line says which."""
    random_checkpoint.write(tmp_path / "model", hidden_size=64, intermediate_size=72)
    checkpoint = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="q4_k")
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "blk.0.ffn_down.weight F16" in warning
    assert "token_embd.weight Q5_0" in warning
    back = read_gguf(tmp_path / "a.gguf").tensors
    assert back.types["blk.1.ffn_down.weight"] == "F16"
    assert back.types["blk.1.attn_k.weight"] == "Q5_0"
    for name, tensor in checkpoint.tensors.items():
        step = 0.0 if back.types[name] == "F32" else np.abs(tensor.astype(np.float32)).max() / 15
        np.testing.assert_allclose(back[name].astype(np.float32), tensor.astype(np.float32), atol=step)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

TEXTS = [
    "The king and the thing: I'm, we'LL, they'd; 1234567 + 3.14 = ?",
    "  leading, \t tabs\r\n\n\n   and trailing   ",
    "naïve café, cafe\u0301, हिन्दी, 我想在apple工作, 🚀👍🏽 \u200d \u00a0",
    "<|im_start|>user\nthe <|im_end|> <|not_special|>",
    "",
]


def test_tokenizer_survives(tmp_path):
    thinking = tokenizers.AddedToken("<think>", special=False, normalized=False)
    ending = tokenizers.AddedToken("<|end|>", special=True, normalized=False)
    random_checkpoint.write(tmp_path / "model", added=(thinking, ending))
    before = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", before, file_type="bf16")
    after = read_gguf(tmp_path / "a.gguf")
    for text in [*TEXTS, "in <think> the\n</think><|end|>the"]:
        np.testing.assert_array_equal(before.tokenizer.encode(text), after.tokenizer.encode(text))
        assert before.tokenizer.decode(before.tokenizer.encode(text)) == after.tokenizer.decode(
            after.tokenizer.encode(text)
        )
    fields = read_contents(tmp_path / "a.gguf").fields
    types = fields["tokenizer.ggml.token_type"].value
    tokens = fields["tokenizer.ggml.tokens"].value
    assert (tokens[268], types[268]) == ("<think>", gguf.TokenType.USER_DEFINED)
    assert (tokens[269], types[269]) == ("<|end|>", gguf.TokenType.CONTROL)
    assert types[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]


def test_rows_without_token_are_unused(tmp_path, checkpoint):
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="bf16")
    fields = read_contents(tmp_path / "a.gguf").fields
    tokens, types = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(types) == 500
    assert tokens[268:] == [f"[PAD{i}]" for i in range(268, 500)]
    assert set(types[268:]) == {gguf.TokenType.UNUSED}
    assert read_gguf(tmp_path / "a.gguf").tokenizer.core.get_vocab_size() == 268


def test_tokenizer_that_splits_otherwise_is_announced(tmp_path, capsys):
    random_checkpoint.write(tmp_path / "model")
    checkpoint = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="bf16")
    assert capsys.readouterr().err == ""
    checkpoint.tokenizer.core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="bf16")
    assert "splits text otherwise" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def _rewrite(source: Path, target: Path, *, skip=(), arch="qwen35", fields=(), tensors=(), kind=None) -> None:
    """Copies a file through gguf-py, with other fields and tensors, matrices in type `kind`."""
    contents = read_contents(source)
    writer = gguf.GGUFWriter(target, arch)
    for key, field in (contents.fields | dict(fields)).items():
        if key != "general.architecture" and key not in skip:
            writer.add_key_value(key, field.value, field.type, field.sub_type)
    for name, tensor in contents.tensors.items():
        if name not in skip:
            wide = kind is not None and len(tensor.shape) == 2 and "conv1d" not in name
            data = gguf.quants.quantize(tensor.decode(), kind) if wide else tensor.decode()
            writer.add_tensor(name, data, raw_dtype=kind if wide else None)
    for name, data in tensors:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def f32_file(tmp_path_factory, checkpoint) -> Path:
    path = tmp_path_factory.mktemp("f32") / "model.gguf"
    write_gguf(path, checkpoint, file_type="f32")
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "F16", "TQ2_0"])
def test_other_types_are_dequantized(tmp_path, f32_file, checkpoint, kind):
    kind = gguf.GGMLQuantizationType[kind]
    _rewrite(f32_file, tmp_path / "a.gguf", kind=kind)
    back = read_gguf(tmp_path / "a.gguf")
    for name in ("token_embd.weight", "blk.1.attn_q.weight"):
        weight = checkpoint.tensors[name].astype(np.float32)
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        np.testing.assert_array_equal(back.tensors[name].astype(np.float32), expected)
    with pytest.raises(InputError, match=kind.name):
        back.tensors.codes("token_embd.weight")


def test_blocks_of_multi_token_prediction_are_skipped(tmp_path, f32_file, checkpoint, capsys):
    uint32 = gguf.GGUFValueType.UINT32
    value = gguf.gguf_writer.GGUFValue
    fields = {"qwen35.block_count": value(3, uint32), "qwen35.nextn_predict_layers": value(1, uint32)}
    flags = read_contents(f32_file).fields["qwen35.attention.recurrent_layers"]
    fields["qwen35.attention.recurrent_layers"] = value([*flags.value, False], flags.type, flags.sub_type)
    extra = [("blk.2.nextn.eh_proj.weight", np.zeros((256, 512), np.float32)), ("blk.2.attn_norm.weight", np.ones(256))]
    _rewrite(f32_file, tmp_path / "a.gguf", fields=fields, tensors=extra)
    back = read_gguf(tmp_path / "a.gguf")
    assert back.config == checkpoint.config
    assert list(back.tensors) == list(checkpoint.tensors)
    assert "skipped 2 tensors" in capsys.readouterr().err


def test_older_files_state_the_interval_only(tmp_path, f32_file, checkpoint):
    _rewrite(f32_file, tmp_path / "a.gguf", skip=("qwen35.attention.recurrent_layers",))
    assert read_gguf(tmp_path / "a.gguf").config == checkpoint.config


# ---------------------------------------------------------------------------------------------------------------------
# Inspection


def test_inspect(tmp_path, checkpoint):
    path = tmp_path / "a.gguf"
    written = write_gguf(path, checkpoint, file_type="q4_k", provenance={"recipe": "plain"})
    report = json.loads(json.dumps(inspect(path)))
    shapes = checkpoint.config.tensor_shapes()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    vectors = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) == 1 or "conv1d" in name)
    assert report["parameters"] == parameters
    assert report["tensor_bytes"] == written.tensor_bytes == (parameters - vectors) * 4.5 / 8 + 4 * vectors
    assert report["bits_per_weight"] == pytest.approx(8 * written.tensor_bytes / parameters)
    assert (report["file_bytes"], report["sha256"]) == (written.file_bytes, written.sha256)
    assert report["types"] == {"Q4_K": 16, "F32": 11}
    assert report["metadata"]["qwen35.block_count"] == 2
    assert report["metadata"]["tokenizer.ggml.tokens"]["length"] == 500
    assert report["provenance"] == {"sha256": written.sha256, "recipe": "plain"}
    write_gguf(path, checkpoint, {"output_norm.weight": np.ones(256, np.float32)}, file_type="q4_k")
    assert inspect(path)["provenance"] is None  # the story beside it is that of another file


def test_inspect_knows_any_architecture(tmp_path, f32_file):
    _rewrite(f32_file, tmp_path / "a.gguf", arch="llama", skip=("blk.0.ssm_a",))
    assert inspect(tmp_path / "a.gguf")["metadata"]["general.architecture"] == "llama"
    with pytest.raises(InputError, match="architecture llama"):
        read_gguf(tmp_path / "a.gguf")


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_not_gguf(tmp_path):
    for content in (b"", b"GGU", b"not a model at all" * 100, b"GGUF" + b"\xff" * 100):
        (tmp_path / "a.gguf").write_bytes(content)
        for function in (read_gguf, inspect):
            with pytest.raises(InputError, match="no whole GGUF file"):
                function(tmp_path / "a.gguf")
    with pytest.raises(InputError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(InputError, match="cannot be read"):
        read_gguf(tmp_path)


@pytest.mark.parametrize("share", [0.0001, 0.003, 0.01, 0.5, 0.99999])
def test_truncated_gguf(tmp_path, f32_file, share):
    whole = f32_file.read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="no whole GGUF file"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (("blk.0.ssm_out.weight",), "blk.0.ssm_out.weight is missing"),
        (("token_embd.weight",), "token_embd.weight"),
        (("qwen35.ssm.state_size",), "qwen35.ssm.state_size"),
        (("qwen35.rope.dimension_sections",), "qwen35.rope.dimension_sections"),
        (("tokenizer.ggml.tokens",), "lacks metadata"),
        (("tokenizer.ggml.pre",), "not gpt2 qwen35"),
    ],
)
def test_incomplete_gguf(tmp_path, f32_file, skip, message):
    _rewrite(f32_file, tmp_path / "a.gguf", skip=skip)
    with pytest.raises(InputError, match=message):
        read_gguf(tmp_path / "a.gguf")


def _leaves_nothing(path: Path, checkpoint: Checkpoint, match: str, tensors=None) -> None:
    with pytest.raises(InputError, match=match):
        write_gguf(path, checkpoint, tensors, file_type="q4_k")
    assert not path.is_file()
    assert not path.parent.is_dir() or not list(path.parent.iterdir())


def test_target_that_cannot_be_written(tmp_path, checkpoint, monkeypatch):
    (tmp_path / "file").write_text("")
    _leaves_nothing(tmp_path / "file" / "a.gguf", checkpoint, "cannot write")

    def mkstemp(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    _leaves_nothing(tmp_path / "folder" / "a.gguf", checkpoint, "Read-only file system")


def test_disk_that_fills_up(tmp_path, checkpoint):
    """A limit on the size of a file stands for the full disk: a write in the middle of the tensors fails."""
    target = tmp_path / "folder" / "a.gguf"
    target.parent.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        _leaves_nothing(target, checkpoint, "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_older_file_outlives_a_failure(tmp_path, checkpoint):
    path = tmp_path / "a.gguf"
    path.write_text("older")
    with pytest.raises(InputError):
        write_gguf(path, checkpoint, {"blk.0.ffn_up.weight": np.zeros((3, 256), np.float32)}, file_type="q4_k")
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "tensor",
    [
        np.zeros((512, 255), np.float32),
        np.zeros((512, 143), np.uint8),
        q4_k.Q4K(
            *(
                np.zeros(s, t)
                for s, t in (((511, 1), "f2"),) * 2 + (((511, 1, 8), "u1"),) * 2 + (((511, 1, 8, 32), "u1"),)
            )
        ),
    ],
    ids=["weights", "bytes", "codes"],
)
def test_tensor_of_another_shape(tmp_path, checkpoint, tensor):
    path = tmp_path / "folder" / "a.gguf"
    _leaves_nothing(path, checkpoint, "blk.0.ffn_up.weight", {"blk.0.ffn_up.weight": tensor})


def test_half_precision_checkpoint_to_bf16(tmp_path):
    random_checkpoint.write(tmp_path / "model", dtype=np.float16)
    checkpoint = load_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "a.gguf", checkpoint, file_type="bf16")
    expected = checkpoint.tensors["token_embd.weight"].astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read_gguf(tmp_path / "a.gguf").tensors["token_embd.weight"], expected)
