"""A release: the file with its model card and report in a folder, and from there to a hub repository."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sqjax import comparison, gguf_file, report, tables
from sqjax.run import InputError, atomic_path
from sqjax.sources import Sources

_CARD = "card.md.jinja"


def publish(
    file: str | Path,
    *,
    reference: str | Path,
    repository: str,
    out: str | Path,
    others: Sequence[str | Path] = (),
    text: Sources | None = None,
    out_of_domain: Sources = (),
    length: int = 512,
    windows: int | None = None,
    calibration: Sequence[str | Path] = (),
    allow_overlap: bool = False,
    licence: str | None = None,
    upload: bool = False,
    private: bool = False,
) -> dict[str, Any]:
    """Writes a release into a folder, file, card and report, and uploads it where `upload` is set.

    Args:
      file: the GGUF file to release.
      reference: the model that it was made from; a hub id is named in the card as the base model.
      repository: `owner/name` on the hub.
      out: folder for what is, or would be, uploaded.
      others: files to compare with.
      text, out_of_domain, length, windows, calibration, allow_overlap: as of `compare`.
      licence: for the card; that which the file states unless given.
      upload: create the repository and upload; else only the folder is written.
      private: whether a new repository is private.

    Returns:
      `folder`, `repository`, `uploaded`, `url` (of the commit, or None) and `files`: path in the repository -> bytes.

    Raises:
      InputError: one of them cannot be read, or the hub refuses.
    """
    out = Path(out)
    result = comparison.compare(
        [file, *others],
        reference=reference,
        text=text,
        out_of_domain=out_of_domain,
        out=out / "report",
        length=length,
        windows=windows,
        calibration=calibration,
        allow_overlap=allow_overlap,
    )
    for chart in ("loss-size.png", "kl-histograms.png"):
        shutil.copy(out / "report" / chart, out / chart)
    # With its records whoever downloads the file can see what it was made on, and is kept from measuring it on that.
    for name in (Path(file).name + ending for ending in ("", ".json", ".seen.npy")):
        if (source := Path(file).with_name(name)).exists():
            with atomic_path(out / name) as path:
                shutil.copyfile(source, path)
    with atomic_path(out / "README.md") as path:
        path.write_text(card(result, Path(file), reference, repository, licence), encoding="utf-8")
    contents = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    url = _upload(out, repository, list(contents), private) if upload else None
    return {"folder": str(out), "repository": repository, "uploaded": upload, "url": url, "files": contents}


def card(
    result: Mapping[str, Any], file: Path, reference: str | Path, repository: str, licence: str | None = None
) -> str:
    """Returns the model card of one of a comparison's files: README.md with the front matter that a hub reads."""
    facts = result["files"][file.name]
    metadata = gguf_file.inspect(file)["metadata"]
    base = str(reference) if not Path(reference).exists() else None
    stated = [metadata.get(key) for key in ("general.base_model.0.repo_url", "general.source.huggingface.repository")]
    base = base or next((str(url).removeprefix("https://huggingface.co/") for url in stated if url), None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)  # a JSON string is a YAML one
    return environment.get_template(_CARD).render(
        name=result["reference_facts"]["name"],
        file=file.name,
        repository=repository,
        base=base,
        licence=licence or metadata.get("general.license"),
        languages=metadata.get("general.languages") or [],
        facts=facts,
        mib=facts["file_bytes"] / (1 << 20),
        summary=report.summary(result),
        tables=[
            tables.losses(result),
            tables.recoveries(result),
            tables.divergences(result),
            tables.provenance(result),
        ],
        suites=result["suites"],
        disjoint=result["disjoint_from_calibration"],
        made=_provenance(facts),
    )


def _provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Recipe, calibration text, its tokens and their hash, as far as the file's provenance states them."""
    found = facts["provenance"] or {}
    calibration = found.get("calibration") or found
    text = calibration.get("text") or []
    return {
        "recipe": found.get("recipe") or ("refine" if "start_sha256" in found else None),
        "text": [text] if isinstance(text, str) else list(text),
        "tokens": calibration.get("tokens"),
        "sha256": calibration.get("windows_sha256"),
        "seed": found.get("seed"),
        "trains_vectors": bool((found.get("settings") or {}).get("train_vectors")),
        "equalizes": bool((found.get("settings") or {}).get("equalize")),
    }


def _upload(folder: Path, repository: str, names: list[str], private: bool) -> str:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("uploading needs the hub's client; pip install 'sqjax[hub]'") from error
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="GGUF file, card and report"
        )
    except Exception as error:  # the hub's own, the network's and the disk's errors share no base class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{repository} was not uploaded ({reason}); the release lies in {folder}") from error
    return str(getattr(commit, "commit_url", commit))
