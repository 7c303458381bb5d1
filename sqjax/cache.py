"""Scores by content: what was scored once, of the same bytes under the same settings, is read back."""

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sqjax.run import InputError, atomic_path

# The modules that decide a score: another line in one of them is another key.
_DECISIVE = ("cache", "checkpoint", "config", "delta_kernels", "delta_rule", "evaluation", "gguf_file", "model")
_DECISIVE += ("q4_k", "runtime")
_LIBRARIES = ("jax", "flax", "gguf", "xllamacpp")


def folder() -> Path:
    """Returns the user's folder for scores: `sqjax/scores` under XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sqjax" / "scores"


def key(**parts: Any) -> str:
    """Returns the SHA-256 of what a score depends on: the given parts, this package's code and its libraries."""
    text = json.dumps(parts | {"code": _code()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for name in _DECISIVE:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of this package and of what it computes with, as far as they are installed."""
    found = {}
    for name in ("sqjax", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Returns the arrays and the record that were stored under a key; None where there are none that can be read."""
    try:
        # A file that is cut off leaves numpy's own handle open.
        with _place(name).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        return arrays, json.loads(str(arrays.pop("record")))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def store(name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
    """Stores arrays and a record under a key; a folder that cannot be written is said on standard error, no more."""
    try:
        with atomic_path(_place(name)) as path, path.open("wb") as file:
            np.savez_compressed(file, **arrays, record=np.asarray(json.dumps(dict(record))))
    except InputError as error:
        print(f"scores are not kept: {error}", file=sys.stderr)


def _place(name: str) -> Path:
    return folder() / name[:2] / f"{name}.npz"
