"""Imports go strictly downward: each line may import the lines above it, and nothing beside or below."""

import ast
import pathlib

import sqjax

LAYERS = """
run
display run_folder spectra delta_kernels
config q4_k delta_rule conv_kernels texts settings mesh buckets
least_squares
tokens scales objective latent hub
rounding equalize fingerprints snapshots
checkpoint
gguf_metadata
gguf_file
model
statistics evaluation
calibration runtime
cache
folding
quantizer search_space
studies
refinement student
variants updates
distillation sources
programs
aot
planning
drawing
pages
charts
tables
measuring report study_results
study_charts
study_report
making scoring
contributions ggml
comparison
publishing
plans
trials
sweeping
pipeline
commands
cli
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.split("\n")) for name in line.split()}
MODULES = sorted(pathlib.Path(sqjax.__file__).parent.glob("*.py"))


def imported(path):
    """Names of the package's own modules that a file imports, wherever in it, and of foreign packages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"sqjax.{alias.name}" for alias in node.names) if node.module == "sqjax" else (node.module,)


def test_imports_go_downward():
    modules = {path.stem: path for path in MODULES if path.stem != "__init__"}
    assert not modules.keys() - RANK.keys(), "give each new module its place in LAYERS"
    arrows = [
        (name, target.split(".")[1]) for name in modules for target in imported(modules[name]) if "sqjax." in target
    ]
    assert arrows and [(a, b) for a, b in arrows if RANK[b] >= RANK[a]] == []


def test_the_report_needs_no_jax():
    for path in MODULES:
        if path.stem in (
            "drawing",
            "pages",
            "charts",
            "tables",
            "report",
            "study_results",
            "study_charts",
            "study_report",
        ):
            assert not {"jax", "flax"} & {name.split(".")[0] for name in imported(path)}
