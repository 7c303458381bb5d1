"""Calibration: text in, a folder of statistics out; interrupted runs go on where they stopped, to the same bits.

Letters: W windows, B windows of a batch, T tokens of a window, I in features, O out features.

A folder holds `statistics*.safetensors` (the Grams, a file a layer), `statistics.json` (what they were measured on),
beside that the hashes of its text, `spectra.safetensors` (the Grams' eigenvalues, where they cost little or a report
has asked) and, until it is complete, `partial/` (the sums so far, by Orbax).
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sqjax import mesh as meshes
from sqjax import spectra
from sqjax.config import ModelConfig, is_matrix
from sqjax.fingerprints import UNKNOWN, Prints, Seen, pieces_of, prints_of, read_beside, union, write_beside
from sqjax.model import Qwen35
from sqjax.run import InputError, OnDemand, atomic_path
from sqjax.snapshots import snapshots
from sqjax.statistics import PROJECTIONS, Statistics, Sums, accumulator, empty, folded, input_name, means, parts, spread
from sqjax.texts import Texts
from sqjax.tokens import Tokenizer, encode_conversation, pack_windows

PADDING = -1
# Eigenvalues that take more, minutes on a few cores, are left to the first report that shows them.
_SPECTRA_WORK = 10**12
_SINGLE = ("head_gram_DD", "head_weight_V", "lookup_gram_DD", "lookup_frequency_V")


def calibration_windows(
    texts: Texts, tokenizer: Tokenizer, length: int, tokens: int
) -> tuple[Int32[np.ndarray, "W T"], Prints]:
    """Returns about `tokens` tokens of text, packed windows and conversations padded with -1, and the hashes of it.

    Texts and conversations share the budget in proportion to the number of their sources. A conversation longer than a
    window is cut. The hashes are of what is in the windows, not of what else the sources hold.

    Raises:
      InputError: the text does not fill one window.
    """
    plain, spoken = texts.by_kind()
    share = len(plain.files) / max(len(texts.files), 1)
    rows, prints = [], []
    if plain.files:
        windows = max(1, round(share * tokens / length))
        rows.append(pack_windows(plain, tokenizer, length, windows).tokens_WT)
        prints.append(prints_of(pieces_of(rows[0].reshape(-1), None, tokenizer)))
    budget = (1.0 - share) * tokens
    for document in spoken:
        if budget <= 0:
            break
        conversation = encode_conversation(document, tokenizer)
        piece = conversation.tokens_T[:length]
        budget -= len(piece)
        rows.append(np.pad(piece, (0, length - len(piece)), constant_values=PADDING)[None])
        prints.append(prints_of(pieces_of(piece, conversation.roles_T[:length], tokenizer)))
    if not rows:
        raise InputError("the calibration text is empty; give --text with something to read")
    return np.concatenate(rows).astype(np.int32), union(*prints)


def collect(
    model: Qwen35,
    windows_WT: Int32[np.ndarray, "W T"],
    *,
    folder: Path | None = None,
    batch: int = 8,
    seed: int = 0,
    save_every: int = 32,
    save_seconds: float = 60.0,
    shard: int = 1,
    chunk: int = 1024,
    names: Sequence[str] = PROJECTIONS,
    full: Collection[tuple[str, str]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sums:
    """Sums Grams of the named projections over windows, each batch shared by all devices of all hosts.

    Of those not in `full`, where it is given, only the diagonals (see `statistics.empty`).

    With a `folder`, sums are kept there after every `save_every` batches, but not within `save_seconds` of the last
    time, nor so often that writing takes more than a tenth of the time. A run that was interrupted is resumed: labels
    depend on the seed and the number of the batch alone, so that the bits are those of an uninterrupted run. `shard`
    devices share one copy of the weights and Grams.
    """
    mesh = meshes.create(shard)
    batch = -(-batch // mesh.size) * mesh.size
    model = meshes.place(model, mesh, meshes.rows(model, mesh))
    sums = spread(empty(model, names, full), mesh)
    total = -(-len(windows_WT) // batch)
    key = jax.random.key(seed)
    like = {"sums": jax.eval_shape(lambda: folded(sums, mesh))}
    with (
        contextlib.nullcontext()
        if folder is None
        else snapshots(folder / "partial", like, seconds=save_seconds) as saved
    ):
        first = 0
        if saved is not None and (first := saved.latest or 0):
            found, _ = saved.restore({"sums": folded(sums, mesh)})
            sums = spread(found["sums"], mesh)
        for index in range(first, total):
            tokens_BT, mask_BT = meshes.place(_batch(windows_WT, index, batch), mesh, meshes.BY_BATCH)
            sums = accumulator()(
                model, sums, tokens_BT, mask_BT, jax.random.fold_in(key, index), chunk=chunk, mesh=mesh
            )
            if saved is not None and (index + 1) % save_every == 0:
                # All Grams are ten times the size of the model's file: written too often they take most of the time.
                due = saved.due()
                # What goes on is what is or could be saved, so that a resumed run has the same bits on any devices; on
                # one device it is what there is.
                if due or mesh.size > 1:
                    whole = folded(sums, mesh)
                    if due:
                        saved.save(index + 1, {"sums": whole})
                    sums = spread(whole, mesh)
            progress(index + 1, total)
    return folded(sums, mesh)


def _batch(windows_WT: np.ndarray, index: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of a batch; the last one is filled up with padding, so that one program serves all."""
    rows = windows_WT[index * batch : (index + 1) * batch]
    rows = np.pad(rows, ((0, batch - len(rows)), (0, 0)), constant_values=PADDING)
    return np.maximum(rows, 0), (rows != PADDING).astype(np.float32)


def calibrate(
    config: ModelConfig,
    model: Qwen35,
    windows_WT: Int32[np.ndarray, "W T"],
    folder: Path,
    *,
    about: Mapping[str, Any],
    prints: Prints | None = None,
    batch: int = 8,
    seed: int = 0,
    save_every: int = 32,
    save_seconds: float = 60.0,
    shard: int = 1,
    passes: int = 1,
    chunk: int = 1024,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Measures statistics into a folder, or goes on with an interrupted run of the same settings.

    Every pass over the text measures some of the projections, with the same labels: more passes need less memory.
    `prints` are the hashes of the windows, which what is made of the statistics will be known to have seen.

    Raises:
      InputError: the folder holds a run of another model, text or seed.
    """
    # What it is rounded to is part of what a run is: batches of another size would draw other labels.
    batch = -(-batch // len(jax.devices())) * len(jax.devices())
    identity = dict(about) | {"seed": seed, "batch": batch, "windows_sha256": digest(windows_WT)}
    if meshes.is_first():
        _claim(folder, identity)
    meshes.wait_for_all("claimed")
    options = {
        "batch": batch,
        "seed": seed,
        "save_every": save_every,
        "save_seconds": save_seconds,
        "shard": shard,
        "chunk": chunk,
        "progress": progress,
    }
    # What follows works on one matrix at a time, wherever there is room for it.
    keep = (lambda sums: sums) if len(jax.devices()) * passes == 1 else meshes.to_host
    sums = None
    for number, names in enumerate(parts(config, passes)):
        place = folder if passes == 1 else folder / "partial" / str(number)
        part = keep(collect(model, windows_WT, folder=place, names=names, **options))
        blocks = part.blocks if sums is None else [a | b for a, b in zip(sums.blocks, part.blocks)]
        sums = dataclasses.replace(part, blocks=blocks)
    statistics = means(config, sums, windows_WT)
    if meshes.is_first():
        save(folder, statistics, identity, UNKNOWN if prints is None else Seen(prints))
        shutil.rmtree(folder / "partial", ignore_errors=True)
        (folder / "run.json").unlink(missing_ok=True)
        if spectra.work({kind: len(gram) for kind, gram in _grams(statistics).items()}) <= _SPECTRA_WORK:
            spectra.save(folder)
    meshes.wait_for_all("calibrated")
    return statistics


def digest(windows_WT: Int32[np.ndarray, "W T"]) -> str:
    """Returns the SHA-256 of windows of tokens."""
    return hashlib.sha256(np.ascontiguousarray(windows_WT, "<i4").tobytes()).hexdigest()


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Writes what a run is made of, or checks that the run to be resumed is made of the same."""
    record = folder / "run.json"
    text = json.dumps(identity, indent=1, sort_keys=True)
    if not record.exists():
        with atomic_path(record) as path:
            path.write_text(text)
        shutil.rmtree(folder / "partial", ignore_errors=True)
    elif record.read_text() != text:
        raise InputError(f"{folder} holds an unfinished run with other settings; choose another folder or remove it")


# ---- files


def save(folder: Path, statistics: Statistics, about: Mapping[str, Any], seen: Seen = UNKNOWN) -> None:
    """Writes statistics into a folder, the record of what they were measured on last.

    A file a layer, so that no more than the Grams of one are in the host's memory.
    """
    # Of other Grams they are wrong.
    for path in (folder / "statistics.json", folder / spectra.FILE, *spectra.files(folder)):
        path.unlink(missing_ok=True)
    layers: dict[str, dict[str, Any]] = {"": {name: getattr(statistics, name) for name in _SINGLE}}
    layers[""]["windows_WT"] = statistics.windows_WT.astype(np.int32)
    for name, gram_II in _grams(statistics).items():
        layers.setdefault(f".{int(name.split('.')[1]):03d}", {})[name] = gram_II
    for suffix, arrays in layers.items():
        with atomic_path(folder / f"statistics{suffix}.safetensors") as path:
            save_file({name: np.ascontiguousarray(meshes.to_host(array)) for name, array in arrays.items()}, path)
    record = dict(about) | {"tokens": statistics.tokens, "seen": write_beside(folder / "statistics", seen)}
    with atomic_path(folder / "statistics.json") as path:
        path.write_text(json.dumps(record, indent=1, sort_keys=True))


def _grams(statistics: Statistics) -> dict[str, Any]:
    arrays = {f"input/{name}": gram for name, gram in statistics.inputs.items()}
    return arrays | {f"output/{name}": gram for name, gram in statistics.outputs.items()}


def seen_by(folder: str | Path, about: Mapping[str, Any]) -> Seen:
    """Returns the hashes of the text of statistics, given their record."""
    return read_beside(Path(folder) / "statistics", about.get("seen"))


def load(folder: str | Path) -> tuple[Statistics, dict[str, Any]]:
    """Reads statistics and the record of what they were measured on.

    Raises:
      InputError: the folder holds no complete statistics.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "statistics.json").read_text())
        places = spectra.places(folder)
        single = {name: jnp.asarray(spectra.read(places[name], name)) for name in _SINGLE}
        windows_WT = spectra.read(places["windows_WT"], "windows_WT")
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder} holds no complete statistics ({error}); make them with sqjax calibrate") from error
    grams = {"inputs": _Grams(places, "input/"), "outputs": _Grams(places, "output/")}
    return Statistics(**grams, tokens=int(about["tokens"]), windows_WT=windows_WT, **single), about


class _Grams(OnDemand):
    """Grams in files, each read when it is asked for: all of them are ten times the size of the model's file."""

    def __init__(self, places: Mapping[str, Path], prefix: str):
        own = {name.removeprefix(prefix): path for name, path in places.items() if name.startswith(prefix)}
        super().__init__(own, lambda name: spectra.read(own[name], prefix + name))
        self._places, self._prefix = own, prefix

    def sizes(self) -> dict[str, int]:
        """Returns the number of rows of every Gram."""
        return {name: spectra.rows(path, self._prefix + name) for name, path in self._places.items()}


def check_model(statistics: Statistics, config: ModelConfig) -> None:
    """Raises InputError unless every matrix of the model has statistics of its shape."""
    outputs, inputs = (
        grams.sizes() if isinstance(grams, _Grams) else {name: len(gram) for name, gram in grams.items()}
        for grams in (statistics.outputs, statistics.inputs)
    )
    for name, shape in config.tensor_shapes().items():
        if not name.startswith("blk.") or not is_matrix(name, shape):
            continue
        found = [outputs.get(name), inputs.get(input_name(name))]
        if tuple(found) != shape:
            raise InputError(f"the statistics of {name} are for shape {found}, not {shape}: they are of another model")


def write_imatrix(path: str | Path, statistics: Statistics, config: ModelConfig, source: str) -> None:
    """Writes the diagonals of the input Grams as an importance matrix in llama.cpp's GGUF format."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch="")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [source])
        writer.add_uint32("imatrix.chunk_count", len(statistics.windows_WT))
        writer.add_uint32("imatrix.chunk_size", statistics.windows_WT.shape[1])
        for name, shape in config.tensor_shapes().items():
            if name.startswith("blk.") and is_matrix(name, shape):
                mean_I = np.diagonal(np.asarray(statistics.input_gram(name))).astype(np.float32)
                writer.add_tensor(f"{name}.in_sum2", (mean_I * np.float32(statistics.tokens))[None])
                writer.add_tensor(f"{name}.counts", np.full((1, 1), statistics.tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: str | Path) -> dict[str, Float32[np.ndarray, "I"]]:
    """Reads an importance matrix in llama.cpp's GGUF format: the mean square of each input of each matrix.

    Raises:
      InputError: the file is none.
    """
    try:
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no importance matrix in GGUF format: {error}") from error
    sums = {name.removesuffix(".in_sum2"): data for name, data in tensors.items() if name.endswith(".in_sum2")}
    if not sums:
        raise InputError(f"{path} holds no importance matrix; give a GGUF file written by llama-imatrix")
    return {
        name: (data.reshape(-1) / np.maximum(tensors[f"{name}.counts"].reshape(-1)[0], 1.0)).astype(np.float32)
        for name, data in sums.items()
    }
