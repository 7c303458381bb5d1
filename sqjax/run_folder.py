"""The text files of a run folder: what a run is made of, its metrics, and what came of it."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqjax.run import InputError, atomic_path


def claim(folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Writes what a run is made of, or checks that the run to be resumed is made of the same.

    A finished run, known by its `result.json`, gives way to a new one.

    Raises:
      InputError: the folder holds an unfinished run and `resume` is not set, or a run of something else and it is.
    """
    record = folder / "run.json"
    text = json.dumps(identity, indent=1, sort_keys=True)
    if not resume and (folder / "result.json").exists():
        for name in ("result.json", "run.json", "metrics.jsonl"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if record.exists():
        if not resume:
            raise InputError(f"{folder} holds an unfinished run; --resume goes on with it, another --run begins anew")
        if record.read_text(encoding="utf-8") != text:
            raise InputError(f"{folder} holds a run with another model, text or setting; choose another --run")
        return
    with atomic_path(record) as path:
        path.write_text(text, encoding="utf-8")


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """Writes what came of a run, which may from now on be replaced by a new one."""
    with atomic_path(folder / "result.json") as path:
        path.write_text(json.dumps(dict(result), indent=1), encoding="utf-8")


@contextlib.contextmanager
def metrics(folder: Path, step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that appends a line; lines of updates that are about to be done again are dropped."""
    path = folder / "metrics.jsonl"
    if path.exists():
        # The last line is cut off where the process was killed while it wrote.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if json.loads(line)["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:

        def write(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()

        yield write
