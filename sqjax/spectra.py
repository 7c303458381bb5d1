"""Eigenvalues of every Gram in a folder of statistics, computed once and kept there for all reports.

They are found in a process of their own, by as many threads as there are cores, each with a BLAS of one thread: what
is small or runs beside other work loses by a BLAS of many, whose threads wait for one another (47 Grams of up to 1,024
rows on two busy cores: 6.4 seconds of processor time with two threads, 0.65 with one). A process can set their number
only before NumPy is loaded.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from sqjax.run import InputError, atomic_path

FILE = "spectra.safetensors"
_ONE_THREAD = dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)


def eigenvalues(gram_II: Float32[np.ndarray, "I I"]) -> Float32[np.ndarray, "I"]:
    """Returns the eigenvalues of a Gram, largest first; float32 as its sums are, so that the least may be noise."""
    return np.maximum(np.linalg.eigvalsh(gram_II)[::-1], 0.0)


def work(sizes: Mapping[str, int]) -> int:
    """Returns the multiplications that the eigenvalues of Grams of so many rows take."""
    return sum(4 * rows**3 // 3 for rows in sizes.values())


def files(folder: str | Path) -> list[Path]:
    """Returns the files that hold a folder's statistics."""
    return sorted(Path(folder).glob("statistics*.safetensors"))


def places(folder: str | Path) -> dict[str, Path]:
    """Returns for the name of each tensor of a folder's statistics the file that holds it.

    Raises:
      OSError, SafetensorError: a file cannot be read.
    """
    found = {}
    for path in files(folder):
        with safe_open(path, framework="numpy") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def read(path: Path, name: str) -> np.ndarray:
    """Returns a tensor of a file, which is closed again: what was read of an open one stays in the host's memory."""
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name)


def rows(path: Path, name: str) -> int:
    """Returns how many rows a tensor of a file has."""
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(name).get_shape()[0]


def save(folder: str | Path) -> None:
    """Computes the eigenvalues of a folder's Grams and keeps them there.

    Raises:
      InputError: the folder holds no statistics, or cannot be written.
    """
    command = [sys.executable, "-m", "sqjax.spectra", str(folder)]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, env=os.environ | _ONE_THREAD | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise InputError(next(iter(done.stderr.strip().splitlines()[-1:]), f"no spectra of {folder}"))


def read_spectra(folder: str | Path) -> dict[str, Float32[np.ndarray, "I"]]:
    """Returns the eigenvalues of each Gram, largest first, by `input/NAME` or `output/NAME`; computed unless kept.

    Raises:
      InputError: the folder holds no statistics, or what is missing cannot be kept there.
    """
    path = Path(folder) / FILE
    if not path.exists():
        save(folder)
    return load_file(path)


def _save_here(folder: Path) -> None:
    try:
        grams = {name: path for name, path in places(folder).items() if name.startswith(("input/", "output/"))}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} holds no statistics ({error}); give the folder of sqjax calibrate") from error
    if not grams:
        raise InputError(f"{folder} holds no statistics; give the folder of sqjax calibrate")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = pool.map(lambda name: eigenvalues(read(grams[name], name)), grams)
        found = dict(zip(grams, values))
    with atomic_path(folder / FILE) as path:
        save_file({name: np.ascontiguousarray(values) for name, values in found.items()}, path)


if __name__ == "__main__":
    try:
        _save_here(Path(sys.argv[1]))
    except InputError as problem:
        sys.exit(str(problem))
