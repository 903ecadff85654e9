"""One self-contained HTML page from Markdown: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, MutableMapping, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #23272e; --quiet: #6a7079; --line: #e3e4e6;
        --shade: #f4f4f2; --accent: #2b67a8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #d9dce0; --quiet: #969ca6; --line: #2f3338;
          --shade: #1e2125; --accent: #7fb2e8; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 650; margin: 3rem 0 0.75rem; padding-top: 1rem;
     border-top: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 0.5rem; }
p, li { overflow-wrap: break-word; }
p, ul, .table, pre { margin: 0 0 1rem; }
em { color: var(--quiet); font-style: normal; font-size: 0.92em; }
blockquote { margin: 0 0 1.5rem; padding: 0.9rem 1.2rem; background: var(--shade);
             border-left: 3px solid var(--accent); border-radius: 0 6px 6px 0; font-size: 1.08rem; }
blockquote p { margin: 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
            font-size: 0.86em; }
code { background: var(--shade); border-radius: 4px; padding: 0.1em 0.3em; overflow-wrap: anywhere; }
pre { background: var(--shade); border-radius: 6px; padding: 0.9rem 1.1rem; line-height: 1.5;
      white-space: pre-wrap; overflow-wrap: anywhere; }
pre code { background: none; padding: 0; font-size: 1em; }
pre b { font-weight: 700; color: var(--accent); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.94rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1.4rem 0.35rem 0;
         border-bottom: 1px solid var(--line); }
th:empty { padding: 0; }
td strong { font-weight: 600; }
th { font-weight: 600; color: var(--quiet); white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
td strong { color: var(--accent); }
.figure { display: block; overflow-x: auto; }
.figure img { display: block; width: 100%; min-width: 34rem; height: auto; }
@media (max-width: 40rem) {
  main { padding: 1.75rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding-right: 0.9rem; }
}
@media print { body { background: none; } main { max-width: none; padding: 0; } h2 { break-after: avoid; } }
"""


def page(markdown: str, *, title: str, pictures: Mapping[str, str]) -> str:
    """The Markdown as one HTML page.

    pictures: image name in the Markdown -> SVG text; they are embedded as data URIs.
    Raw HTML in the Markdown is shown, never interpreted. A block fenced with the info string `text prompt=N`
    has its first N characters in bold. Raises ValueError for an image that is not among the pictures.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=Renderer).enable("table")
    body = parser.render(markdown, {"pictures": pictures})
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


class Renderer(RendererHTML):
    """markdown-it's renderer with embedded pictures, scrolling tables and marked prompts."""

    def image(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """The picture as a data URI, in a box of its own that scrolls where the screen is narrow."""
        name, caption = str(tokens[index].attrs["src"]), tokens[index].content
        if name not in env["pictures"]:
            raise ValueError(
                f"page: picture {name!r} is not embedded; expected one of {sorted(env['pictures'])}"
            )
        encoded = base64.b64encode(env["pictures"][name].encode()).decode()
        source = f"data:image/svg+xml;base64,{encoded}"
        return f'<span class="figure"><img alt="{escape(caption)}" src="{source}"></span>'

    def fence(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """A code block; its first N characters in bold where the info string says `prompt=N`."""
        content = tokens[index].content.removesuffix("\n")
        _, _, length = tokens[index].info.partition("prompt=")
        split = int(length) if length.isdigit() else 0
        prompt = f"<b>{escape(content[:split])}</b>" if split else ""
        return f"<pre><code>{prompt}{escape(content[split:])}</code></pre>\n"

    def table_open(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """A table scrolls inside its own box where the screen is narrow."""
        return '<div class="table"><table>\n'

    def table_close(
        self, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """The end of `table_open`."""
        return "</table></div>\n"
