"""Files and run folders on object stores: fetched before a stage runs, and what it wrote is put back after it.

A stage works on the local disk, where files can be mapped and renamed; an object of a store appears whole or not at
all. What a stage had written is put back too when it fails or is interrupted, so that it can be resumed elsewhere.
"""

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqjax.run import InputError


def is_remote(path: Any) -> bool:
    """Whether something is the URL of an object store: gs://, s3://, ..."""
    return isinstance(path, str) and "://" in path


@contextlib.contextmanager
def local(url: str) -> Iterator[Path]:
    """Yields a local path that stands for a file or folder of a store, and for whatever is named after it beside it.

    Afterwards new and changed files are put into the store, those last written last, and those that are gone removed.

    Raises:
      InputError: the store cannot be reached, or its driver is missing.
    """
    with tempfile.TemporaryDirectory(prefix="sqjax-") as name:
        folder = Path(name)
        with _as_input_error(url):
            store, parent, stem = _open(url)
            fetched = dict(_fetch(store, parent, stem, folder))
        try:
            yield folder / stem
        finally:
            with _as_input_error(url):
                _put(store, parent, folder, fetched)


@contextlib.contextmanager
def _as_input_error(url: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{url} needs a driver: pip install 'sqjax[buckets]' ({error})") from error
    except Exception as error:  # drivers raise errors of many libraries
        raise InputError(f"cannot read or write {url}: {type(error).__name__}: {error}") from error


def _open(url: str) -> tuple[Any, str, str]:
    import fsspec

    store, path = fsspec.core.url_to_fs(url.rstrip("/"))
    parent, slash, stem = path.rpartition("/")
    if not stem:
        raise InputError(f"{url} names no file or folder")
    return store, parent + slash, stem


def _fetch(store: Any, parent: str, stem: str, folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Fetches objects named after `stem`; gives their names and what tells whether they are changed."""
    for entry in store.glob(f"{parent}{stem}*"):
        for remote in store.find(entry) if store.isdir(entry) else [entry]:
            name = remote[len(parent) :]
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(remote, str(path))
            yield name, _state(path)


def _state(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _put(store: Any, parent: str, folder: Path, fetched: Mapping[str, tuple[int, int]]) -> None:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    # A record that says that all is there is written last; it shall arrive last too.
    for name, path in sorted(files.items(), key=lambda item: item[1].stat().st_mtime_ns):
        if fetched.get(name) != _state(path) and not path.name.endswith((".lock", ".partial")):
            store.makedirs(f"{parent}{name}".rpartition("/")[0], exist_ok=True)
            store.put_file(str(path), f"{parent}{name}")
    for name in fetched.keys() - files.keys():
        store.rm_file(f"{parent}{name}")


def mirrored(stage: Callable[..., dict[str, Any]], *names: str) -> Callable[..., dict[str, Any]]:
    """Returns a stage whose arguments of these names may be URLs; its result names URLs where it named local paths."""
    signature = inspect.signature(stage)

    @functools.wraps(stage)
    def on_local_disk(*arguments: Any, **options: Any) -> dict[str, Any]:
        bound = signature.bind(*arguments, **options)
        urls: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            for name in names:
                if is_remote(url := bound.arguments.get(name)):
                    path = stack.enter_context(local(url))
                    bound.arguments[name] = path
                    urls[str(path)] = url.rstrip("/")
            result = stage(*bound.args, **bound.kwargs)
        return _renamed(result, urls) if urls else result

    return on_local_disk


def _renamed(value: Any, urls: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(item, urls) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, urls) for item in value]
    if isinstance(value, str):
        for path, url in urls.items():
            value = value.replace(path, url)
    return value
