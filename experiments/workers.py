"""Jobs shared by several processes, one a device: each result is a line of JSON, and a job that has one is skipped.

    folder/results.jsonl    a line a job, written when the job ends
    folder/locks/           held while something is made; the lock of a process that died is free again
    folder/programs/        compiled programs, shared by all processes

A run that is out of time stops as an interrupted one does; the same command goes on.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Triton's matrix products run at a hundredth of the device's rate unless they are tuned, and tuning them costs minutes
# of compilation, which runs of minutes do not earn back: cuBLAS's need none (experiments/speed, section flags).
CUBLAS = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"
# A process that has not stopped by itself after this many seconds sits in a compilation, and is ended.
_GRACE = 25.0


class Busy(Exception):
    """Another process makes what is needed."""


@dataclass(frozen=True)
class Job:
    """A piece of work that ends in one line of results; `run` may raise Busy, and is then tried again later."""

    name: str
    run: Callable[[], Mapping[str, Any]]


@contextlib.contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Holds a lock, or raises Busy where another process does."""
    place = folder / "locks" / name.replace("/", "_")
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(name) from None
        yield


def make_once(folder: Path, target: Path, make: Callable[[], Any]) -> Path:
    """Returns the path of what `make` makes, which one of the processes does; the others are Busy until then."""
    if not target.exists():
        with held(folder, target.name):
            if not target.exists():
                make()
    return target


def results(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a folder, in the order in which they were written; a cut last line is left out."""
    path = folder / "results.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def done(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the line of every job that ended without an error."""
    return {row["job"]: row for row in results(folder) if "error" not in row}


def write(folder: Path, row: Mapping[str, Any]) -> None:
    """Appends a line; one write, so that lines of several processes do not mix."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(row)) + "\n")


def work(jobs: Sequence[Job], folder: Path, seconds: float) -> bool:
    """Does the jobs that nobody else does, in order, for so many seconds; returns whether all of them are done.

    A job that fails leaves a line with its error and costs no other job.
    """
    # Shells start what runs in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    stop.daemon = True
    stop.start()
    waiting, failed = list(jobs), set()
    try:
        while waiting:
            began = len(waiting)
            waiting = [job for job in waiting if not _attempt(job, folder, failed)]
            if len(waiting) == began:
                time.sleep(1.0)
        return not failed
    except KeyboardInterrupt:
        print("out of time: the same command goes on", file=sys.stderr, flush=True)
        return False
    finally:
        stop.cancel()
        signal.signal(signal.SIGINT, before)


def _attempt(job: Job, folder: Path, failed: set[str]) -> bool:
    """Whether nothing is left to do for a job."""
    if job.name in done(folder):
        return True
    try:
        with held(folder, f"job {job.name}"):
            if job.name in done(folder):
                return True
            begin = time.monotonic()
            row = job.run()
            write(folder, {"job": job.name} | dict(row) | {"job_seconds": round(time.monotonic() - begin, 1)})
    except Busy:
        return False
    except Exception as error:  # whatever it was, it must cost no other job
        traceback.print_exc()
        failed.add(job.name)
        write(folder, {"job": job.name, "error": f"{type(error).__name__}: {error}"[:500]})
    return True


def spread(command: Sequence[str], devices: Sequence[str], folder: Path, seconds: float) -> bool:
    """Runs a command once for each device and returns whether every process ended well; no device: one process.

    All share a cache of compiled programs. XLA_FLAGS of the environment win over those that are set here.
    """
    environment = {"XLA_FLAGS": CUBLAS} | dict(os.environ)
    environment |= {"JAX_COMPILATION_CACHE_DIR": str((folder / "programs").absolute())}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + seconds
    processes = []
    for device in devices or [None]:
        own = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        processes.append(subprocess.Popen([*command, "--until", f"{seconds:.0f}"], env=environment | own))
    for process in processes:
        try:
            process.wait(timeout=max(1.0, deadline + _GRACE - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"ended after {seconds + _GRACE:.0f} s: the same command goes on", file=sys.stderr, flush=True)
            process.kill()
            process.wait()
    return all(process.returncode == 0 for process in processes)


def say(*words: Any) -> None:
    """Prints to standard error, behind the time and the device."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "-")
    print(f"[{time.strftime('%H:%M:%S')} {device}]", *words, file=sys.stderr, flush=True)
