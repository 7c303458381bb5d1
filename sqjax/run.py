"""What every stage shares: errors that a user can mend, files that appear whole or not, values on demand, progress."""

import contextlib
import datetime
import fcntl
import glob
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

MIB = 1 << 20
_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_UNLOCKED = 5.0
_interrupted = threading.Event()


class InputError(Exception):
    """The input is at fault; the message is one line that says what is wrong and what to do."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` that takes its name when the block ends without an error.

    Raises:
      InputError: the folder is missing, cannot be written, or its disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    # Held until the end; a process that is killed lets go, and the next one to write the file clears up after it.
    fcntl.flock(handle, fcntl.LOCK_EX)
    temporary = Path(name)
    try:
        _clear_up(path)
        yield temporary
        heed_interruption()
        # mkstemp makes files that only their owner reads; a result is as public as the user's mask allows.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _clear_up(path: Path) -> None:
    """Removes what killed processes left of a file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            # One that is not locked yet may have been made this moment.
            if time.time() - left.stat().st_mtime > _SECONDS_UNLOCKED:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's content as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class OnDemand(Mapping):
    """Values that are read or computed at each access, under names known without: what would not fit at once."""

    def __init__(self, names: Collection[str], read: Callable[[str], Any]):
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        # That of Mapping would read the value.
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[..., None]]:
    """Yields a function of (done, total, note="") that shows the share done and the time left on standard error.

    A terminal gets a bar; a log file gets a line every quarter of a minute.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=None, note="")

            def show(done: int, total: int, note: str = "") -> None:
                heed_interruption()
                bar.update(task, completed=done, total=total, note=note)

            yield show
        return
    start = last = time.monotonic()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last
        heed_interruption()
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            left = datetime.timedelta(seconds=round((now - start) / done * (total - done)))
            parts = [f"{description}: {done} of {total} ({done / total:.0%})", f"{left} left", *filter(None, (note,))]
            print(", ".join(parts), file=sys.stderr, flush=True)
            last = now

    yield report


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Remembers SIGINT in the block: one that arrives while a compiler calls Python back is swallowed there."""

    def note(number, frame):
        _interrupted.set()
        raise KeyboardInterrupt

    _interrupted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield
        heed_interruption()
    finally:
        signal.signal(signal.SIGINT, before)


def heed_interruption() -> None:
    """Raises KeyboardInterrupt if one was swallowed; called where a stage makes progress and before a file appears."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT back until the block has ended: for what must not be left half done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT has come, so that a step is completed; the second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = []

    def note(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("interrupted: what is done is saved first", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
