"""The page of a report: sections, figures and tables as one HTML file that needs nothing else.

Beside each figure stands its data as a table, for people who do not see it and for paper.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moeplace.compare import printable


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table in text: its caption, heads and rows; `layers` where each row is a layer."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    layers: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A question, its answer in words, and what shows it."""

    anchor: str
    title: str
    answer: str
    body: str


class Page:
    """An HTML page that grows by sections and figures."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.sections: list[Section] = []
        self.stored: dict[str, str] = {}

    def store(self, name: str, figure: Any) -> None:
        """Keep a figure's data under a name; the page's script draws it."""
        # A figure's text could close the script element that holds it.
        self.stored[name] = figure.to_json().replace("<", "\\u003c").replace("&", "\\u0026")

    def plot(
        self, name: str, figure: Any, alt: str, caption: str, table: Table, layers: str = ""
    ) -> str:
        """A figure with its caption and its data; `layers`: its axes that count layers."""
        self.store(name, figure)
        drawing = self.drawing(name, alt, layers, int(figure.layout.height))
        return (
            f"<figure>{drawing}<figcaption>{escaped(caption)}</figcaption></figure>{folded(table)}"
        )

    @staticmethod
    def drawing(name: str, alt: str, layers: str, height: int) -> str:
        """The place where a stored figure is drawn."""
        return (
            f'<div class="plot" id="plot-{name}" data-figure="{name}" data-layers="{layers}" '
            f'role="img" aria-label="{escaped(alt)}" style="height:{height}px"></div>'
        )

    def html(self, head: str, tools: str) -> str:
        """The whole page."""
        from plotly.offline import get_plotlyjs

        links = "".join(f'<li><a href="#{s.anchor}">{escaped(s.title)}</a></li>'
                        for s in self.sections)  # fmt: skip
        body = "".join(
            f'<section aria-labelledby="{s.anchor}"><h2 id="{s.anchor}">{escaped(s.title)}</h2>'
            f'<p class="answer">{s.answer}</p>{s.body}</section>'
            for s in self.sections
        )
        data = "".join(f'<script type="application/json" id="data-{name}">{text}</script>\n'
                       for name, text in self.stored.items())  # fmt: skip
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{escaped(self.title)}</title><style>{_asset('report.css')}</style></head>\n"
            '<body><a class="skip" href="#main">Skip to the answers</a>'
            f"<header><h1>{escaped(self.title)}</h1>{head}"
            f'<nav aria-label="Questions"><ol>{links}</ol></nav></header>\n'
            "<noscript><p>Figures need JavaScript; every table below does not.</p></noscript>"
            f'<main id="main">{tools}{body}</main>\n{data}'
            f"<script>{get_plotlyjs()}</script>\n<script>{_asset('report.js')}</script>"
            "</body></html>\n"
        )


def layer_filter(layers: int) -> str:
    """Two boxes that say which layers figures and tables show."""
    return (
        '<form class="tools" onsubmit="return false"><label>Layers from '
        f'<input id="from" type="number" min="0" max="{layers - 1}" value="0"></label>'
        f'<label>to <input id="to" type="number" min="0" max="{layers - 1}" '
        f'value="{layers - 1}"></label><button id="all" type="button">All layers</button>'
        f'<span id="shown" role="status">layers 0 to {layers - 1} shown</span></form>'
    )


def table(given: Table, *, words: bool = False) -> str:
    """A table in a box that scrolls, reachable by keyboard."""
    heads = "".join(f'<th scope="col">{escaped(head)}</th>' for head in given.heads)
    top = f"<thead><tr>{heads}</tr></thead>" if any(given.heads) else ""
    rows = []
    for row in given.rows:
        mark = f' data-layer="{row[0]}"' if given.layers else ""
        first, *rest = row
        cells = f'<th scope="row">{escaped(first)}</th>'
        kind = ' class="words"' if words else ""
        cells += "".join(f"<td{kind}>{escaped(text)}</td>" for text in rest)
        rows.append(f"<tr{mark}>{cells}</tr>")
    label = escaped(given.caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f"<table><caption>{label}</caption>{top}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def folded(given: Table) -> str:
    """A table that opens at a click or key."""
    return (
        f"<details><summary>{escaped(given.caption)}, as a table</summary>{table(given)}</details>"
    )


def escaped(text: str) -> str:
    """Text as HTML."""
    return html.escape(printable(text))


def _asset(name: str) -> str:
    return resources.files("moeplace").joinpath("assets", name).read_text(encoding="utf-8")
