"""Kills a refinement ten times and resumes it: the file must have the SHA-256 of one that was never interrupted.

python experiments/refinement/kills.py --out experiments/refinement/kills.jsonl

The embedded model, plainly rounded, is refined on a thousand tokens an update by `sqjax refine` in processes of their
own. The first run is left alone and timed; the second is ended by SIGKILL at random moments (`--seed`), drawn inside
each of its phases, since a moment drawn from the whole would hardly ever meet the short ones:

  starting   a process reads its model and compiles, or restores its checkpoint
  updating   some time after an update
  saving     some time after a checkpoint began to be written
  exporting  some time after the last update
  writing    some time after the file and its records began to be written

Both runs start with an empty cache of compiled programs: the first kills meet a compiler. One JSON line is written.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sqjax
from sqjax.run import sha256
from sqjax.sources import DEMO_MODEL

UPDATES, SAVE_EVERY = 32, 3
SETTINGS = {"length": 256, "batch": 4, "warmup": 4, "codes_rate": 0.02, "watch_windows": 8, "watch_every": 8}
SETTINGS |= {"checkpoint_every": SAVE_EVERY, "updates": UPDATES}
POLL = 0.003


@dataclasses.dataclass(frozen=True)
class Kill:
    """A phase, a share of it, and the update after which it comes if the run has come so far; 0: the first process."""

    phase: str
    update: int
    share: float


def draw(seed: int) -> list[Kill]:
    """Ten kills in the order in which a run meets them."""
    generator = random.Random(seed)
    saves = range(SAVE_EVERY, UPDATES, SAVE_EVERY)
    places = [("starting", 0), ("starting", generator.randrange(UPDATES // 3, UPDATES - 4))]
    places += [("updating", update) for update in sorted(generator.sample(range(1, UPDATES), 3))]
    places += [("saving", update) for update in sorted(generator.sample(saves, 2))]
    places += [("exporting", UPDATES), ("writing", UPDATES), ("writing", UPDATES)]
    order = ("starting", "updating", "saving", "exporting", "writing")
    places.sort(key=lambda place: (place[1], order.index(place[0])))
    return [Kill(phase, update, generator.random()) for phase, update in places]


class Refining:
    """One process of `sqjax refine`, and what can be seen of it from outside."""

    def __init__(self, folder: Path, start: Path, *, resume: bool):
        self.out, self.run = folder / "out.gguf", folder / "out.gguf.run"
        self._stale, self._left = self._inode(), set(self._written())
        settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "sqjax.cli", "refine", DEMO_MODEL, start, self.out, *settings]
        command += ["--tokens", UPDATES * SETTINGS["batch"] * SETTINGS["length"], *(["--resume"] if resume else [])]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        self._first: int | None = None
        self._log, self._began = (folder / "log").open("a"), time.time()
        self.began = time.monotonic()
        self.process = subprocess.Popen([*map(str, command)], env=environment, stderr=self._log, stdout=self._log)

    def _inode(self) -> int | None:
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def updates(self) -> int | None:
        """The last update in the metrics; None until this process has begun to write them."""
        try:
            # A resumed process replaces the file before it goes on.
            if self._inode() in (None, self._stale):
                return None
            lines = (self.run / "metrics.jsonl").read_text().split("\n")[:-1]
            return json.loads(lines[-1])["step"] if lines else 0
        except FileNotFoundError:
            return None

    def has_updated(self) -> bool:
        """Whether this process has done an update of its own; to be asked from its beginning on."""
        now = self.updates()
        self._first = now if self._first is None else self._first
        return now is not None and now > self._first

    def unfinished(self) -> list[str]:
        """Checkpoints and files that are being written, or that a killed process left."""
        found = [*self.run.glob("checkpoints/*tmp*"), *self.run.parent.glob(".*.partial"), *self.run.glob(".*.partial")]
        return sorted(path.name for path in found)

    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in self.run.glob("checkpoints/*") if path.name.isdigit())

    def is_saving(self, update: int) -> bool:
        try:
            # A killed process leaves a folder of the same name.
            places = self.run.glob(f"checkpoints/{update}.*tmp*")
            return any(place.stat().st_mtime > self._began for place in places)
        except FileNotFoundError:
            return False

    def is_writing(self) -> bool:
        return any(path not in self._left for path in self._written())

    def _written(self) -> list[Path]:
        return list(self.out.parent.glob(f".{self.out.name}.*.partial"))

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self) -> None:
        if self.process.wait():
            raise SystemExit(f"a run ended with {self.process.returncode}; its last words:\n{self.last_words()}")

    def last_words(self) -> str:
        return Path(self._log.name).read_text()[-2000:]


def timed(folder: Path, start: Path) -> tuple[str, dict[str, float]]:
    """Runs without interruption; returns the file's SHA-256 and how long each phase takes, in seconds."""
    refining, moments, saves, seen = Refining(folder, start, resume=False), {}, {}, None
    began = end = None
    while refining.running():
        now, update = time.monotonic(), refining.updates()
        if update is not None and update != seen:
            moments[update], seen = now, update
        if began is None and refining.is_writing():
            began = now
        if end is None and (refining.run / "result.json").exists():
            end = now
        for step in range(SAVE_EVERY, UPDATES + 1, SAVE_EVERY):
            if refining.is_saving(step):
                first, _ = saves.get(step, (now, now))
                saves[step] = first, now
        time.sleep(POLL)
    refining.wait()
    saving = statistics.median([last - first for first, last in saves.values()] or [0.1])
    phases = {"starting": moments[1] - refining.began, "updating": (moments[UPDATES] - moments[1]) / (UPDATES - 1)}
    return sha256(refining.out), phases | {
        "saving": saving,
        "exporting": began - moments[UPDATES],
        "writing": end - began,
    }


def strike(folder: Path, start: Path, kill: Kill, seconds: dict[str, float], *, resume: bool) -> dict:
    """Starts or resumes the run, ends it at the moment that was drawn, and says where it was."""
    refining = Refining(folder, start, resume=resume)
    is_due = {
        "starting": lambda: True,
        "updating": lambda: (refining.updates() or 0) >= kill.update,
        "saving": lambda: refining.is_saving(kill.update) or kill.update < (refining.updates() or 0),
        "exporting": lambda: (refining.updates() or 0) >= UPDATES,
        "writing": refining.is_writing,
    }[kill.phase]
    while refining.running() and not is_due():
        time.sleep(POLL)
    moment = time.monotonic() + kill.share * seconds[kill.phase]
    # How long a process takes to start depends on what else the machine does; its first update, which is compiled
    # after the metrics are opened, must not be done.
    while time.monotonic() < moment and not (kill.phase == "starting" and refining.has_updated()):
        time.sleep(POLL)
    was_running = refining.running()
    refining.process.send_signal(signal.SIGKILL)
    refining.process.wait()
    if not was_running and refining.process.returncode:
        raise SystemExit(f"the run failed before kill {kill}; its last words:\n{refining.last_words()}")
    return {
        "phase": kill.phase,
        "drawn_after_update": kill.update,
        "seconds": round(time.monotonic() - refining.began, 2),
        "killed": was_running,
        "update": refining.updates(),
        "has_updated": refining.has_updated() if kill.phase == "starting" else None,
        "checkpoints": refining.saved(),
        "unfinished": refining.unfinished(),
        "file": refining.out.exists(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to which the JSON line is appended")
    parser.add_argument("--folder", type=Path, help="for the runs, which stay there; a temporary one unless given")
    args = parser.parse_args()
    say = lambda *words: print(*words, file=sys.stderr, flush=True)  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        root = args.folder or Path(scratch)
        for name in ("whole", "killed"):
            (root / name).mkdir(parents=True)
        start = root / "start.gguf"
        sqjax.convert(DEMO_MODEL, start)
        expected, seconds = timed(root / "whole", start)
        say(f"uninterrupted: {expected}, " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
        kills = []
        for number, kill in enumerate(draw(args.seed)):
            kills.append(strike(root / "killed", start, kill, seconds, resume=number > 0))
            say(f"kill {number + 1}: {json.dumps(kills[-1])}")
        last = Refining(root / "killed", start, resume=True)
        last.wait()
        found = sha256(last.out)
        result = {"seed": args.seed, "updates": UPDATES, "settings": SETTINGS, "seconds": seconds, "kills": kills}
        result |= {"left_over": last.unfinished(), "expected": expected, "found": found, "same": found == expected}
    line = json.dumps(result)
    print(line)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    sys.exit(0 if result["same"] else 1)


if __name__ == "__main__":
    main()
