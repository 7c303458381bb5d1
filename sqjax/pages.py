"""What every report is made of: tables, figures and conditions, as markdown and as one page that needs no network."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from sqjax import drawing
from sqjax.run import atomic_path

_LINE = 120  # characters


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what it is sorted by; `share` draws a bar behind it, `is_best` sets it in bold."""

    text: str
    value: float | str = ""
    share: float = 0.0
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns, the first of which names the row; the others are numbers unless named in `words`."""

    key: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[list[Cell]]
    words: frozenset[str] = field(default_factory=frozenset)

    @property
    def is_dense(self) -> bool:
        """Whether its longest cells would not stand beside each other in the page's usual type."""
        cells = zip(*([cell.text for cell in row] for row in self.rows))
        return sum(max(map(len, (name, *column))) + 3 for name, column in zip(self.columns, cells)) > _LINE

    def markdown(self) -> str:
        """Returns the table as GitHub shows it."""
        lines = [["" if n == 0 else column for n, column in enumerate(self.columns)]]
        lines += [["---:" if n and column not in self.words else "---" for n, column in enumerate(self.columns)]]
        for row in self.rows:
            lines.append([f"**{_plain(cell.text)}**" if cell.is_best else _plain(cell.text) for cell in row])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{self.caption}\n\n{table}\n"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def number(value: float | None, form: str, **options: Any) -> Cell:
    """Returns a cell with a number in a format; one that is not there is sorted behind all others."""
    return Cell("—", float("inf")) if value is None else Cell(format(value, form), value, **options)


def half(interval: Sequence[float]) -> float:
    """Returns half the width of an interval."""
    return (interval[1] - interval[0]) / 2


def with_interval(value: float, interval: Sequence[float]) -> Cell:
    """Returns a cell with a divergence in nats and half of its interval."""
    return Cell(f"{value:.5f} ± {half(interval):.5f}", value)


@dataclass(frozen=True)
class Figured:
    """A figure as `drawing.draw` returned it, and where it stands.

    Attributes:
      below: key of the table under which it is shown.
      legend: what colours mean, by the names of the page's variables.
    """

    drawn: tuple[bytes, str]
    caption: str
    below: str
    legend: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is told of a result, be it as markdown or as a page."""

    title: str
    summary: str
    tables: Sequence[Table]
    figures: Mapping[str, Figured]
    conditions: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        """Returns everything but the figures themselves, which lie beside it as NAME.png."""
        parts = [f"# {self.title}\n", self.summary + "\n"]
        for table in self.tables:
            parts.append(table.markdown())
            parts += [f"![{one.caption}]({name}.png)\n" for name, one in self._below(table.key).items()]
        parts.append("## Conditions\n\n" + "".join(f"* {name}: {said}\n" for name, said in self.conditions))
        return "\n".join(parts)

    def page(self, template: str, **more: Any) -> str:
        """Returns one HTML page that loads nothing, by a template of this package that may ask for more."""
        return render(template, is_html=True, report=self, below=self._below, inline=drawing.inline, **more)

    def _below(self, key: str) -> dict[str, Figured]:
        return {name: one for name, one in self.figures.items() if one.below == key}

    def write(self, out: Path, template: str, *, ending: str = "", **more: Any) -> dict[str, str]:
        """Writes report.md with an `ending` of its own, report.html, and the figures; returns their paths by kind.

        Raises:
          InputError: the folder cannot be written.
        """
        paths = {"markdown": str(out / "report.md"), "html": str(out / "report.html")}
        for name, one in self.figures.items():
            drawing.save(one.drawn, out / name)
            paths |= {f"{name}.{kind}": str(out / f"{name}.{kind}") for kind in ("png", "svg")}
        with atomic_path(out / "report.md") as path:
            path.write_text("\n".join(filter(None, (self.markdown(), ending))), encoding="utf-8")
        with atomic_path(out / "report.html") as path:
            path.write_text(self.page(template, **more), encoding="utf-8")
        return paths


def visible(text: str) -> str:
    """Returns text whose line ends and tabs are seen, and that a code span can hold."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("`", "'") or "∅"


def render(template: str, *, is_html: bool, **values: Any) -> str:
    """Fills in a template of this package, in HTML with what is special there escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=is_html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = visible
    # A JSON string is a YAML one.
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.get_template(template).render(**values)
