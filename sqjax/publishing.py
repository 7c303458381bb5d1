"""A release: the file with its model card and report in a folder, and from there to a hub repository."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sqjax import comparison, gguf_file, report, tables
from sqjax.comparison import C4_SOURCE, C4_SUITE
from sqjax.measuring import Runtime
from sqjax.pages import render
from sqjax.run import MIB, InputError, atomic_path
from sqjax.sources import Sources, open_texts


def publish(
    file: str | Path,
    *,
    reference: str | Path,
    repository: str,
    out: str | Path,
    others: Sequence[str | Path] = (),
    text: Sources | None = None,
    c4: str | Path | None = None,
    out_of_domain: Sources = (),
    length: int = 512,
    windows: int | None = None,
    runtime: Runtime | Literal["both"] = "jax",
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
      text: suites as of `compare`; convergence60, heldout120 and, where it can be had, c4-64x256 unless given.
      c4: C4 validation text for c4-64x256; from the hub unless given.
      out_of_domain, length, windows, runtime, calibration, allow_overlap: as of `compare`.
      licence: for the card; that which the file states unless given.
      upload: create the repository and upload; else only the folder is written.
      private: whether a new repository is private.

    Returns:
      `folder`, `repository`, `uploaded`, `url` (of the commit, or None), `left_out` (suites that could not be had) and
      `files`: path in the repository -> bytes.

    Raises:
      InputError: one of them cannot be read, there is no token to upload with, or the hub refuses.
    """
    # An hour of scoring must not end with a missing token.
    hub = _hub() if upload else None
    out = Path(out)
    suites, left_out = _suites(text, c4)
    result = comparison.compare(
        [file, *others],
        reference=reference,
        text=suites,
        out_of_domain=out_of_domain or (comparison.DEFAULT_OUT_OF_DOMAIN if text is None else ()),
        out=out / "report",
        length=length,
        windows=windows,
        runtime=runtime,
        calibration=calibration,
        allow_overlap=allow_overlap,
    )
    written = _write(result, Path(file), card(result, Path(file), reference, repository, licence, left_out), out)
    contents = {str(path.relative_to(out)): path.stat().st_size for path in written}
    url = _upload(hub, out, repository, list(contents), private) if hub else None
    release = {"folder": str(out), "repository": repository, "uploaded": upload, "url": url}
    return release | {"left_out": left_out, "files": contents}


def _write(result: Mapping[str, Any], file: Path, card: str, out: Path) -> list[Path]:
    """Puts a file, how it came about, charts and card beside the report; returns all that a release is made of."""
    charts = [Path(result["report"][f"{chart}.png"]) for chart in ("loss-size", "kl-histograms")]
    # With its records whoever downloads the file can see what it was made on, and is kept from measuring it on that.
    records = [file.with_name(f"{file.name}{ending}") for ending in (".json", ".seen.npy")]
    copies = {source: out / source.name for source in (file, *filter(Path.exists, records), *charts)}
    for source, target in copies.items():
        with atomic_path(target) as path:
            shutil.copyfile(source, path)
    with atomic_path(out / "README.md") as path:
        path.write_text(card, encoding="utf-8")
    # What another release left in the folder is none of this one's.
    return sorted([out / "README.md", *copies.values(), *map(Path, result["report"].values())])


def _facts(result: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """What a comparison says of a file, and the `name` under which it says it."""
    name = next(name for name, facts in result["files"].items() if facts["file"] == str(file))
    return {"name": name} | result["files"][name]


def _suites(text: Sources | None, c4: str | Path | None) -> tuple[list[str | Path], list[str]]:
    """The suites of a release, and those of them that cannot be had here."""
    suites = [text] if isinstance(text, str | Path) else list(comparison.DEFAULT_SUITES if text is None else text)
    if c4 is not None:
        return [*suites, f"{C4_SUITE}={c4}"], []
    if text is not None:
        return suites, []
    try:
        next(iter(open_texts(C4_SOURCE)))
    except InputError as error:
        print(f"{C4_SUITE} is left out: {error}; --c4 takes its text from a file", file=sys.stderr, flush=True)
        return suites, [C4_SUITE]
    return [*suites, C4_SUITE], []


def card(
    result: Mapping[str, Any],
    file: Path,
    reference: str | Path,
    repository: str,
    licence: str | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """Returns the model card of one of a comparison's files: README.md with the front matter that a hub reads."""
    facts = _facts(result, file)
    metadata = gguf_file.inspect(file)["metadata"]
    base = str(reference) if not Path(reference).exists() else None
    stated = [metadata.get(key) for key in ("general.base_model.0.repo_url", "general.source.huggingface.repository")]
    base = base or next((str(url).removeprefix("https://huggingface.co/") for url in stated if url), None)
    shown = [
        tables.losses,
        tables.recoveries,
        tables.divergences,
        tables.in_llama_cpp,
        tables.suites,
        tables.provenance,
    ]
    kinds = [kind for kind in facts["types"] if kind != "F32"]
    return render(
        "card.md.jinja",
        is_html=False,
        name=result["reference_facts"]["name"],
        file=file.name,
        repository=repository,
        base=base,
        licence=licence or metadata.get("general.license"),
        languages=metadata.get("general.languages") or [],
        facts=facts,
        kind="Q4_K_M" if kinds == ["Q4_K"] else "/".join(kinds) or "F32",
        mib=facts["file_bytes"] / MIB,
        scored=report.scored(result),
        kept=report.kept(result, facts["name"]),
        tables=[table for make in shown if (table := make(result))],
        suites=result["suites"],
        left_out=left_out,
        disjoint=result["disjoint_from_calibration"],
        conditions=report.conditions(result),
        runtime=result["settings"]["runtime"],
        steps=tables.steps(facts["provenance"]),
    )


def _hub() -> Any:
    """The hub's client, with a token.

    Raises:
      InputError: the client is not installed, or has no token.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("uploading needs the hub's client; pip install 'sqjax[hub]'") from error
    if not huggingface_hub.get_token():
        raise InputError(
            "uploading needs a token that may write; make one at https://huggingface.co/settings/tokens, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    return huggingface_hub.HfApi()


def _upload(hub: Any, folder: Path, repository: str, names: list[str], private: bool) -> str:
    try:
        hub.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=names, commit_message="GGUF file, card and report"
        )
    except Exception as error:  # the hub's own, the network's and the disk's errors share no base class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{repository} was not uploaded ({reason}); the release lies in {folder}") from error
    return str(getattr(commit, "commit_url", commit))
