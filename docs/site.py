"""What mkdocs asks of us: the order of the pages, and links that lead out of docs/."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

FIRST = (
    *("index", "train", "evaluate", "build_data", "profile", "seeing", "serve"),
    *("sandbox", "add_an_op", "performance", "benchmarks"),
)
"""Pages in this order, as far as there are such; all others behind them."""
OUTWARD = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page is in the navigation because it exists."""
    pages = {path.stem for path in Path(config.docs_dir).glob("*.md")}
    config.nav = [f"{name}.md" for name in (*(n for n in FIRST if n in pages), *sorted(pages - set(FIRST)))]
    return config


def on_page_markdown(markdown: str, config: MkDocsConfig, page: object, **_: object) -> str:
    """A file outside of docs/ is no page of the site: its name stays, if there is such a file."""

    def named(found: re.Match[str]) -> str:
        path = Path(config.docs_dir) / found[2]
        if not path.exists():
            raise PluginError(f"{page} links to {found[2]}, which does not exist")
        return found[1] if found[1].startswith("`") else f"`{found[1]}`"

    return OUTWARD.sub(named, markdown)
