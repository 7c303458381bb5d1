"""Snapshots: what is saved comes back to the bit where it was, whatever becomes of the arrays meanwhile."""

import itertools
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqjax import mesh, snapshots


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"a": [jnp.asarray(rng.standard_normal((300, 40)), jnp.float32)], "b": jnp.arange(7, dtype=jnp.uint8)}


@pytest.mark.parametrize("small", (10**9, 0), ids=("at once", "in pieces"))
def test_arrays_come_back_though_they_were_given_away(tmp_path, monkeypatch, small):
    monkeypatch.setattr(snapshots, "_SMALL", small)
    monkeypatch.setattr(snapshots, "_PIECE", 300 * 40 * 4)
    give_away = jax.jit(lambda tree: jax.tree.map(lambda leaf: 0 * leaf, tree), donate_argnums=0)
    state, other = mesh.place(tree(0), mesh.create()), tree(1)
    with snapshots.snapshots(tmp_path, {"state": state, "other": other}, keep=2) as saved:
        assert saved.latest is None
        for step in (1, 2, 3):
            state = jax.tree.map(lambda leaf: leaf + 1, state)
            saved.save(step, {"state": state, "other": other}, {"step": step})
            assert not any(map(np.any, jax.tree.leaves(give_away(state))))
            state = jax.tree.map(lambda leaf: leaf + step, mesh.place(tree(0), mesh.create()))  # noqa: B023
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with snapshots.snapshots(tmp_path, {"state": state, "other": other}) as saved:
        found, facts = saved.restore({"state": state, "other": other})
    assert saved.latest == 3 and facts == {"step": 3}
    expected = {"state": jax.tree.map(lambda leaf: leaf + 2 + 1, tree(0)), "other": other}
    for one, like in zip(jax.tree.leaves(found), jax.tree.leaves({"state": state, "other": other}), strict=True):
        assert one.sharding == like.sharding
    for one, target in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, target, rtol=1e-6)


def test_what_a_piece_took_is_free_before_the_next_is_fetched(tmp_path, monkeypatch):
    taken, alive = [], []

    def copy(leaf):
        taken.append(weakref.ref(found := jnp.copy(leaf)))
        alive.append(sum(reference() is not None for reference in taken))
        return found

    monkeypatch.setattr(snapshots, "_SMALL", 0)
    monkeypatch.setattr(snapshots, "_PIECE", 2 * 400)
    monkeypatch.setattr(snapshots, "jnp", types.SimpleNamespace(copy=copy))
    state = [jnp.full(100, number, jnp.float32) for number in range(6)]
    with snapshots.snapshots(tmp_path, {"state": state}) as saved:
        saved.save(1, {"state": state})
    assert alive == [1, 2] * 3 and not any(reference() is not None for reference in taken)


def test_snapshots_take_a_tenth_of_the_time_at_most(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(snapshots, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with snapshots.snapshots(tmp_path, {"state": tree(0)}) as saved:
        saved.save(1, {"state": tree(0)})
        # One tick of the clock for the snapshot, one for each question.
        assert [saved.due() for _ in range(10)] == [False] * 8 + [True] * 2
