"""Checkpoints of the Hugging Face hub: a local folder with the files that a conversion needs."""

import re
from pathlib import Path

from sqjax.run import InputError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# The weights, the configuration, the tokenizer and the model card, whose licence a GGUF file repeats; no pickle.
_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "README.md")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, `organisation/model`."""
    return _HUB_ID.fullmatch(name) is not None


def download(hub_id: str, *, revision: str | None = None) -> Path:
    """Returns the local snapshot of a hub repository, downloaded as far as the cache does not already hold it.

    An interrupted download resumes; without a network, or with HF_HUB_OFFLINE=1, a cached snapshot serves.

    Raises:
      InputError: the extra `hub` is not installed, or the repository is neither reachable nor cached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{hub_id} is not a folder here, and downloading needs huggingface-hub: pip install 'sqjax[hub]', "
            "or copy the repository's files into a folder and give that"
        ) from error
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's own, the network's and the disk's errors share no base class
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{hub_id} is neither a folder here nor to be had from the hub ({reason}); "
            "copy its *.json and *.safetensors files into a folder by hand and give that"
        ) from error
