"""Splits a pool of text into what is calibrated on and what a sweep is judged by, so that held-out text stays unseen.

python experiments/shaping/split.py POOL.jsonl.gz FOLDER --outside multilingual

writes FOLDER/calibration.jsonl.gz, FOLDER/inside/DOMAIN.jsonl of every domain that is calibrated on, and
FOLDER/outside/DOMAIN.jsonl of those that calibration shall not see. Documents are drawn by the hash of their text, so
that the same ones are drawn wherever they stand; documents that share most of their words with a drawn one are left
out of the calibration.
"""

import argparse
import gzip
import hashlib
import json
from collections import defaultdict
from pathlib import Path

from sqjax.fingerprints import known_documents, piece_of, prints_of
from sqjax.sources import open_texts
from sqjax.texts import Document


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pool", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--outside", nargs="*", default=["multilingual"], help="domains that calibration does not see")
    parser.add_argument("--documents", type=int, default=48, help="drawn of each domain")
    asked = parser.parse_args()
    domains: dict[str, list[Document]] = defaultdict(list)
    for document in open_texts(asked.pool):
        domains[document.domain].append(document)
    drawn, rest = [], []
    for domain, documents in domains.items():
        documents.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
        drawn += documents[: asked.documents]
        rest += [] if domain in asked.outside else documents[asked.documents :]
    like = {id(document) for document in known_documents(prints_of(map(piece_of, drawn)), rest)}
    kept = [document for document in rest if id(document) not in like]
    # A short document may be found in pieces of many others.
    known = {id(document) for document in known_documents(prints_of(map(piece_of, kept)), drawn)}
    write(asked.folder / "calibration.jsonl.gz", kept)
    for domain in domains:
        side = "outside" if domain in asked.outside else "inside"
        watched = [document for document in drawn if document.domain == domain and id(document) not in known]
        write(asked.folder / side / f"{domain}.jsonl", watched)
    print(
        f"{len(drawn) - len(known)} documents to judge by, {len(kept)} to calibrate on, {len(like) + len(known)} alike"
    )


def write(path: Path, documents: list[Document]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "domain": document.domain}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
