"""Snapshots of what a run has on its devices, by Orbax: in bounded host memory, at a bounded share of the time.

Arrays go to the disk as they lie on the devices, each host writing its own part, and come back to where their targets
are. What is small is written beside what the devices do next. What is not would stay on the host in full meanwhile:
it goes there in pieces instead, and the devices wait.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sqjax import mesh as meshes

# Bytes that a piece of a snapshot has at most, unless one array has more, and up to which a snapshot counts as small.
_PIECE, _SMALL = 10**9, 4 * 10**9
# Seconds between two snapshots are at least so many times what the last one cost.
_SPARING = 9.0


def _size(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _restored(leaves: Sequence[jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves))


class _Pieces(ocp.CheckpointHandler):
    """Writes and reads arrays a piece at a time, so that a host holds no more than one of all of them."""

    def __init__(self):
        # Pinned memory is never given back.
        options = {"use_compression": False, "enable_pinned_host_transfer": False}
        self._inner = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))

    def save(self, directory: Any, args: "_Leaves") -> None:
        for number, piece in enumerate(_split(args.leaves)):
            # An array that was fetched keeps its copy on the host for as long as it lives; these do not live on.
            copies = [jnp.copy(leaf) for leaf in piece]
            self._inner.save(directory / f"{number}", args=ocp.args.PyTreeSave(copies))
            del copies

    def restore(self, directory: Any, args: "_Leaves") -> list[jax.Array]:
        pieces = enumerate(_split(args.leaves))
        return [leaf for n, piece in pieces for leaf in self._inner.restore(directory / f"{n}", args=_restored(piece))]

    def close(self) -> None:
        self._inner.close()


@ocp.args.register_with_handler(_Pieces, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Leaves(ocp.args.CheckpointArgs):
    """What is saved in pieces, or shapes and places of what comes back."""

    leaves: Sequence[Any]


def _split(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """Neighbours that are no larger than a piece together."""
    piece: list[Any] = []
    for leaf in leaves:
        if piece and sum(map(_size, piece)) + _size(leaf) > _PIECE:
            yield piece
            piece = []
        piece.append(leaf)
    yield piece


class Snapshots:
    """The snapshots in a folder, the last few of which are kept; each has named trees of arrays and a few facts."""

    def __init__(self, manager: ocp.CheckpointManager, small: bool, seconds: float):
        self._manager, self._small = manager, small
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
        saved = ocp.args.PyTreeSave if self._small else _Leaves
        items = {name: saved(jax.tree.leaves(tree)) for name, tree in trees.items()}
        self._manager.save(step, args=ocp.args.Composite(facts=ocp.args.JsonSave(dict(facts)), **items))
        self._last = time.monotonic()
        self._pause = max(self._least, _SPARING * (self._last - began))

    def restore(self, targets: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the trees of the last snapshot, in the place of arrays like them, and its facts."""
        shape = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)  # noqa: E731
        restored = _restored if self._small else _Leaves
        items = {name: restored(list(map(shape, jax.tree.leaves(tree)))) for name, tree in targets.items()}
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
    small = sum(map(_size, jax.tree.leaves(like))) <= _SMALL
    handler = (lambda: ocp.PyTreeCheckpointHandler(use_compression=False)) if small else _Pieces
    handlers = {name: handler() for name in like} | {"facts": ocp.JsonCheckpointHandler()}
    policy = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    with ocp.CheckpointManager(folder.absolute(), options=policy, item_handlers=handlers) as manager:
        yield Snapshots(manager, small, seconds)
        manager.wait_until_finished()
