"""What the experiment consists of: its parts, and in them the runs of refinement with their starts and settings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PARTS = ("start", "curve", "seeds", "ablation", "chosen", "languages", "chat", "uneven", "size", "also", "runtime")
# What the ablation tries in the place of the defaults; the best of each group by watch goes into what is chosen.
# The first names leave a group's decision to chance the least, and are run first.
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "residual": {
        "share 0.9 to 0": ("residual_share_end=0.0",),
        "share 0.8": ("residual_share=0.8", "residual_share_end=0.8"),
    },
    "signal": {
        "KL alone, codes_rate 0.009": ("residual_share=0.0", "residual_share_end=0.0", "codes_rate=0.009"),
    },
    "rate": {
        "codes_rate 0.009": ("codes_rate=0.009",),
        "codes_rate 0.018": ("codes_rate=0.018",),
    },
    "fall of the temperature": {
        "softness_end 0.005, soft_share 1": ("softness_end=0.005", "soft_share=1.0"),
        "softness_end 0.02, soft_share 0.75": ("softness_end=0.02", "soft_share=0.75"),
        "softness 0.15": ("softness=0.15",),
    },
    "what moves": {
        "codes alone": ("d_rate=0.0", "train_vectors=false"),
        "codes, d": ("train_vectors=false",),
        "codes, F32 tensors": ("d_rate=0.0",),
        "codes, d, F32 tensors, scales": ("scales_rate=0.002",),
        "d, F32 tensors": ("codes_rate=0.0",),
    },
    "hard or soft": {
        "hard codes 0.012": ("softness=0.0", "codes_rate=0.012"),
    },
    "displacement": {
        "displacement 0.5": ("displacement=0.5",),
        "displacement 0.8": ("displacement=0.8",),
    },
    "schedule": {
        "linear": ('schedule="linear"',),
    },
}
DEFAULTS = "defaults"
# A better watched divergence than the defaults' counts from here on: seeds differ by half a percent.
_LEAST_GAIN = 0.005
# Passes over the prompts, with the settings of each run; more passes than one fit the prompts' own words.
CHAT: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "1 epoch": (1, ()),
    "4 epochs": (4, ()),
    "16 epochs": (16, ()),
    "64 epochs": (64, ()),
    "16 epochs, codes alone": (16, ("d_rate=0.0", "train_vectors=false")),
    "16 epochs, d and F32 tensors alone": (16, ("codes_rate=0.0",)),
    "16 epochs, hard codes": (16, ("softness=0.0",)),
    "64 epochs, half the rates": (64, ("codes_rate=0.006", "d_rate=0.00025", "vectors_rate=0.00025")),
}


@dataclass(frozen=True)
class Start:
    """A file of `spectral`: the model (even or uneven channels), what it was calibrated on, and the seed."""

    model: str = "even"
    calibration: str = "train"
    seed: int = 0

    @property
    def name(self) -> str:
        """Also of its file."""
        return f"{self.model}.{self.calibration}.{self.seed}"


@dataclass(frozen=True)
class Run:
    """A run of refinement; its seed is that of its start. Tokens of the part chat are passes over the prompts."""

    part: str
    label: str
    start: Start
    tokens: int
    settings: tuple[str, ...] = ()
    text: str = "train"

    @property
    def name(self) -> str:
        """Also of its file; runs of one start, length and setting have one name, whatever part asks for them."""
        words = [self.start.name, f"{self.tokens}", *self.settings] + [self.text] * (self.text != "train")
        return "-".join(words).replace("=", "").replace('"', "")


def runs(
    part: str,
    *,
    curve: Sequence[int],
    budget: int,
    most: int,
    uneven: int,
    seeds: Sequence[int],
    groups: Sequence[str] = tuple(GROUPS),
) -> Iterator[Run]:
    """The runs of a part but for those that depend on results.

    Args:
      part: one of PARTS.
      curve: tokens of the curve.
      budget: tokens of a run of the ablation.
      most: tokens of the seeds' runs.
      uneven: tokens of the runs on uneven channels.
      seeds: of calibration and refinement; the first is that of all other parts.
      groups: of the ablation.
    """
    first = Start(seed=seeds[0])
    if part == "curve":
        yield from (Run(part, f"{tokens / 1e6:g} M", first, tokens) for tokens in curve)
    if part == "seeds":
        yield from (Run(part, f"seed {seed}", Start(seed=seed), most) for seed in seeds)
    if part == "uneven":
        yield from (Run(part, f"seed {seed}", Start("uneven", seed=seed), uneven) for seed in seeds)
    if part == "ablation":
        yield Run(part, DEFAULTS, first, budget)
        for name in groups:
            yield from (Run(part, label, first, budget, settings) for label, settings in GROUPS[name].items())
    if part == "languages":
        for seed in seeds:
            yield Run(part, f"multilingual text twice, seed {seed}", Start(seed=seed), most, text="languages")
    if part == "chat":
        # Batches are those that `refine` takes for so many tokens.
        always = ("keep_best=false",)
        alone = Start(calibration="chat", seed=seeds[0])
        for label, (epochs, settings) in CHAT.items():
            yield Run(part, label, alone, epochs, (*always, *settings), "chat")


def choose(watched: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the settings of the best of each group by watched divergence, where it is better than the defaults'."""
    found: tuple[str, ...] = ()
    for group in GROUPS.values():
        known = {label: watched[label] for label in group if label in watched}
        best = min(known, key=known.__getitem__, default=None)
        if best is not None and known[best] < (1 - _LEAST_GAIN) * watched[DEFAULTS]:
            # The first group that sets a key keeps it.
            keys = {setting.split("=")[0] for setting in found}
            found += tuple(setting for setting in group[best] if setting.split("=")[0] not in keys)
    return found


def summary(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of results keeps of what `sqjax refine` returned."""
    keys = ("tokens", "step", "start_kl", "best_kl", "best_step", "rollbacks", "seconds", "device", "file_bytes")
    keys += ("bits_per_weight", "sha256", "start_sha256", "windows_sha256", "seed", "peak_memory_bytes")
    keys += ("peak_device_memory_bytes",)
    return {"part": run.part, "label": run.label, "start": run.start.name, "overrides": run.settings} | {
        key: result[key] for key in keys
    }
