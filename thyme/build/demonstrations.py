"""From a raw row to a demonstration: read, written, run, held to the rules, judged, laid out as the released set."""

from __future__ import annotations

import asyncio
from typing import Any

from thyme.build.checks import Checks
from thyme.build.config import BuildConfig
from thyme.build.draft import Draft, Writer
from thyme.build.evidence import Check, lacking
from thyme.build.http_writer import HttpWriter
from thyme.build.outcome import Outcome, dropped
from thyme.build.picture_bytes import png
from thyme.build.plan import Item
from thyme.build.prompts import full_turn
from thyme.build.raw import RawRows
from thyme.build.rules import broken_rule, ran_well
from thyme.build.scenarios import Assignment, assign, fraction
from thyme.data.pictures import base64_of
from thyme.data.refusal import BadRow, Refusal


class Demonstrations:
    """Makes demonstrations, one item at a call; calls may overlap.

    Args:
        raw: the rows.
        config: the recipe.
        writer: writes thought and code, and has the code run.
        checks: judges what was written.
        evidence: looks at what the code returned; None: nobody does.
    """

    def __init__(
        self, raw: RawRows, config: BuildConfig, writer: Writer, checks: Checks, evidence: Check | None = None
    ) -> None:
        self._raw, self._config, self._writer, self._checks, self._evidence = raw, config, writer, checks, evidence

    async def outcome(self, item: Item) -> Outcome:
        """What becomes of an item.

        Raises:
            thyme.rewards.judge.JudgeUnavailable: a model gave no answer; the item is to be tried again.
            ValueError: the evidence check does not work.
        """
        name, scenario = self._raw.name(item.row), item.scenario or ""
        if item.scenario is None:
            return dropped(
                item.number, name, "", "read", Refusal("fit for no scenario", "no scenario has a share for it")
            )
        name = f"{scenario}/{name}"
        try:
            raw = await asyncio.to_thread(self._raw.read, item.row)
            assignment = await asyncio.to_thread(assign, raw, item.scenario, self._config.seed)
        except BadRow as error:
            return dropped(item.number, name, scenario, "read", error.refusal)
        refusal = await self._triaged(assignment)
        if refusal is not None:
            return dropped(item.number, name, scenario, "write", refusal)
        try:
            draft = await self._writer.write(assignment)
        except ValueError as error:
            refused = Refusal("refused by the writer", f"{type(error).__name__}: {error}")
            return dropped(item.number, name, scenario, "write", refused)
        if not draft.text:
            return dropped(item.number, name, scenario, "write", Refusal("nothing written", "an empty answer"))
        if (refusal := ran_well(draft)) is not None:
            return dropped(item.number, name, scenario, "sandbox", refusal)
        if (refusal := await asyncio.to_thread(broken_rule, assignment, draft)) is not None:
            return dropped(item.number, name, scenario, "rules", refusal)
        if (refusal := await self._checks.refusal(assignment, draft)) is not None:
            return dropped(item.number, name, scenario, "judge", refusal)
        if self._evidence is not None and (why := await lacking(self._evidence, assignment, draft)) is not None:
            return dropped(item.number, name, scenario, "evidence", Refusal(why.partition(":")[0][:40], why))
        waits = fraction(self._config.seed, "review", name) < self._config.review
        row = await asyncio.to_thread(released_row, assignment, draft)
        return Outcome(
            item=item.number,
            id=name,
            scenario=scenario,
            state="review" if waits else "kept",
            split=assignment.kind.split,
            row=row,
        )

    async def _triaged(self, assignment: Assignment) -> Refusal | None:
        """What a writer that sees says of an operation that is useful, held against the scenario."""
        is_asked = self._config.triage and self._config.prompt == "scenario" and isinstance(self._writer, HttpWriter)
        if not is_asked or assignment.scenario not in ("no_code", "operations") or assignment.image is None:
            return None
        assert isinstance(self._writer, HttpWriter)
        found = await self._writer.triage(assignment)
        if found is None:
            return Refusal("no triage", "the writer did not say which operation the picture needs")
        if (found == -1) != (assignment.scenario == "no_code"):
            return Refusal("another kind by triage", f"operation {found}, in scenario {assignment.scenario}")
        return None


def released_row(assignment: Assignment, draft: Draft) -> dict[str, Any]:
    """A row of the released SFT set, {image, question, response}, and by which scenario and raw row: source, id."""
    image = assignment.image
    own = [] if image is None else [assignment.data or png(image)]
    return {
        "image": [base64_of(data) for data in (*own, *map(png, draft.images))],
        "question": full_turn(assignment) if image is None else f"<image>\n{full_turn(assignment)}",
        "response": draft.text,
        "source": assignment.scenario,
        "id": assignment.id,
    }
