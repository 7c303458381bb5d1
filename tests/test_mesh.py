"""The stages give the same on one device, on eight, and on two processes of two; and their programs are made once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoint

from sqjax import calibration, evaluation, gguf_file, mesh, model, pipeline, sources, statistics
from sqjax.run import InputError

WORKER = Path(__file__).with_name("mesh_worker.py")
SHAPE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 512}
SHAPE |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint whose matrices fill super-blocks, and its Q4_K file."""
    folder = tmp_path_factory.mktemp("mesh")
    random_checkpoint.write(folder / "model", **SHAPE)
    pipeline.convert(folder / "model", folder / "model.gguf")
    return folder / "model", folder / "model.gguf"


@pytest.fixture(scope="module")
def single(files, tmp_path_factory):
    """What one device gives."""
    return run(files, tmp_path_factory.mktemp("single"), devices=1)


def run(files, folder, *, devices: int, processes: int = 1, shard: int = 1) -> dict[str, np.ndarray]:
    """Runs the worker in processes of their own, on CPU devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    running = []
    for index in range(processes):
        environment = dict(os.environ) | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{WORKER.parents[1]}:{WORKER.parent}"}
        if processes > 1:
            environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            environment |= {"JAX_PROCESS_ID": str(index)}
        command = [sys.executable, WORKER, *files, folder / "out.npz", str(shard)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0] * processes, errors[0][-3000:] + errors[-1][-3000:]
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        new, scale = found[name], np.abs(value.astype(np.float64)).max() + 1e-30
        if name.startswith("objective/"):
            # Sums in another order turn a code here and there.
            assert abs(new / value - 1) < 0.02, name
        elif "student" in name:
            # Adam's first step has the size of its rate wherever the sign of the gradient is certain.
            assert np.mean(np.abs(new - value) > 1e-5) < 0.01, name
        else:
            assert np.abs(new - value).max() <= 2e-4 * scale, (name, np.abs(new - value).max() / scale)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [4])
def test_eight_devices_give_what_one_gives(files, single, tmp_path, shard):
    assert_same(run(files, tmp_path, devices=8, shard=shard), single)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2])
def test_two_processes_give_what_one_gives(files, single, tmp_path, shard):
    assert_same(run(files, tmp_path, devices=2, processes=2, shard=shard), single)


def test_rows_of_matrices_are_spread_and_all_else_is_copied(files):
    config = gguf_file.read_gguf(files[1]).config
    abstract = model.abstract(config)
    specs = mesh.rows(abstract, jax.sharding.AbstractMesh((2, 4), (mesh.DATA, mesh.MODEL)))
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs), strict=True):
        place = jax.tree_util.keystr(path)
        shape = leaf.shape["blocks" in place :]
        is_matrix = len(shape) == 2 and "conv1d" not in place and shape[0] % 4 == 0
        expected = jax.P() if not is_matrix else jax.P(None, mesh.MODEL) if "blocks" in place else jax.P(mesh.MODEL)
        assert spec == expected, place


def test_devices_that_cannot_be_grouped_are_refused():
    with pytest.raises(InputError, match="cannot be grouped"):
        mesh.create(3, devices=jax.devices() * 4)


def test_copies_on_the_host_share_no_memory_with_the_device():
    array = jnp.arange(4.0)
    copy = mesh.to_host({"a": array})["a"]
    copy[0] = 7.0
    assert array[0] == 0.0


def test_batches_are_not_compiled_again(tmp_path):
    random_checkpoint.write(tmp_path / "model")
    network = sources.load_model(sources.open_model(tmp_path / "model"))
    rows = np.random.default_rng(0).integers(0, 400, (11, 16)).astype(np.int32)
    before = statistics.accumulator()._cache_size()
    # Three batches, the last of which is not full, and a second run.
    for _ in range(2):
        calibration.collect(network, rows, batch=4)
    assert statistics.accumulator()._cache_size() == before + 1
    before = evaluation._hidden._cache_size(), evaluation._score_batch._cache_size()
    conversations = evaluation.Sequences(tuple(rows[:, :12]), ("a",) * 11, (np.zeros(12, np.int32),) * 11)
    for _ in range(2):
        evaluation.score(network, network, conversations)
    assert (evaluation._hidden._cache_size(), evaluation._score_batch._cache_size()) == (before[0] + 1, before[1] + 1)
