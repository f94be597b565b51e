"""A recorded rollout as a page shows it: rounds with their parts, pictures with regions, tokens with what is known of
each. Rows of older versions lack some of it; what is missing is said in `notes`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from thyme.report.crops import CropReader
from thyme.report.picture_store import Pictures
from thyme.report.regions import find_region
from thyme.report.rollout_summary import mismatch_of, summary_of, token_mismatches
from thyme.rollout.types import TokenKind

Spelling = Callable[[int], bytes]
"""What a token id adds to the text; b"" for a special token. ValueError for an id that the vocabulary lacks."""

TOKEN_COLUMNS = {
    "kinds": "kind",
    "rounds": "round",
    "sampled": "sampled",
    "temperatures": "temperature",
    "logprobs": "logprob",
    "logprobs_raw": "raw",
    "entropies": "entropy",
    "weight_versions": "version",
}
"""Per-token lists of a record -> what a page calls them."""

_PARTS = re.compile(r"(<code>[\s\S]*?(?:</code>|$))|(<answer>[\s\S]*?(?:</answer>|$))")


def rollout_view(row: Mapping[str, Any], pictures: Pictures, spelling: Spelling | None) -> dict[str, Any]:
    """What is shown of a row.

    Args:
        row: a parsed line of a file of rollouts.
        pictures: of the run.
        spelling: of the model that drew the tokens; None: ids are shown in place of text.

    Raises:
        ValueError: the row is no rollout.
    """
    notes: list[str] = []
    tokens = row.get("tokens")
    sampled = tokens.get("sampled", []) if isinstance(tokens, Mapping) else []
    summary = summary_of(row, sum(map(bool, sampled)), mismatch_of(tokens))
    question = row["question"]
    told = told_pictures(question)
    shown = _Shown(pictures, notes)
    if question.get("image_path") and not told:
        notes.append(
            "the question's picture is not there: held-out ones come when the evaluation ends, a benchmark's while its "
            "eval.picture_gib lasts"
        )
    sources = {path: picture for path, name in told if (picture := shown.load(name)) is not None}
    reader = CropReader({path: picture.size for path, picture in sources.items()})
    rounds = []
    for number, turn in enumerate(row["turns"]):
        if not isinstance(turn, Mapping):
            notes.append(f"round {number + 1} is no round and is left out")
            continue
        rounds.append(_round(turn, reader, sources, dict(told), shown, number))
    return {
        "group": summary.group,
        "index": summary.index,
        "seed": str(row.get("seed", "")),
        "status": summary.status,
        "answer": row.get("answer"),
        "right": summary.right,
        "mismatch": summary.mismatch,
        "num_tokens": summary.tokens,
        "wall_s": row.get("wall_s"),
        "sandbox_s": row.get("sandbox_s"),
        "has_ended": summary.has_ended,
        "rewards": _rewards(row.get("rewards")),
        "question": {
            "id": summary.question_id,
            "text": str(question.get("question", "")),
            "solution": str(question.get("solution", "")),
            "scenario": summary.scenario,
            "meta": question.get("meta") or {},
            "pictures": [shown.described(name) | {"path": path} for path, name in told],
        },
        "rounds": rounds,
        "tokens": _tokens(tokens, spelling, notes),
        "notes": notes,
    }


def told_pictures(question: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(path, name) of every picture of a question; rows of older versions know one."""
    if not question.get("image"):
        return []
    more = question.get("more_images") or ()
    return [
        (str(question.get("image_path") or "image.png"), str(question["image"])),
        *((str(p), str(n)) for p, n in more),
    ]


def text_parts(text: str) -> list[dict[str, str]]:
    """What the model wrote, cut into thought, code and answer, tags included."""
    parts, at = [], 0
    for match in _PARTS.finditer(text):
        parts.append(("thought", text[at : match.start()]))
        parts.append(("code" if match[1] is not None else "answer", match[0]))
        at = match.end()
    parts.append(("thought", text[at:]))
    return [{"kind": kind, "text": part} for kind, part in parts if part.strip()]


class _Shown:
    """Pictures by name, each decoded once; one that is missing is said once."""

    def __init__(self, pictures: Pictures, notes: list[str]) -> None:
        self._pictures, self._notes = pictures, notes
        self._loaded: dict[str, Image.Image | None] = {}

    def load(self, name: str) -> Image.Image | None:
        if name not in self._loaded:
            try:
                self._loaded[name] = self._pictures.get(name)
            except (OSError, ValueError) as error:
                self._loaded[name] = None
                self._notes.append(str(error))
        return self._loaded[name]

    def described(self, name: str) -> dict[str, Any]:
        picture = self.load(name)
        size = {"missing": True} if picture is None else {"width": picture.width, "height": picture.height}
        return {"name": name, **size}


def _round(
    turn: Mapping[str, Any],
    reader: CropReader,
    sources: dict[str, Image.Image],
    names: dict[str, str],
    shown: _Shown,
    number: int,
) -> dict[str, Any]:
    """One round; pictures that its code returned become sources of later ones."""
    code, result = turn.get("code"), turn.get("result")
    out: dict[str, Any] = {
        "parts": text_parts(str(turn.get("text", ""))),
        "code": code,
        "output_text": str(turn.get("output_text", "")),
        "result": None,
    }
    if not isinstance(result, Mapping):
        return out
    crops = reader.read(code) if isinstance(code, str) else []
    returned = []
    for place, name in enumerate(map(str, result.get("images") or ())):
        picture, entry = shown.load(name), shown.described(name)
        if picture is not None:
            region = find_region(picture, crops, sources)
            if region is not None:
                entry["region"] = {
                    "source": names[region.path],
                    "path": region.path,
                    "width": sources[region.path].width,
                    "height": sources[region.path].height,
                    "box": list(region.box),
                    "how": region.how,
                }
            path = f"picture {place + 1} of round {number + 1}"
            sources[path], names[path] = picture, name
        returned.append(entry)
    out["result"] = {
        "status": str(result.get("status", "")),
        "stdout": str(result.get("stdout", "")),
        "error": _error(result.get("error")),
        "fixes": list(_fixes(result.get("fixes"))),
        "pictures": returned,
        "wall_s": result.get("wall_s"),
        "isolation": result.get("isolation", ""),
        "restarted": bool(result.get("restarted")),
    }
    return out


def _fixes(fixes: Any) -> Iterator[str]:
    for fix in fixes or ():
        kind, line, message = [*fix, "", "", ""][:3]
        yield f"line {line}: {message}" if line else str(message or kind)


def _error(error: Any) -> str | None:
    if not error:
        return None
    kind, message, line = [*error, "", "", None][:3]
    return f"{kind}: {message}" + (f" (line {line})" if line else "")


def _rewards(rewards: Any) -> dict[str, Any] | None:
    """Names to values in the order they are added up in, the parts of a function flattened."""
    if not isinstance(rewards, Mapping):
        return None
    flat = {str(name): value for name, value in rewards.items() if not isinstance(value, Mapping)}
    for name, value in rewards.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{part}": number for part, number in value.items()}
    return flat


def _tokens(tokens: Any, spelling: Spelling | None, notes: list[str]) -> dict[str, Any] | None:
    """Columns of all tokens, a run of picture tokens as one; None where none were recorded."""
    ids = tokens.get("token_ids") if isinstance(tokens, Mapping) else None
    if not isinstance(ids, Sequence) or not ids:
        notes.append("no tokens were recorded")
        return None
    lacking = [name for name in TOKEN_COLUMNS if not _is_column(tokens.get(name), len(ids))]
    if lacking:
        notes.append(f"written by another version: the tokens lack {', '.join(lacking)}")
    kinds = tokens["kinds"] if "kinds" not in lacking else [int(TokenKind.TEXT)] * len(ids)
    kept = [t for t in range(len(ids)) if not (t and kinds[t] == kinds[t - 1] == TokenKind.IMAGE)]
    lengths = [end - start for start, end in zip(kept, [*kept[1:], len(ids)], strict=True)]
    texts = [
        f"[picture, {length} tokens]" if kinds[t] == TokenKind.IMAGE else token_text(ids[t], spelling)
        for t, length in zip(kept, lengths, strict=True)
    ]
    columns = {short: tokens[name] for name, short in TOKEN_COLUMNS.items() if name not in lacking}
    mismatches = token_mismatches(tokens)
    if mismatches:
        columns["mismatch"] = mismatches
    picked = {short: [_rounded(column[t]) for t in kept] for short, column in columns.items()}
    picked["kind"] = [_kind_name(kinds[t]) for t in kept]
    return {"id": [ids[t] for t in kept], "text": texts, **picked}


def token_text(token: int, spelling: Spelling | None) -> str:
    """How a token is shown: its text, bytes that are no UTF-8 spelled out, or its id where it has none."""
    if spelling is None:
        return f"[{token}]"
    try:
        return spelling(token).decode(errors="backslashreplace") or f"[{token}]"
    except ValueError:
        return f"[{token}?]"


def _is_column(column: Any, length: int) -> bool:
    return isinstance(column, Sequence) and len(column) == length


def _kind_name(kind: Any) -> str:
    try:
        return TokenKind(kind).name.lower()
    except ValueError:
        return "unknown"


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
