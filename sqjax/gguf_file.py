"""GGUF files of Qwen3.5: written tensor by tensor, read back lazily, inspected.

Let O denote output features, I input features, S super-blocks in a row, B the bytes of a packed super-block (144).
Source: conversion/qwen.py, conversion/base.py and src/llama-quant.cpp of llama.cpp at 0c1e5709.
"""

import json
import math
import mmap
import struct
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as ValueType
from gguf.gguf_writer import GGUFValue

from sqjax import gguf_metadata, q4_k, scales
from sqjax.checkpoint import Checkpoint
from sqjax.config import ModelConfig, is_matrix
from sqjax.q4_k import Q4K
from sqjax.run import InputError, OnDemand, atomic_path, sha256

# Rows of one step of conversion: bounds memory where a vocabulary has a quarter of a million rows.
_ROWS = 1 << 13
_SHOWN = 8
_NUMBERS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
    ValueType.BOOL: "?",
}


@dataclass(frozen=True)
class Written:
    """What was written: bytes of the file and of its tensors, and its SHA-256."""

    file_bytes: int
    tensor_bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def tensor_type(name: str, shape: tuple[int, ...], file_type: str) -> Type:
    """Returns the type that llama.cpp gives a tensor in a pure file of `file_type`.

    Vectors and the convolution are F32. Where a matrix's columns do not fill super-blocks of 256 weights, Q4_K becomes
    Q5_0, and F16 where they do not even fill blocks of 32 (llama-quant.cpp, tensor_type_fallback).
    """
    if not is_matrix(name, shape) or file_type == "f32":
        return Type.F32
    if file_type == "bf16":
        return Type.BF16
    columns = shape[-1]
    return Type.Q4_K if columns % 256 == 0 else Type.Q5_0 if columns % 32 == 0 else Type.F16


def write_gguf(
    path: str | Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, np.ndarray | Q4K] | None = None,
    *,
    file_type: str,
    provenance: Mapping[str, Any] | None = None,
) -> Written:
    """Writes a pure GGUF file of a Qwen3.5 model, one tensor in memory at a time, the same bytes for the same input.

    The header is the one that llama.cpp's converter writes. It does not depend on how codes were chosen, so that every
    file of a model has, to the byte, the size of llama.cpp's own pure file; provenance therefore lies beside it.

    Args:
      path: the file; it appears whole or not at all.
      checkpoint: configuration, tokenizer and name.
      tensors: GGUF name -> the tensor in place of the checkpoint's own: float weights (rounded to the file's type, to
        Q4_K by llama.cpp's plain rounding), Q4K codes, or the packed bytes as uint8 [O, bytes in a row]. May be lazy.
      file_type: "f32", "bf16" or "q4_k"; the type of every matrix. Vectors are F32.
      provenance: how the file came about, as JSON; written with the file's SHA-256 to `path` with .json appended.

    Raises:
      InputError: the path cannot be written, or a tensor has another shape than the configuration gives it.
    """
    shapes = file_order(checkpoint.config)
    types = {name: tensor_type(name, shape, file_type) for name, shape in shapes.items()}
    _announce_fallbacks(types, file_type)
    tensors = {} if tensors is None else tensors
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf_metadata.ARCHITECTURE)
        try:
            for key, value in gguf_metadata.header(checkpoint, file_type).items():
                writer.add_key_value(key, value.value, value.type, value.sub_type)
            for name, shape in shapes.items():
                writer.add_tensor_info(
                    name, shape, np.dtype(np.float32), _stored_bytes(shape, types[name]), types[name]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, shape in shapes.items():
                tensor = tensors[name] if name in tensors else checkpoint.tensors[name]
                writer.write_tensor_data(_encode(name, tensor, shape, types[name]))
        finally:
            writer.close()
    path = Path(path)
    tensor_bytes = sum(_stored_bytes(shape, types[name]) for name, shape in shapes.items())
    written = Written(path.stat().st_size, tensor_bytes, sha256(path))
    if provenance is not None:
        with atomic_path(_provenance_path(path)) as temporary:
            temporary.write_text(json.dumps({"sha256": written.sha256, **provenance}, indent=1), encoding="utf-8")
    return written


def _provenance_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def file_order(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all tensors in the order of llama.cpp's quantizer: by layer, then by name."""

    def rank(name: str) -> tuple[int, str]:
        return (int(name.split(".")[1]), name) if name.startswith("blk.") else (-1, name)

    shapes = config.tensor_shapes()
    return {name: shapes[name] for name in sorted(shapes, key=rank)}


def _announce_fallbacks(types: Mapping[str, Type], file_type: str) -> None:
    other = [f"{n} {t.name}" for n, t in types.items() if t in (Type.Q5_0, Type.F16)]
    if file_type == "q4_k" and other:
        rest = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        print(
            f"rows of {len(other)} tensors are no multiple of 256 weights, so that they cannot be Q4_K: "
            f"{', '.join(other[:_SHOWN])}{rest}",
            file=sys.stderr,
        )


def _stored_bytes(shape: tuple[int, ...], kind: Type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def _encode(name: str, tensor: np.ndarray | Q4K, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """The bytes of a tensor in the file."""
    if isinstance(tensor, Q4K):
        if kind is not Type.Q4_K or tuple(tensor.shape) != shape:
            raise InputError(f"{name} is {kind.name} {list(shape)}, but Q4_K codes of {list(tensor.shape)} were given")
        return np.ascontiguousarray(q4_k.pack(tensor))
    tensor = np.asarray(tensor)
    if tensor.dtype == np.uint8:
        if tensor.nbytes != _stored_bytes(shape, kind) or kind in (Type.F32, Type.BF16):
            raise InputError(f"{name} needs {_stored_bytes(shape, kind)} bytes of {kind.name}, not {tensor.nbytes}")
        return np.ascontiguousarray(tensor)
    if tensor.shape != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}, but the configuration gives it {list(shape)}")
    if kind is Type.F32:
        return np.ascontiguousarray(tensor, np.float32)
    if kind is Type.BF16:
        # ml_dtypes rounds to nearest, ties to even, as ggml_compute_fp32_to_bf16 does.
        return np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16)).view(np.uint8)
    blocks = (_quantize(tensor[start : start + _ROWS], kind) for start in range(0, len(tensor), _ROWS))
    return np.concatenate(list(blocks))


def _quantize(weight_OI: np.ndarray, kind: Type) -> np.ndarray:
    weight_OI = weight_OI.astype(np.float32)
    if kind is not Type.Q4_K:
        return gguf.quants.quantize(weight_OI, kind).view(np.uint8)
    return q4_k.pack(scales.round_to_nearest(weight_OI)).reshape(len(weight_OI), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file: its shape as [out, in], its type and its bytes, mapped into memory."""

    shape: tuple[int, ...]
    type: Type
    data: np.ndarray

    def decode(self) -> np.ndarray:
        """Returns the tensor; float32 where the type is a quantized one, else in its own type."""
        match self.type:
            case Type.F32:
                return self.data.view(np.float32).reshape(self.shape)
            case Type.F16:
                return self.data.view(np.float16).reshape(self.shape)
            case Type.BF16:
                return self.data.view(ml_dtypes.bfloat16).reshape(self.shape)
            case Type.Q4_K:
                # gguf's own goes through 16 rows at a time.
                blocks_OSB = self.data.reshape(*self.shape[:-1], -1, q4_k.BLOCK_BYTES)
                return np.asarray(q4_k.dequantize(q4_k.unpack(blocks_OSB)))
            case kind:
                return gguf.quants.dequantize(self.data.reshape(*self.shape[:-1], -1), kind).reshape(self.shape)


@dataclass(frozen=True)
class Contents:
    """Everything in a GGUF file: metadata by key, tensors by name."""

    fields: dict[str, GGUFValue]
    tensors: dict[str, StoredTensor]


class _Cursor:
    """Reads the values of a little-endian GGUF header in turn.

    gguf-py's reader makes several numpy views for each string, which takes a minute for a vocabulary of a quarter of
    a million tokens and its merges; this takes a second.
    """

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise ValueError("it ends within its header")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: ValueType) -> Any:
        if kind is ValueType.STRING:
            return self.text()
        return self.number(_NUMBERS[kind])

    def field(self) -> GGUFValue:
        kind = ValueType(self.number("I"))
        if kind is not ValueType.ARRAY:
            return GGUFValue(self.value(kind), kind)
        kind, length = ValueType(self.number("I")), self.number("Q")
        return GGUFValue([self.value(kind) for _ in range(length)], ValueType.ARRAY, kind)


def read_contents(path: str | Path) -> Contents:
    """Maps a GGUF file of any architecture into memory and parses its header.

    Raises:
      InputError: there is no such file, it is no GGUF file, or it is truncated.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _parse(data)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a GGUF file") from error
    except (ValueError, KeyError, struct.error) as error:
        raise InputError(f"{path} is no whole GGUF file ({error}); write or download it again") from error


def _parse(data: mmap.mmap) -> Contents:
    cursor = _Cursor(data)
    if data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version} is neither 2 nor 3, or big-endian")
    tensor_count, field_count = cursor.number("Q"), cursor.number("Q")
    fields = {cursor.text(): cursor.field() for _ in range(field_count)}
    heads = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = tuple(cursor.number("Q") for _ in range(cursor.number("I")))[::-1]
        heads.append((name, shape, Type(cursor.number("I")), cursor.number("Q")))
    alignment = fields["general.alignment"].value if "general.alignment" in fields else gguf.GGUF_DEFAULT_ALIGNMENT
    start = gguf.GGUFWriter.ggml_pad(cursor.at, alignment)
    tensors = {}
    for name, shape, kind, offset in heads:
        size = _stored_bytes(shape, kind)
        if start + offset + size > len(data):
            raise ValueError(f"it ends {start + offset + size - len(data)} bytes before {name} does")
        tensors[name] = StoredTensor(shape, kind, np.frombuffer(data, np.uint8, size, start + offset))
    return Contents(fields, tensors)


class GGUFTensors(OnDemand):
    """The tensors of a qwen35 GGUF file, decoded at each access; float32 where the type is a quantized one."""

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]):
        def decode(name: str) -> np.ndarray:
            tensor = stored[name].decode()
            return tensor if is_matrix(name, tensor.shape) else tensor.astype(np.float32)

        super().__init__(stored, decode)
        self._path, self._stored = path, stored

    @property
    def types(self) -> dict[str, str]:
        """Type of each tensor in the file, such as Q4_K."""
        return {name: stored.type.name for name, stored in self._stored.items()}

    def codes(self, name: str) -> Q4K:
        """Returns the codes and scales of a tensor in Q4_K.

        Raises:
          InputError: the tensor has another type.
        """
        stored = self._stored[name]
        if stored.type is not Type.Q4_K:
            raise InputError(f"{self._path}: {name} is {stored.type.name}; give a pure Q4_K file")
        return q4_k.unpack(stored.data.reshape(stored.shape[0], -1, q4_k.BLOCK_BYTES))

    def is_plain(self, name: str, weight_OI: np.ndarray) -> np.ndarray:
        """Returns for each super-block [O, S] in the first rows of a Q4_K tensor whether plain rounding gives it."""
        stored = self._stored[name]
        blocks_OSB = stored.data.reshape(stored.shape[0], -1, q4_k.BLOCK_BYTES)[: len(weight_OI)]
        plain = q4_k.pack(scales.round_to_nearest(weight_OI.astype(np.float32)))
        return (blocks_OSB == plain).all(axis=-1)


def read_gguf(path: str | Path) -> Checkpoint:
    """Opens a qwen35 GGUF file of any type that can be dequantized; its layout is the one that sqjax works in.

    Blocks of multi-token prediction are skipped, and counted on standard error.

    Raises:
      InputError: the file is no GGUF file, is truncated, has another architecture or lacks what a Qwen3.5 model needs.
    """
    path = Path(path)
    contents = read_contents(path)
    values = {key: field.value for key, field in contents.fields.items()}
    if (architecture := values.get("general.architecture")) != gguf_metadata.ARCHITECTURE:
        raise InputError(f"{path} has architecture {architecture}; give a {gguf_metadata.ARCHITECTURE} file")
    shapes = {name: tensor.shape for name, tensor in contents.tensors.items()}
    try:
        config = gguf_metadata.read_config(values, shapes)
        tokenizer = gguf_metadata.read_tokenizer(values)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks metadata of a Qwen3.5 model ({error}); convert the checkpoint again") from error
    _check_shapes(path, file_order(config), shapes)
    return Checkpoint(
        config=config,
        tensors=GGUFTensors(path, {name: contents.tensors[name] for name in config.tensor_shapes()}),
        tokenizer=tokenizer,
        name=values.get("general.name", path.stem),
        general=gguf_metadata.general(contents.fields),
    )


def _check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    findings = [f"{name} is missing" for name in expected if name not in found]
    findings += [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if findings:
        rest = f" and {len(findings) - _SHOWN} more" if len(findings) > _SHOWN else ""
        raise InputError(f"{path} does not hold the tensors that it describes: {'; '.join(findings[:_SHOWN])}{rest}")
    if surplus := [name for name in found if name not in expected]:
        print(f"skipped {len(surplus)} tensors of {path.name} ({surplus[0]}, ...)", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Inspection


def inspect(path: str | Path) -> dict[str, Any]:
    """Returns what a GGUF file of any architecture holds, as JSON.

    Keys: file_bytes, tensor_bytes, parameters, bits_per_weight (tensor bits over parameters), types (type -> number of
    tensors), sha256, metadata (long arrays are summarised), provenance (of files that sqjax wrote, while their .json
    lies beside them and names their SHA-256; else None).

    Raises:
      InputError: the file is no GGUF file, or is truncated.
    """
    path = Path(path)
    contents = read_contents(path)
    tensor_bytes = sum(tensor.data.nbytes for tensor in contents.tensors.values())
    parameters = sum(math.prod(tensor.shape) for tensor in contents.tensors.values())
    digest = sha256(path)
    return {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": tensor_bytes,
        "parameters": parameters,
        "bits_per_weight": 8 * tensor_bytes / parameters if parameters else 0.0,
        "types": dict(Counter(tensor.type.name for tensor in contents.tensors.values()).most_common()),
        "sha256": digest,
        "metadata": {key: _summary(field) for key, field in contents.fields.items()},
        "provenance": _read_provenance(_provenance_path(path), digest),
    }


def _read_provenance(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return provenance if isinstance(provenance, dict) and provenance.get("sha256") == digest else None


def _summary(field: GGUFValue) -> Any:
    if field.type is not ValueType.ARRAY or len(field.value) <= 4 * _SHOWN:
        return field.value
    return {"length": len(field.value), "first": field.value[:_SHOWN]}
