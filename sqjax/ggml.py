"""What llama.cpp makes of a model: pure Q4_K_M through ggml's own code, without and with an importance matrix."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sqjax import calibration, fingerprints, gguf_file, making
from sqjax.checkpoint import Checkpoint
from sqjax.fingerprints import UNKNOWN, Seen
from sqjax.run import InputError, OnDemand, sha256
from sqjax.sources import CALIBRATION_SUITE, Sources, file_facts, open_model, usage


def baselines(
    model: str | Path,
    out: str | Path,
    *,
    imatrix: str | Path | None = None,
    statistics: str | Path | None = None,
    text: Sources = CALIBRATION_SUITE,
    tokens: int = 1_000_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a model's pure Q4_K_M files as ggml's own code rounds them: plainly, and with an importance matrix.

    Args:
      model: what to quantize.
      out: folder for ggml.Q4_K_M.gguf, ggml-imatrix.Q4_K_M.gguf and, unless one is given, imatrix.gguf.
      imatrix: importance matrix in llama.cpp's GGUF format; measured unless given.
      statistics: folder that `calibrate` wrote, to take the importance matrix from.
      text, tokens, seed: what to measure on, as of `calibrate`.

    Returns:
      `files`: name -> file, what `inspect` says of it without its metadata, and provenance; `imatrix`, its path.

    Raises:
      InputError: libgguf is missing, one of them cannot be read, or the matrix is of another model.
    """
    start = time.monotonic()
    out, checkpoint = Path(out), open_model(model)
    _quantizer()
    seen = UNKNOWN
    if imatrix is None:
        imatrix = out / "imatrix.gguf"
        if statistics is None:
            statistics = out / "statistics"
            making.calibrate(model, statistics, text=text, tokens=tokens, seed=seed)
        measured, about = calibration.load(statistics)
        calibration.check_model(measured, checkpoint.config)
        calibration.write_imatrix(imatrix, measured, checkpoint.config, str(about["text"]))
        seen = calibration.seen_by(statistics, about)
    importance = calibration.read_imatrix(imatrix)
    _check(importance, checkpoint, imatrix)
    files = {}
    for name, matrix in (("ggml.Q4_K_M", {}), ("ggml-imatrix.Q4_K_M", importance)):
        path = out / f"{name}.gguf"
        made = {"model": checkpoint.name, "recipe": f"ggml's own code through libgguf {version('libgguf')}"}
        made["seen"] = fingerprints.write_beside(path, seen if matrix else Seen())
        if matrix:
            made |= {"imatrix": Path(imatrix).name, "imatrix_sha256": sha256(imatrix)}
        gguf_file.write_gguf(path, checkpoint, rounded(checkpoint, matrix), file_type="q4_k", provenance=made)
        files[name] = {"file": str(path)} | file_facts(path) | {"provenance": made}
    return {"files": files, "imatrix": str(imatrix)} | usage() | {"seconds": time.monotonic() - start}


def rounded(checkpoint: Checkpoint, importance: Mapping[str, np.ndarray]) -> OnDemand:
    """Packed rows of each quantized matrix as ggml rounds them, at each access; a matrix without importance plainly."""
    shapes = checkpoint.config.tensor_shapes()
    types = {name: gguf_file.tensor_type(name, shape, "q4_k") for name, shape in shapes.items()}
    types = {name: kind for name, kind in types.items() if kind.name in ("Q4_K", "Q5_0")}

    def pack(name: str) -> np.ndarray:
        weight_OI = np.ascontiguousarray(checkpoint.tensors[name], np.float32)
        return _quantizer().quantize_rows(weight_OI, types[name], importance.get(name)).view(np.uint8)

    return OnDemand(types, pack)


def _check(importance: Mapping[str, np.ndarray], checkpoint: Checkpoint, path: str | Path) -> None:
    shapes = checkpoint.config.tensor_shapes()
    wrong = [name for name, mean_I in importance.items() if name not in shapes or shapes[name][1] != len(mean_I)]
    if wrong:
        raise InputError(f"{path} is the importance matrix of another model: {wrong[0]} does not fit")


def _quantizer() -> Any:
    try:
        import libgguf
    except ImportError as error:
        raise InputError("ggml's own code is not installed; pip install 'sqjax[baseline]'") from error
    return libgguf
