"""Stages on an object store: an in-memory one stands for gs:// and s3://."""

import json

import fsspec
import pytest

import sqjax
from sqjax import buckets, cli, sources
from sqjax.run import InputError


@pytest.fixture
def store():
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    yield memory
    memory.store.clear()


def test_a_folder_is_fetched_and_what_changed_is_put_back(store):
    for name, text in {"run/a": "a", "run/sub/b": "b", "run/old": "old", "other/c": "c", "run.json": "j"}.items():
        store.pipe_file(f"/bucket/{name}", text.encode())
    with buckets.local("memory://bucket/run/") as folder:
        assert (folder / "sub/b").read_text() == "b" and (folder.parent / "run.json").exists()
        assert not (folder.parent / "other").exists()
        (folder / "old").unlink()
        (folder / "sub/new").write_text("new")
        (folder / "a").write_text("longer")
        (folder / "x.lock").write_text("")
        store.pipe_file("/bucket/run/sub/b", b"changed meanwhile")
    found = {path: store.cat_file(path).decode() for path in store.find("/bucket/run")}
    expected = {"a": "longer", "sub/new": "new", "sub/b": "changed meanwhile"}
    assert found == {f"/bucket/run/{name}": text for name, text in expected.items()}


def test_what_a_stage_had_written_is_put_back_when_it_fails(store):
    def stage(out):
        out.mkdir()
        (out / "partial").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        buckets.mirrored(stage, "out")("memory://bucket/run")
    assert store.cat_file("/bucket/run/partial") == b"half"


def test_commands_read_and_write_a_store(store, capsys):
    out = "memory://bucket/files/demo8.gguf"
    assert cli.main(["convert", str(sources.DEMO_MODEL), out, "--type", "q4_k", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["file"] == out and store.size("/bucket/files/demo8.gguf") == made["file_bytes"]
    assert sqjax.inspect(out)["sha256"] == made["sha256"]
    store.put(str(sources.DEMO_MODEL), "/bucket/models/demo8", recursive=True)
    again = sqjax.convert("memory://bucket/models/demo8", "memory://bucket/again.gguf", type="q4_k")
    assert again["sha256"] == made["sha256"]


def test_a_store_that_cannot_be_reached_is_named():
    with pytest.raises(InputError, match="cannot read or write nothing://bucket/file"):
        sqjax.inspect("nothing://bucket/file")
