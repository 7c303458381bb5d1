"""Files appear whole or not at all; progress says how long it will take."""

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import sys

import pytest

from sqjax import run
from sqjax.run import InputError, atomic_path, progress, sha256


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new folder" / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_of_a_file_goes_when_the_file_is_written(tmp_path):
    code = f"""
import os, signal
from sqjax.run import atomic_path
with atomic_path({str(tmp_path / "file")!r}) as path:
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with atomic_path(tmp_path / "file"), atomic_path(tmp_path / "file") as second:
        # What another process is writing stays, however long it has been at it.
        assert second.exists() and not left.exists() and len(list(tmp_path.iterdir())) == 2
        second.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_the_inputs_fault(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write"), atomic_path(tmp_path / "file" / "x"):
        pass


def test_sha256(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_progress_in_a_log_says_the_share_and_the_time_left(monkeypatch, capsys):
    clock = iter([0.0, 5.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with progress("working") as report:
        for done in (1, 2, 3, 4):
            report(done, 4)
    captured = capsys.readouterr()
    # Nothing before a quarter of a minute has passed, then a line, then none for the next quarter or at the end.
    assert captured.err == "working: 2 of 4 (50%), 0:00:20 left\n" and captured.out == ""


def test_progress_on_a_terminal_writes_to_standard_error_only(monkeypatch, capsys):
    monkeypatch.setattr(run.sys.stderr, "isatty", lambda: True)
    with progress("working") as report:
        report(1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and "working" in captured.err


def test_an_interruption_that_is_swallowed_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt), run.interruptible(), run.atomic_path(tmp_path / "file") as path:
        path.write_text("whole")
        # As in a call back from a compiler.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert list(tmp_path.iterdir()) == []
    with run.interruptible(), run.atomic_path(tmp_path / "file") as path:
        path.write_text("whole")
    assert (tmp_path / "file").read_text() == "whole"
