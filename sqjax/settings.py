"""Settings: frozen dataclasses read from TOML files, where an unknown key is an error."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from sqjax.run import InputError


def read_settings(cls: type, path: Path, overrides: Sequence[str] = ()) -> Any:
    """Builds a frozen dataclass of settings from a TOML file and `key=value` overrides, values in TOML syntax.

    Raises:
      InputError: the file cannot be read, a key is unknown, or a value is of the wrong kind.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no valid TOML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override!r} is not key=value")
        values[key.strip()] = _toml_value(text.strip())
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise InputError(f"{path.name} has no setting {', '.join(unknown)}; the settings are {', '.join(fields)}")
    needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
    if missing := sorted(needed - set(values)):
        raise InputError(f"{path.name} lacks the setting {', '.join(missing)}")
    return cls(**{key: _as_type(key, value, fields[key]) for key, value in values.items()})


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a string: --set name=value needs no quotes inside the shell's.
        return text


def _as_type(key: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    plain = get_origin(kind) or kind
    if plain is tuple or not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        name = getattr(kind, "__name__", str(kind)) if plain is not tuple else "list of names"
        raise InputError(f"the setting {key} is {value!r}; it must be a {name}")
    return value
