"""The report's two pages, Markdown and HTML, from the same sections.

In: sections of Markdown with plots. Out: `report.md`, which shows the plots as files beside it, and
`report.html`, one file that brings everything along: style sheet and plots inside, no script, nothing fetched (a
content security policy forbids it, should a text get past the escaping). Markdown is read by markdown-it with raw
HTML, links and images off, so no text can bring any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.core.report_plots import Plot
from pipelines.core.report_text import words

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for section in sections -%}
{% if section.folded -%}
<details><summary><h2>{{ section.title }}</h2></summary>
{{ section.body }}</details>
{% else -%}
<section><h2>{{ section.title }}</h2>
{{ section.body }}
{%- if section.plots %}<div class="plots">
{% for plot in section.plots -%}
<figure>
{{ plot.svg }}<figcaption>{{ plot.caption }}</figcaption>
</figure>
{% endfor -%}
</div>
{% endif -%}
</section>
{% endif -%}
{% endfor -%}
</main>
</body>
</html>
"""
STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #ffffff; --line: #d8dee4; --shade: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4ae; --paper: #14181d; --line: #343b43; --shade: #1e242b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; margin: 1rem 0 0; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .4rem; }
h4, h5, h6 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
table { display: block; max-width: 100%; overflow-x: auto; border-collapse: collapse; margin: .8rem 0; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .88rem; white-space: nowrap; }
td { overflow-wrap: normal; }
td[style] { white-space: nowrap; }
td, li { font-variant-numeric: tabular-nums; }
code, pre { font: .86em/1.5 ui-monospace, monospace; background: var(--shade); border-radius: 4px; }
code { padding: .1em .3em; white-space: pre-wrap; }
pre { padding: .8rem 1rem; overflow-x: auto; overflow-wrap: normal; }
pre code { padding: 0; font-size: 1em; white-space: pre; }
blockquote { margin: .8rem 0; padding: .1rem 1rem; border-left: 4px solid #3b82c4; background: var(--shade); }
summary { cursor: pointer; } summary h2 { display: inline-block; border: 0; margin: 1.2rem 0 .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; color: var(--ink); }
figcaption { color: var(--soft); font-size: .88rem; }
@media print { body { font-size: 11px; } figure, tr { break-inside: avoid; } }
"""


class Section(NamedTuple):
    """A part of the report. `body` is Markdown in which everything that comes from data is escaped."""

    title: str
    body: str
    plots: tuple[Plot, ...] = ()
    folded: bool = False  # in HTML closed until somebody opens it; it has no plots


def markdown(title: str, sections: Sequence[Section], folder: str) -> str:
    """The report as one Markdown page; plots are looked for in `folder` beside it."""
    parts = [f"# {words(title)}"]
    for section in sections:
        parts += [f"## {words(section.title)}", section.body]
        parts += [
            f"![{words(plot.caption)}]({folder}/{plot.name}.svg)\n\n{words(plot.caption)}" for plot in section.plots
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """The report as one HTML page that needs no other file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    shown = [
        {
            "title": section.title,
            "body": Markup(_rendered(section.body)),
            "plots": [{"caption": plot.caption, "svg": Markup(plot.svg)} for plot in section.plots],
            "folded": section.folded,
        }
        for section in sections
    ]
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE)
    return template.render(title=title, sections=shown, style=Markup(STYLE))


def _rendered(text: str) -> str:
    """Markdown as HTML, with nothing in it that a browser would fetch, follow or run."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])
    return str(reader.render(text))
