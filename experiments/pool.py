"""A pool of text split into what is calibrated and distilled on and what settings are chosen by."""

import gzip
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

# One document in so many is watched.
_WATCHED = 64


def split(pool: Path, folder: Path, prompts: int = 360) -> None:
    """Writes train.jsonl.gz, watch.jsonl, chat.jsonl and watch_chat.jsonl into a folder, unless they are there.

    Whether a document is watched depends on the hash of the file that it is a part of, so that no file is on both
    sides; the order is that of the hashes. chat.jsonl holds the first `prompts` of the trained conversations.
    """
    if (folder / "train.jsonl.gz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if pool.suffix == ".gz" else open
    with opener(pool, "rt", encoding="utf-8") as file:
        rows = sorted((json.loads(line) for line in file), key=lambda row: _hash(row["text"]))
    watched = [row for row in rows if int(_hash(_whole(row)), 16) % _WATCHED == 0]
    trained = [row for row in rows if int(_hash(_whole(row)), 16) % _WATCHED]
    spoken, spoken_watched = ([row for row in part if row["domain"] == "chat"] for part in (trained, watched))
    for name, part in (("watch", watched), ("watch_chat", spoken_watched), ("chat", spoken[:prompts])):
        (folder / f"{name}.jsonl").write_text(_lines(part), encoding="utf-8")
    # Without the time in the header, the same text gives the same bytes.
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(_lines(trained).encode(), 6, mtime=0))


def repeat(text: Path, target: Path, domain: str, times: int = 2) -> None:
    """Writes a text with each document of a domain several times."""
    from sqjax.run import atomic_path

    with (
        gzip.open(text, "rt", encoding="utf-8") as lines,
        atomic_path(target) as path,
        gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file,
    ):
        for line in lines:
            file.write(line * (times if json.loads(line)["domain"] == domain else 1))


def _whole(row: Mapping[str, str]) -> str:
    """What a document is a part of: a conversation's number tells documents apart, a chunk's number parts of one."""
    return row["source"] if row["domain"] == "chat" else row["source"].split("#")[0]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check(folder: Path, texts: dict[str, str | Path]) -> None:
    """Writes disjoint.json: how many documents each evaluated text has, and how many of them are trained on too.

    Reading all of the pool takes a minute, which no accelerator should wait for.
    """
    from sqjax import sources
    from sqjax.fingerprints import known_documents, piece_of, prints_of

    known = prints_of(map(piece_of, sources.open_texts(folder / "train.jsonl.gz")))
    counts = {}
    for name, text in (texts | {name: folder / f"{name}.jsonl" for name in ("watch", "watch_chat")}).items():
        documents = list(sources.open_texts(text))
        counts[name] = {"documents": len(documents), "also trained on": len(known_documents(known, documents))}
    (folder / "disjoint.json").write_text(json.dumps(counts, indent=1), encoding="utf-8")


def checked(folder: Path) -> dict[str, dict[str, int]] | None:
    """What `check` wrote, if it did."""
    path = folder / "disjoint.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
