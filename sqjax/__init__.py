"""Qwen3.5 checkpoints as pure Q4_K_M GGUF files that behave like BF16."""

from typing import Any

# The commands, as functions; they and JAX are imported when one is first used.
_STAGES = (
    *("baselines", "calibrate", "compare", "convert", "demo", "evaluate", "inspect", "make", "plan", "publish"),
    *("quantize", "refine", "sweep"),
)

__all__ = ["InputError", *_STAGES]


def __getattr__(name: str) -> Any:
    if name == "InputError":
        from sqjax.run import InputError

        return InputError
    if name in _STAGES:
        from sqjax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'sqjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
