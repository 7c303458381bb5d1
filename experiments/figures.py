"""How figures of experiments look, and the two forms in which they are written."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

COLOURS = ("#0a62c2", "#b5520a", "#3f7d20", "#7a3fa0", "#a01f4c", "#4d5760", "#8a7a00", "#006d77")
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dde2e7",
    "svg.fonttype": "none",
    "svg.hashsalt": "sqjax",
    "figure.constrained_layout.use": True,
}


def save(draw: Callable[[], Figure], folder: Path, name: str) -> None:
    """Writes a figure as PNG and as SVG, without the date, so that the same results give the same bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=160)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
