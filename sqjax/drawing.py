"""The look of figures: colours, labels beside points, PNG and SVG; on a page their colours follow its reader's."""

import functools
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sqjax.run import atomic_path

# Each colour occurs nowhere else, so that a page can put a variable of its own in its place.
INK, MUTED, RULE, PURE, OTHER, PLAIN = "#1c2127", "#667079", "#dde2e7", "#0a62c2", "#b5520a", "#4d5760"
# Of lines whose order means something, from cold to warm.
LINES = ("#4353c4", "#17808f", "#3f8526", "#957306", "#bf5b12", "#b32a45")
COLOURS = {INK: "ink", MUTED: "muted", RULE: "rule", PURE: "pure", OTHER: "other", PLAIN: "plain"}
COLOURS |= {colour: f"line{number}" for number, colour in enumerate(LINES)}
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "sqjax",
    "figure.constrained_layout.use": True,
}
_LINE_HEIGHT = 12.0  # points between labels


def styled(make: Callable[..., Figure]) -> Callable[..., Figure]:
    """Lets a function make its figure in this look."""

    @functools.wraps(make)
    def run(*arguments, **options):
        with matplotlib.rc_context(_STYLE):
            return make(*arguments, **options)

    return run


def elided(name: str, most: int = 34) -> str:
    """Returns a name without its middle where it is longer than figures have room for."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def plain_log(set_scale: Callable[[str], None], axis: Axis) -> None:
    """Makes an axis logarithmic, with numbers such as 0.02 for labels: over less than a decade powers tell nothing."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_points(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Writes names in a column on the right, in the order of their points, with a line to each.

    Args:
      axes: drawn already, so that places in it are known.
      points: name, x, y and colour of each.
    """
    scale = 72.0 / axes.figure.dpi
    box = axes.get_window_extent()
    heights = [float(axes.transData.transform((x, y))[1] - box.y0) * scale for _, x, y, _ in points]
    order = sorted(range(len(points)), key=lambda index: (-heights[index], -points[index][1]))
    top, placed = box.height * scale + _LINE_HEIGHT / 2, {}
    for index in order:
        top = placed[index] = min(heights[index], top - _LINE_HEIGHT)
    # What was pushed below the axes goes up again, and pushes in turn.
    bottom = 0.0
    for index in reversed(order):
        placed[index] = max(placed[index], bottom)
        bottom = placed[index] + _LINE_HEIGHT
    for index, (name, x, y, colour) in enumerate(points):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.03, placed[index] / (box.height * scale)),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "alpha": 0.7},
        )


def draw(figure: Figure) -> tuple[bytes, str]:
    """Returns a figure as PNG, on white, and as SVG without a ground."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": "sqjax"})
        # The layout is found; finding it again takes longer than drawing.
        figure.set_layout_engine("none")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def save(drawn: tuple[bytes, str], path: Path) -> None:
    """Writes a drawn figure as `path` with .png and .svg, both on white."""
    png, svg = drawn
    svg = re.sub(r"(<svg\b[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)
    for ending, content in ((".png", png), (".svg", svg.encode())):
        with atomic_path(path.with_name(path.name + ending)) as temporary:
            temporary.write_bytes(content)


def inline(svg: str, name: str) -> str:
    """Returns SVG to stand in a page: colours are the page's variables, ids begin with `name`."""
    svg = re.sub(r"^.*?(?=<svg)", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    width = re.search(r'<svg\b[^>]*? width="([\d.]+pt)"', svg).group(1)
    # The figure's caption and the tables say what it shows.
    return svg.replace("<svg ", f'<svg aria-hidden="true" focusable="false" style="--width: {width}" ', 1)
