"""Devices of one or several hosts as a mesh: batches are shared along both axes, parameters along `model`.

A stage is one program, run by every device on its own rows of a batch. Matrices, their Grams and what the optimizer
keeps of them have their rows spread over the axis `model`; a matrix is gathered when its block runs, and again in the
backward pass, so that one block's weights are whole at a time. Along `data` everything is copied. One device is the
mesh (1, 1), and no program has a collective then.

References:
  Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2020.
  https://arxiv.org/abs/1910.02054
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sqjax.run import InputError

DATA, MODEL = "data", "model"
BATCH = (DATA, MODEL)
# What the leading axis of a batch is spread over, and what is the same on every device.
BY_BATCH, COPIED = PartitionSpec(BATCH), PartitionSpec()
# The stacks of blocks have the repeats before their rows; the convolution's weights meet channels and stay whole.
_TABLES = ("token_embd", "output")


def connect() -> None:
    """Joins the processes of several hosts, where the environment says that there are several.

    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so on any machines; with
    JAX_COORDINATOR_ADDRESS alone JAX finds the others from Slurm, MPI or a TPU slice. Call it before any array is made.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None or jax.distributed.is_initialized():
        return
    count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    jax.distributed.initialize(address, count and int(count), index and int(index))


def is_first() -> bool:
    """Whether this is the host that writes files."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Waits until every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def as_first(answer: bool) -> bool:
    """Returns what the first host says, so that all hosts take the same way."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def device_memory() -> int | None:
    """Bytes that may be used on each of this host's devices; None where they do not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def create(model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all devices, `model` of them sharing one copy of the parameters.

    Raises:
      InputError: their number is no multiple of `model`.
    """
    count = len(jax.devices() if devices is None else devices)
    if model < 1 or count % model:
        raise InputError(f"{count} devices cannot be grouped by {model}; spread parameters over a divisor of {count}")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((count // model, model), (DATA, MODEL), axis_types=kinds, devices=devices)
    if devices is None and jax.process_count() > 1:
        _open_links(mesh)
    return mesh


@functools.cache
def _open_links(mesh: Mesh) -> None:
    """Lets devices of all hosts meet once, while the hosts are at the same place in the program.

    Links that are opened by the first program that needs them wait half a minute for the other hosts on CPUs; one host
    may compile that program for longer than another.
    """
    meet = lambda x: sum(jax.lax.psum(x, axis) for axis in (DATA, MODEL, BATCH))  # noqa: E731
    ones = place(np.ones(mesh.size, np.float32), mesh, BY_BATCH)
    jax.block_until_ready(jax.jit(over(mesh, meet, (BY_BATCH,), lambda specs: specs[0]))(ones))


def rows(tree: Any, mesh: Mesh) -> Any:
    """Returns the spec of every leaf: rows of matrices spread over `model` where their number allows, else copied.

    Serves the model, what is latent in it, where that started and its optimizer's moments alike: all their leaves that
    belong to one matrix have its rows on one axis.
    """

    def spec(path, leaf):
        place = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        axis = int("blocks" in place)
        spread = axis or any(name in place for name in _TABLES)
        if not spread or "ssm_conv1d" in place or leaf.ndim < axis + 2 or leaf.shape[axis] % mesh.shape[MODEL]:
            return COPIED
        if mesh.shape[MODEL] == 1:
            # The same place by another name would be another program.
            return COPIED
        return PartitionSpec(*(None,) * axis, MODEL)

    return jax.tree_util.tree_map_with_path(spec, tree)


def whole(weight_OI: Float[Array, "O I"], count: int) -> Float[Array, "O I"]:
    """Gathers a matrix of `count` rows from the devices that it is spread over; the gradient goes back to them."""
    if weight_OI.shape[0] == count:
        return weight_OI
    return jax.lax.all_gather(weight_OI, MODEL, axis=0, tiled=True)


def share(total_OI: Float[Array, "O I"], count: int) -> Float[Array, "O I"]:
    """Adds what the devices along `model` have of a sum, each keeping its own `count` rows of it."""
    if total_OI.shape[0] == count:
        return total_OI
    return jax.lax.psum_scatter(total_OI, MODEL, scatter_dimension=0, tiled=True)


def total(tree: Any, specs: Any) -> Any:
    """Adds the gradients of all devices, where those of spread rows are added along `model` already."""
    return jax.tree.map(lambda leaf, spec: jax.lax.psum(leaf, DATA if MODEL in spec else BATCH), tree, specs)


Specs = PartitionSpec | Callable[[Any, Mesh], Any]


def over(mesh: Mesh | None, function: Callable, inputs: Sequence[Specs], outputs: Callable[[Sequence[Any]], Any]):
    """Returns `function` as it runs on every device of a mesh, on that device's part of the arguments.

    Args:
      mesh: None, or a mesh of one device, gives `function` itself.
      inputs: for each argument its spec, or what makes its specs, as `rows`.
      outputs: the specs of the result, given those of the arguments.
    """
    if mesh is None or mesh.size == 1:
        return function

    def spread(*arguments):
        specs = tuple(spec if isinstance(spec, PartitionSpec) else spec(a, mesh) for spec, a in zip(inputs, arguments))
        # The functions sum over devices themselves, which the checker of replication cannot follow into custom rules.
        options = {"mesh": mesh, "in_specs": specs, "out_specs": outputs(specs), "check_vma": False}
        return jax.shard_map(function, **options)(*arguments)

    return spread


def one_order() -> dict[str, bool] | None:
    """Returns compiler options under which a program's sums have one order, so that two runs agree to the last bit.

    XLA tunes no Triton product where it has to be deterministic, and untuned they take five times as long as all the
    rest; cuBLAS's need no tuning.
    """
    options = {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    return options if jax.default_backend() == "gpu" else None


def place(tree: Any, mesh: Mesh, specs: Any = COPIED) -> Any:
    """Puts arrays, known in full to every host, on the devices; each host moves only its own devices' parts."""
    if isinstance(specs, PartitionSpec):
        specs = jax.tree.map(lambda _: specs, tree)
    shardings = jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), tree, specs)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(leaf, sharding):
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def to_host(tree: Any) -> Any:
    """Copies arrays to every host in full; the copies share no memory with buffers that are to be reused."""

    def fetch(leaf):
        if not isinstance(leaf, jax.Array):
            return np.array(leaf)
        if leaf.is_fully_addressable:
            # An array keeps what was fetched of it; its copy goes.
            return np.array(jax.numpy.copy(leaf))
        if leaf.is_fully_replicated:
            return np.array(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)
