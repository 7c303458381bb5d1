"""What a study searches: the space of dotted settings, and how it is gone through."""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from sqjax.run import InputError

SAMPLERS = ("grid", "random", "tpe", "nsga2")
Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a space is searched.

    Attributes:
      name: of the study in its database; the name of the config's file unless given.
      sampler: grid (every point), random, tpe (one objective or two) or nsga2.
      trials: how many; a grid has as many as points.
      objectives: what is minimised: inside, outside, or both.
      prune_above: a trial ends when what it reports is above this; 0 lets all go on.
      prune_median: a trial ends when what it reports is above the median of the others; one objective only.
      batch_trials: trials that a worker takes at once.
      seed: of the sampler.
      retries: how often a trial is tried again whose worker was killed.
      heartbeat: seconds between two signs of life of a worker; it counts as dead after four of them.
    """

    name: str = ""
    sampler: str = "grid"
    trials: int = 0
    objectives: tuple[str, ...] = ("inside",)
    prune_above: float = 0.0
    prune_median: bool = False
    batch_trials: int = 1
    seed: int = 0
    retries: int = 5
    heartbeat: int = 15

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise InputError(f"there is no sampler {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")
        if self.sampler != "grid" and self.trials < 1:
            raise InputError(f"the sampler {self.sampler} needs a number of trials; set sweep.trials")
        if not self.objectives or set(self.objectives) - {"inside", "outside"}:
            raise InputError("sweep.objectives are inside, outside, or both")
        if self.prune_median and len(self.objectives) > 1:
            raise InputError("prune_median needs one objective; prune_above works with two")
        if min(self.batch_trials, self.heartbeat) < 1:
            raise InputError("sweep.batch_trials and sweep.heartbeat must be at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# What is searched


@dataclass(frozen=True)
class Space:
    """Dotted settings and what each may be: a list of values, or a range of numbers."""

    choices: Mapping[str, tuple[Any, ...]]
    ranges: Mapping[str, BaseDistribution]

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> "Space":
        """Reads a TOML table: `recipe.gamma_in = [0.5, 1.0]` or `{low = 0.001, high = 0.1, log = true, step = 0}`.

        Raises:
          InputError: a setting has no values, or a range is none.
        """
        choices, ranges = {}, {}
        for name, value in _flat(table):
            if isinstance(value, list) and value:
                choices[name] = tuple(value)
            elif isinstance(value, Mapping):
                ranges[name] = _range(name, value)
            else:
                raise InputError(f"search.{name} is {value!r}; give a list of values, or a range with low and high")
        if not choices and not ranges:
            raise InputError("nothing is searched; put settings and their values under [search]")
        return cls(choices, ranges)

    @property
    def names(self) -> list[str]:
        """Names of what is searched."""
        return [*self.choices, *self.ranges]

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view of the space."""
        return {name: CategoricalDistribution([*map(_label, values)]) for name, values in self.choices.items()} | dict(
            self.ranges
        )

    def points(self) -> list[dict[str, Any]]:
        """All points of the grid, as Optuna's parameters; those named first vary slowest.

        Raises:
          InputError: a range is no list of values.
        """
        if self.ranges:
            raise InputError(f"a grid needs lists of values; {', '.join(self.ranges)} is a range")
        labels = [[*map(_label, values)] for values in self.choices.values()]
        return [dict(zip(self.choices, point)) for point in itertools.product(*labels)]

    def settings(self, parameters: Mapping[str, Any]) -> Point:
        """Returns the settings that Optuna's parameters stand for."""
        found = {name: {_label(value): value for value in values} for name, values in self.choices.items()}
        return {name: found[name][value] if name in found else value for name, value in parameters.items()}


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= value.keys():
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _label(value: Any) -> Any:
    """A value as Optuna can keep it: lists become JSON."""
    return json.dumps(value) if isinstance(value, list) else value


def _range(name: str, value: Mapping[str, Any]) -> BaseDistribution:
    if unknown := set(value) - {"low", "high", "log", "step"}:
        raise InputError(f"the range search.{name} has no {', '.join(sorted(unknown))}; give low, high, log or step")
    kind = IntDistribution if all(isinstance(value[key], int) for key in ("low", "high")) else FloatDistribution
    try:
        return kind(**value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the range search.{name} is none: {error}") from error
