"""Whether the tags of a response are paired, as decoding sees them."""

from __future__ import annotations

import re
from collections.abc import Iterator

PAIRED_TAGS = ("think", "code", "sandbox_output", "answer")

_TAG = re.compile(rf"<(/?)({'|'.join(PAIRED_TAGS)})>")


def tag_problems(response: str) -> Iterator[str]:
    """Tags that are not closed, closed without being open, crossed, or where none may be; in order of appearance.

    Inside of code only `</code>` is a tag, as while decoding: a string may spell the others.
    """
    opened: list[str] = []
    after_code = -1
    for match in _TAG.finditer(response):
        closes, tag = match.group(1) == "/", match.group(2)
        place = f"{match.group()} at character {match.start()}"
        if opened and opened[-1] in ("code", "sandbox_output") and tag != opened[-1]:
            if (opened[-1], closes, tag) == ("code", False, "sandbox_output"):
                yield f"{place} opens inside <code>: close the code before"
            continue
        if not closes:
            if tag in opened:
                yield f"{place} opens inside <{tag}>: remove it"
            elif tag == "sandbox_output" and (after_code < 0 or response[after_code : match.start()].strip()):
                yield f"{place} follows no </code>: an output stands behind the code that made it"
            opened.append(tag)
            continue
        if tag not in opened:
            yield f"{place} closes nothing: remove it"
            continue
        if opened[-1] != tag and tag != "code":
            yield f"{place} crosses <{opened[-1]}>, which is still open: close that first"
        del opened[len(opened) - 1 - opened[::-1].index(tag)]
        after_code = match.end() if tag == "code" else -1
    for tag in dict.fromkeys(opened):
        yield f"<{tag}> is never closed: close it or drop the row"
