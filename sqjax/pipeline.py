"""The whole way on the embedded model, and the stages under the names of the commands.

checkpoint -> model -> statistics -> problem -> scales, rounding -> refinement -> GGUF -> evaluation -> report
"""

import shutil
import time
from pathlib import Path
from typing import Any

from sqjax import comparison, ggml, making, measuring, plans, publishing, sweeping
from sqjax.buckets import mirrored
from sqjax.planning import TOPOLOGIES, plan
from sqjax.sources import DEFAULT_SUITE, DEMO_MODEL, SUITES

__all__ = [
    "TOPOLOGIES",
    "baselines",
    "calibrate",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "inspect",
    "make",
    "plan",
    "publish",
    "quantize",
    "refine",
    "sweep",
]

# Files and folders of every command may lie in an object store.
baselines = mirrored(ggml.baselines, "model", "out", "statistics")
calibrate = mirrored(making.calibrate, "model", "out", "imatrix")
compare = mirrored(comparison.compare, "reference", "out", "statistics")
convert = mirrored(making.convert, "model", "out")
evaluate = mirrored(measuring.evaluate, "file", "reference")
inspect = mirrored(measuring.inspect, "file")
make = mirrored(plans.make, "model", "out")
publish = mirrored(publishing.publish, "file", "reference", "out")
quantize = mirrored(making.quantize, "model", "out", "statistics")
refine = mirrored(making.refine, "model", "file", "out", "run")
sweep = mirrored(sweeping.sweep, "model", "out", "best")

_DEMO_FILES = {
    "BF16": "bf16",
    "Q4_K, plain rounding": "q4_k",
    "Q4_K, spectral": "spectral",
    "Q4_K, spectral, refined": "refined",
}
_DEMO_SETTINGS = ("sequential=false", 'steps=["feedback", "descend_codes"]', 'embedding_steps=["feedback"]')
# Sixteen updates: hard codes at ten times the rate that is right for thousands.
_DEMO_REFINEMENT = (
    *("softness=0.0", "codes_rate=0.06", "warmup=2", "length=256", "batch=4"),
    *("watch_windows=12", "watch_every=100"),
)


def demo(out: str | Path = "runs/demo") -> dict[str, Any]:
    """Runs the pipeline on the embedded model: statistics, rounding, a short refinement, export, read back, evaluation.

    Calibrates on a little of calib360 and evaluates on text of neither: the first conversations of heldout120 and
    demo.txt. Rounding leaves out what a first run would mostly wait for the compiler for.

    Returns `files`: for each file that was written what `compare` says of it, `report`: the paths of its report by
    kind, and `seconds`.

    Raises:
      InputError: the folder cannot be written.
    """
    start = time.monotonic()
    out = Path(out)
    paths = {name: out / f"demo8.{kind}.gguf" for name, kind in _DEMO_FILES.items()}
    convert(DEMO_MODEL, paths["BF16"], type="bf16")
    convert(DEMO_MODEL, paths["Q4_K, plain rounding"], type="q4_k")
    # A folder of statistics is made anew: a demonstration shows the whole way.
    shutil.rmtree(out / "statistics", ignore_errors=True)
    calibrate(DEMO_MODEL, out / "statistics", tokens=12_000, length=256)
    spectral, refined = paths["Q4_K, spectral"], paths["Q4_K, spectral, refined"]
    quantize(DEMO_MODEL, spectral, statistics=out / "statistics", settings=_DEMO_SETTINGS)
    shutil.rmtree(f"{refined}.run", ignore_errors=True)
    refine(DEMO_MODEL, spectral, refined, tokens=16_384, settings=_DEMO_REFINEMENT)
    result = compare(
        list(paths.values()),
        reference=DEMO_MODEL,
        text=DEFAULT_SUITE,
        out_of_domain=SUITES / "demo.txt",
        length=256,
        windows=16,
        disagreements=8,
        statistics=out / "statistics",
        out=out / "report",
    )
    files = {name: result["files"][path.name] for name, path in paths.items()}
    return {"files": files, "report": result["report"], "seconds": time.monotonic() - start}
