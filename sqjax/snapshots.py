"""Snapshots of what a run has on its devices, by Orbax: in bounded host memory, at a bounded share of the time.

Arrays go to the disk as they lie on the devices, each host writing its own part, and come back to where their targets
are. What is small is written beside what the devices do next. What is not would stay on the host in full meanwhile:
it goes there in pieces instead, and the devices wait.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import orbax.checkpoint as ocp

from sqjax import mesh as meshes

# What a host may hold of a snapshot at once, in GB of ten to the ninth, and what counts as small.
_PIECE, _SMALL = 1, 4
# Seconds between two snapshots are at least so many times what the last one cost.
_SPARING = 9.0


class Snapshots:
    """The snapshots in a folder, the last few of which are kept; each has named trees of arrays and a few facts."""

    def __init__(self, manager: ocp.CheckpointManager, waits: bool, seconds: float):
        self._manager, self._waits = manager, waits
        self._least = self._pause = seconds
        self._last = time.monotonic()

    @property
    def latest(self) -> int | None:
        """Step of the last one; None where there is none."""
        return self._manager.latest_step()

    def due(self) -> bool:
        """Whether enough time has passed since the last one; hosts agree."""
        return meshes.as_first(time.monotonic() - self._last >= self._pause)

    def save(self, step: int, trees: Mapping[str, Any], facts: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Takes a snapshot, unless there is one of this step; the arrays may be donated afterwards."""
        if self.latest == step:
            return
        began = time.monotonic()
        items = {name: ocp.args.PyTreeSave(jax.tree.leaves(tree)) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(facts=ocp.args.JsonSave(dict(facts)), **items))
        if self._waits:
            self._manager.wait_until_finished()
        self._last = time.monotonic()
        self._pause = max(self._least, _SPARING * (self._last - began))

    def restore(self, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the trees of the last snapshot, in the place of arrays like them, and its facts."""
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
        items = {}
        for name, tree in targets.items():
            leaves = [shape(leaf) for leaf in jax.tree.leaves(tree)]
            places = ocp.checkpoint_utils.construct_restore_args(leaves)
            items[name] = ocp.args.PyTreeRestore(leaves, restore_args=places)
        arguments = ocp.args.Composite(facts=ocp.args.JsonRestore(), **items)
        found = self._manager.restore(self.latest, args=arguments)
        return {name: jax.tree.structure(tree).unflatten(found[name]) for name, tree in targets.items()}, found["facts"]


@contextlib.contextmanager
def snapshots(folder: Path, like: Mapping[str, Any], *, keep: int = 1, seconds: float = 0.0) -> Iterator[Snapshots]:
    """Yields the snapshots of a folder; all are on the disk when the block has ended.

    Args:
      folder: where they are, or will be.
      like: named trees of arrays as they will be saved.
      keep: how many.
      seconds: between two, at least.
    """
    sizes = [leaf.size * leaf.dtype.itemsize / 1e9 for leaf in jax.tree.leaves(like)]
    options: dict[str, Any] = {"use_compression": False}
    if waits := sum(sizes) > _SMALL:
        # What is read may not be less than the largest array.
        options |= {"save_device_host_concurrent_gb": _PIECE, "restore_concurrent_gb": _PIECE + math.ceil(max(sizes))}
    # By way of pinned memory, since an array that is fetched itself keeps its copy.
    options |= {"enable_pinned_host_transfer": jax.default_backend() != "cpu"}
    handlers = {name: ocp.PyTreeCheckpointHandler(**options) for name in like} | {"facts": ocp.JsonCheckpointHandler()}
    policy = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    with ocp.CheckpointManager(folder.absolute(), options=policy, item_handlers=handlers) as manager:
        yield Snapshots(manager, waits, seconds)
        manager.wait_until_finished()
