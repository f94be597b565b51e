"""The pages' files: scripts and style as they lie in `static/`, and the frame around them."""

import base64
import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from thyme.report.json_text import to_script

SCRIPTS = ("dom.js", "highlight.js", "pictures.js", "cards.js", "list.js", "curves.js", "steps.js")
"""What every page has, in the order they are loaded."""
VIEW, REVIEW = (*SCRIPTS, "scores.js", "view.js"), (*SCRIPTS, "review.js")
STYLE = "style.css"

POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'self'; style-src 'self'; base-uri 'none'"
)
"""Content-Security-Policy of the local pages: no script but our files ever runs, whatever a rollout holds."""


@cache
def asset(name: str) -> str:
    """The text of a script or of the style.

    Raises:
        KeyError: there is none of that name.
    """
    if name != STYLE and name not in {*VIEW, *REVIEW}:
        raise KeyError(name)
    return files("thyme.report").joinpath("static", name).read_text(encoding="utf-8")


def linked_page(title: str, scripts: tuple[str, ...]) -> str:
    """A page that asks its server for everything."""
    tags = "".join(f'<script src="/static/{name}" defer></script>' for name in scripts)
    return _frame(title, f'<link rel="stylesheet" href="/static/{STYLE}">{tags}', "")


def single_page(title: str, data: Any) -> str:
    """A page in one file: script, style and what the server would have answered are inside, nothing is asked for.

    Args:
        title: of the page.
        data: what `dom.js` looks up in place of asking, by address.
    """
    script = "\n".join(asset(name) for name in VIEW)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{asset(STYLE)}</style>'
    embedded = f'<script type="application/json" id="embedded">{to_script(data)}</script>'
    return _frame(title, head, f"{embedded}<script>{script}</script>")


def _frame(title: str, head: str, end: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">{head}</head>'
        f'<body><div id="app"></div>{end}</body></html>\n'
    )
