"""Where models, texts and recipes come from, and the facts that every result states."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sqjax import gguf_file
from sqjax.checkpoint import Checkpoint, load_checkpoint
from sqjax.model import Qwen35
from sqjax.run import InputError
from sqjax.settings import read_toml
from sqjax.texts import Texts, read_texts

DType = Literal["f32", "bf16"]
Sources = str | Path | Sequence[str | Path]

PACKAGE = Path(__file__).parent
DEMO_MODEL = PACKAGE / "demo8"
SUITES = PACKAGE / "suites"
# In the source tree, and in an installed package.
CONFIGS = (PACKAGE.parent / "configs", PACKAGE / "configs")
# A sweep's file has the tables of a plan's too.
CONFIG_KINDS = {"sweep": "search", "plan": "recipe", "recipe": "steps", "refinement": "codes_rate"}
DEFAULT_SUITE = "heldout120"
CALIBRATION_SUITE = "calib360"
_DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def open_model(spec: str | Path, *, revision: str | None = None) -> Checkpoint:
    """Opens a Hugging Face folder, a hub id or a qwen35 GGUF file; tensors stay on disk until they are asked for.

    Raises:
      InputError: there is no such model, or it is broken or of another architecture.
    """
    path = Path(spec)
    if path.suffix.lower() == ".gguf" or path.is_file():
        return gguf_file.read_gguf(path)
    return load_checkpoint(spec, revision=revision)


def load_model(checkpoint: Checkpoint, *, dtype: DType = "f32") -> Qwen35:
    """Puts a checkpoint's weights on the device, matrices in `dtype`."""
    return Qwen35.from_tensors(checkpoint.config, checkpoint.tensors, dtype=_DTYPES[dtype])


def open_texts(sources: str | Path | Sequence[str | Path], *, seed: int | None = None) -> Texts:
    """Opens texts as `texts.read_texts` does; the name of a suite that comes with the package is a source too.

    Raises:
      InputError: a source does not exist or cannot be read.
    """
    sources = [sources] if isinstance(sources, str | Path) else list(sources)
    return read_texts([file for source in sources for file in _suite(source)], seed=seed)


def _suite(source: str | Path) -> list[str | Path]:
    files = sorted(SUITES.glob(f"{source}*.jsonl")) if str(source).isalnum() else []
    return files if files and not Path(source).exists() else [source]


def find_config(name: str | Path, kind: str = "recipe") -> Path:
    """Returns the TOML file of a name in configs/, or the path that was given.

    Args:
      name: without .toml a name, else a path.
      kind: one of CONFIG_KINDS; a kind is known by a key that its files have.

    Raises:
      InputError: there is none of that name and kind.
    """
    path = Path(name)
    if path.suffix == ".toml":
        return path
    files = {file.stem: file for folder in CONFIGS for file in sorted(folder.rglob("*.toml"))}
    kinds = {stem: _kind_of(file) for stem, file in files.items()}
    if kinds.get(str(name)) == kind:
        return files[str(name)]
    names = ", ".join(sorted(stem for stem, found in kinds.items() if found == kind))
    is_other = f"{name} is no {kind} but a {kinds[str(name)]}" if str(name) in kinds else f"there is no {kind} {name}"
    raise InputError(f"{is_other}; give one of {names}, or the path of a TOML file")


def _kind_of(file: Path) -> str | None:
    keys = read_toml(file).keys()
    return next((kind for kind, key in CONFIG_KINDS.items() if key in keys), None)


def file_facts(file: str | Path) -> dict[str, Any]:
    """Returns what every result states of a file: bytes, parameters, bits per weight, types, SHA-256."""
    facts = gguf_file.inspect(file)
    return {
        key: facts[key] for key in ("file_bytes", "tensor_bytes", "parameters", "bits_per_weight", "types", "sha256")
    }


def usage() -> dict[str, Any]:
    """Returns device and peak memory of this process: keys device, peak_memory_bytes, peak_device_memory_bytes."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        # The kind of a processor is "cpu" too.
        "device": " ".join(dict.fromkeys((device.platform, device.device_kind))),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_memory_bytes": statistics.get("peak_bytes_in_use"),
    }
