"""Settings: frozen dataclasses read from TOML files and written to them, where an unknown key is an error."""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from sqjax.run import InputError


def read_settings(cls: type, path: Path, overrides: Sequence[str] = ()) -> Any:
    """Builds a frozen dataclass of settings from a TOML file and `key=value` overrides, values in TOML syntax.

    A field that is itself such a dataclass is a table; the keys of its overrides are dotted.

    Raises:
      InputError: the file cannot be read, a key is unknown, or a value is of the wrong kind.
    """
    return build(cls, overridden(read_toml(path), parse_overrides(overrides)), path.name)


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
      InputError: it cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is no valid TOML: {error}") from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` strings; keys may be dotted.

    Raises:
      InputError: one of them has no equals sign.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override!r} is not key=value")
        values[key.strip()] = _toml_value(text.strip())
    return values


def overridden(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested values in which those of dotted keys are replaced.

    Raises:
      InputError: a dotted key leads through something that is no table.
    """
    values = dict(values)
    for key, value in changes.items():
        head, dot, rest = key.partition(".")
        if dot and not isinstance(values.setdefault(head, {}), Mapping):
            raise InputError(f"there is no setting {key}: {head} is no table")
        values[head] = overridden(values[head], {rest: value}) if dot else value
    return values


def build(cls: type, values: Mapping[str, Any], origin: str) -> Any:
    """Builds a frozen dataclass, and those in it, from nested values; `origin` is named in errors.

    Raises:
      InputError: a key is unknown or missing, or a value is of the wrong kind.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise InputError(f"{origin} has no setting {', '.join(unknown)}; the settings are {', '.join(fields)}")
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}
    if lacking := sorted(needed - set(values)):
        raise InputError(f"{origin} lacks the setting {', '.join(lacking)}")
    return cls(**{key: _as_type(key, value, fields[key], origin) for key, value in values.items()})


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a string: --set name=value needs no quotes inside the shell's.
        return text


def _as_type(key: str, value: Any, kind: Any, origin: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(kind, value, f"{key} in {origin}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    plain = get_origin(kind) or kind
    if plain is tuple or not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        name = getattr(kind, "__name__", str(kind)) if plain is not tuple else "list of names"
        raise InputError(f"the setting {key} is {value!r}; it must be a {name}")
    return value


def to_toml(values: Mapping[str, Any], table: str = "") -> str:
    """Writes nested values as TOML: numbers, booleans, strings, lists of strings, and tables of them."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    # JSON and TOML write these kinds alike, but for characters that TOML wants escaped otherwise.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in plain.items()]
    head = f"\n[{table}]\n" if table and lines else ""
    below = (to_toml(value, f"{table}.{key}" if table else key) for key, value in tables.items())
    return head + "".join(lines) + "".join(below)
