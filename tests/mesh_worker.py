"""Runs every stage on all devices of all processes and writes what came out; see test_mesh.py.

python mesh_worker.py CHECKPOINT FILE.gguf OUT.npz SHARD
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sqjax import (
    calibration,
    distillation,
    evaluation,
    gguf_file,
    mesh,
    q4_k,
    quantizer,
    refinement,
    snapshots,
    sources,
    statistics,
    updates,
)
from sqjax.config import is_matrix
from sqjax.student import initial

RECIPE = quantizer.Recipe(steps=("feedback", "descend_codes"), gamma_in=0.75, gamma_out=0.5, sweeps=1)
SETTINGS = {"length": 32, "batch": 8, "watch_windows": 2, "updates": 4, "warmup": 0, "dtype": "f32", "chunk": 64}


def windows() -> np.ndarray:
    """Text of 20 windows, one of them padded."""
    rows = np.random.default_rng(0).integers(0, 400, (20, 32)).astype(np.int32)
    rows[3, 20:] = calibration.PADDING
    return rows


def comes_back(state, folder: Path) -> None:
    """A snapshot gives the same bits in the same places, written at once or in pieces."""
    for small in (snapshots._SMALL, 0):
        snapshots._SMALL, snapshots._PIECE = small, 10**6
        with snapshots.snapshots(folder / f"{small}", {"state": state}) as saved:
            saved.save(1, {"state": state})
            found, _ = saved.restore({"state": state})
        for one, other in zip(jax.tree.leaves(found["state"]), jax.tree.leaves(state), strict=True):
            assert one.sharding == other.sharding and bool(mesh.to_host(jnp.array_equal(one, other)))


def measure(checkpoint_folder: Path, file: Path, shard: int, folder: Path) -> dict[str, np.ndarray]:
    """What statistics, one update, a watch and rounding give, as arrays on the host."""
    checkpoint = sources.open_model(checkpoint_folder)
    model = sources.load_model(checkpoint)
    sums = mesh.to_host(calibration.collect(model, windows(), batch=8, shard=shard))
    result = {f"sums/{path}": leaf for path, leaf in _leaves(sums)}

    settings = refinement.Refinement(**SETTINGS, shard=shard)
    run = distillation.prepare(checkpoint, gguf_file.read_gguf(file), windows(), None, settings=settings)
    state = run.state_of(jax.jit(initial)(run.start))
    state, loss = run.update(state, *run.batch(0), *map(jnp.float32, (1.0, 0.3, 0.8, 0.2)))
    result |= {f"state/{path}": leaf for path, leaf in _leaves(mesh.to_host(state))}
    result |= {"loss": mesh.to_host(loss), "watched": np.float64(run.watch(state.student))}
    comes_back(state, folder)

    run.update(state, *run.batch(1), *map(jnp.float32, (1.0, 0.0, 0.8, 0.2)))
    assert updates.make_update(run.config, run.settings, run.mesh)._cache_size() == 1

    student = sources.load_model(gguf_file.read_gguf(file))
    scores = evaluation.score(model, student, np.maximum(windows(), 0), mesh=mesh.create(shard))
    result |= {"kl": scores.kl, "loss_of_file": scores.loss}

    measured = grams(checkpoint.config)
    tensors = quantizer.quantize(checkpoint.config, checkpoint.tensors, measured, RECIPE)
    for name, gram in ((name, measured.input_gram(name)) for name in measured.outputs):
        error = mesh.to_host(q4_k.dequantize(tensors[name])).astype(np.float64) - np.asarray(checkpoint.tensors[name])
        result[f"objective/{name}"] = np.sum(error @ gram * error)
    return result


def grams(config) -> statistics.Statistics:
    """The same correlated Grams wherever it runs: rounding amplifies the last bits of measured ones."""
    generator = np.random.default_rng(1)

    def gram(size):
        rows = generator.standard_normal((2 * size, size)) * np.arange(1, size + 1) ** -0.5
        return (rows.T @ rows / len(rows)).astype(np.float32)

    shapes = {n: s for n, s in config.tensor_shapes().items() if n.startswith("blk.") and is_matrix(n, s)}
    inputs = {statistics.input_name(name): gram(shape[1]) for name, shape in shapes.items()}
    outputs = {name: gram(shape[0]) for name, shape in shapes.items()}
    square, often = gram(config.hidden_size), np.full(config.vocab_size, 1 / config.vocab_size, np.float32)
    return statistics.Statistics(inputs, outputs, square, often, square, often, 1000, windows())


def _leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


if __name__ == "__main__":
    mesh.connect()
    mesh.create(int(sys.argv[4]))
    arrays = measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]), Path(sys.argv[3]).parent)
    if mesh.is_first():
        np.savez(sys.argv[3], **arrays)
