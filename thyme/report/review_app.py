"""The server of `thyme data review`: rows one by one, their code run again, decisions kept."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from thyme.report.decisions import Decision, Decisions, agreements
from thyme.report.page import REVIEW, linked_page
from thyme.report.picture_store import PictureStore
from thyme.report.review_row import IMAGE, ReviewRow, RowPictures, compared, review_view, rounds_of
from thyme.report.web import answered, application, json_answer, page_answer, picture_answer
from thyme.sandbox import SandboxResult

LONGEST_BODY = 4 * 1024**2
"""Bytes of a request."""
MOST_LISTED = 100
"""Rows of one answer."""
LONGEST_QUESTION = 120
"""Characters of a question in the list."""

Rerun = Callable[[ReviewRow, Sequence[str]], Sequence[SandboxResult]]
"""Runs code blocks in one session that sees the row's pictures."""
Problems = Callable[[str], Sequence[str]]
"""What training would refuse of a response, in words."""


class _Name(NamedTuple):
    """What a list shows of a row."""

    place: str
    question: str
    digest: str


class Review:
    """What one reviewer looks at.

    Args:
        rows: any of them by its index.
        title: what they are.
        summary: in words, what was left out of them.
        decisions: where decisions go.
        reviewer: whose they are.
        rerun: how code is run; None: it is not, and `why_not` says why.
        problems: of a response.
    """

    def __init__(
        self,
        rows: Sequence[ReviewRow],
        *,
        title: str,
        summary: str,
        decisions: Decisions,
        reviewer: str,
        rerun: Rerun | None,
        problems: Problems,
        why_not: str = "",
    ) -> None:
        self.rows, self.title, self.summary = rows, title, summary
        self.decisions, self.reviewer = decisions, reviewer
        self.rerun, self.problems, self.why_not = rerun, problems, why_not
        self.pictures = RowPictures()
        self._names: dict[int, _Name] = {}

    def described(self) -> dict[str, Any]:
        """Counts and agreement."""
        words = self.decisions.latest()
        return {
            "title": self.title,
            "summary": self.summary,
            "reviewer": self.reviewer,
            "rows": len(self.rows),
            "decided": sum(self.reviewer in said for said in words.values()),
            "can_rerun": self.rerun is not None,
            "why_not": self.why_not,
            "agreement": [agreement._asdict() for agreement in agreements(words)],
        }

    def listed(self, first: int, count: int) -> list[dict[str, str]]:
        """Rows as a list shows them: `place`, `question` in short, and `verdict` of this reviewer, "" where there is
        none. A row goes by what it shows, so each is read once.

        Raises:
            ValueError: more than `MOST_LISTED` of them.
        """
        if not 0 <= count <= MOST_LISTED:
            raise ValueError(f"{count} rows are asked for: at most {MOST_LISTED}")
        words = self.decisions.latest()
        names = [self._name(index) for index in range(max(0, first), min(first + count, len(self.rows)))]
        own = [words.get(name.digest, {}).get(self.reviewer) for name in names]
        return [
            {"place": name.place, "question": name.question, "verdict": "" if word is None else word.verdict}
            for name, word in zip(names, own, strict=True)
        ]

    def next_open(self, after: int) -> int | None:
        """The next row that this reviewer has not decided, behind `after` and then from the first on; None where there
        is none."""
        own = {row for row, said in self.decisions.latest().items() if self.reviewer in said}
        around = ((after + step) % len(self.rows) for step in range(1, len(self.rows) + 1))
        return next((index for index in around if self._name(index).digest not in own), None)

    def _name(self, index: int) -> "_Name":
        if index not in self._names:
            row = self.rows[index]
            self._names[index] = _Name(row.place, row.question.question[:LONGEST_QUESTION], row.digest)
        return self._names[index]

    def row(self, index: int) -> dict[str, Any]:
        """One row with this reviewer's decision, and those of others once there is one: a second opinion is only one
        where it was formed without the first."""
        row = self.rows[index]
        said = self.decisions.latest().get(row.digest, {})
        own = said.get(self.reviewer)
        response = own.response if own is not None and own.response is not None else row.response
        others = [_as_json(word) for word in said.values() if word.reviewer != self.reviewer]
        return {
            "index": index,
            "place": row.place,
            "view": review_view(row, self.pictures, response),
            "response": response,
            "original": row.response,
            "own": None if own is None else _as_json(own),
            "others": others if own is not None else [],
            "num_others": len(others),
            "problems": list(self.problems(response)),
        }

    def run_again(self, index: int, response: str | None) -> dict[str, Any]:
        """The code of a row, or of an edited response, run in the sandbox.

        Raises:
            ValueError: code cannot be run here.
        """
        if self.rerun is None:
            raise ValueError(f"code is not run here: {self.why_not}")
        row = self.rows[index]
        text = row.response if response is None else response
        codes = [part.code for part in rounds_of(text) if part.code is not None]
        results = self.rerun(row, codes)
        return {"rounds": compared(row, text, results, self.pictures), "codes": len(codes)}

    def decide(self, index: int, said: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a decision.

        Raises:
            ValueError: it is none, or an edit that training would refuse.
        """
        row, verdict, response = self.rows[index], said.get("verdict"), said.get("response")
        if verdict == "edit":
            if not isinstance(response, str) or response == row.response:
                raise ValueError("an edit needs a response that differs from the row's")
            problems = list(self.problems(response))
            if response.count(IMAGE) != len(row.images):
                problems.append(
                    f"it has {response.count(IMAGE)} marks {IMAGE} for the row's {len(row.images)} pictures"
                )
            if problems:
                raise ValueError(f"training would refuse this: {'; '.join(problems)}")
        decision = Decision(
            row=row.digest,
            place=row.place,
            reviewer=self.reviewer,
            verdict=verdict,  # type: ignore[arg-type]  # checked where it is added
            response=response if verdict == "edit" else None,
            note=str(said.get("note") or "")[:2000],
        )
        self.decisions.add(decision)
        return self.row(index)


def review_app(review: Review, host: str = "127.0.0.1") -> Starlette:
    """The application."""

    def index_of(request: Request) -> int:
        index = int(request.path_params["index"])
        if index >= len(review.rows):
            raise KeyError(f"row {index}")
        return index

    def posted(act: Callable[[int, Mapping[str, Any]], Any]) -> Callable[[Request], Any]:
        async def handler(request: Request) -> Response:
            """JSON only: a form of another site cannot send that."""
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return json_answer({"error": "send JSON (application/json)"}, 415)
            body, size = bytearray(), 0
            async for part in request.stream():  # to its end: a client hears an answer only when it has sent all
                size += len(part)
                body += part if size <= LONGEST_BODY else b""
            if size > LONGEST_BODY:
                return json_answer({"error": f"more than {LONGEST_BODY} bytes"}, 413)
            try:
                said = json.loads(body)
                if not isinstance(said, dict):
                    raise ValueError("a JSON object is needed")
                return json_answer(await run_in_threadpool(act, index_of(request), said))
            except KeyError as error:
                return json_answer({"error": f"there is no {error.args[0]}"}, 404)
            except ValueError as error:
                return json_answer({"error": str(error)}, 400)

        return handler

    def again(index: int, said: Mapping[str, Any]) -> Any:
        response = said.get("response")
        return review.run_again(index, response if isinstance(response, str) else None)

    def listed(request: Request) -> Any:
        return review.listed(request.path_params["first"], request.path_params["count"])

    store = PictureStore(review.pictures)
    return application(
        [
            Route("/", lambda _: page_answer(linked_page(f"{review.title} - thyme data review", REVIEW))),
            Route("/api/review", answered(lambda _: review.described())),
            Route("/api/rows/{first:int}/{count:int}", answered(listed)),
            Route("/api/next/{index:int}", answered(lambda request: review.next_open(index_of(request)))),
            Route("/api/row/{index:int}", answered(lambda request: review.row(index_of(request)))),
            Route("/api/row/{index:int}/run", posted(again), methods=["POST"]),
            Route("/api/row/{index:int}/decide", posted(review.decide), methods=["POST"]),
            Route("/picture/{run}/{name}", lambda request: picture_answer(request, store)),
        ],
        host,
    )


def _as_json(decision: Decision) -> dict[str, Any]:
    return {
        "reviewer": decision.reviewer,
        "verdict": decision.verdict,
        "response": decision.response,
        "note": decision.note,
        "at": decision.at,
    }
