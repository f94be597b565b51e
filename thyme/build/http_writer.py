"""A writer behind an OpenAI-compatible server: its code is run between two requests, and it goes on from the result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thyme.build.chat import Chat
from thyme.build.draft import Draft, Ran, split_at_code
from thyme.build.picture_bytes import png_uri
from thyme.build.prompts import GO_ON, full_turn, parts, read_triage, triage_prompt, writer_system, writer_turn
from thyme.build.scenarios import Assignment
from thyme.rollout.output import CLOSE, IMAGE, OPEN, content
from thyme.rollout.prompts import SYSTEM_PROMPT
from thyme.sandbox import Status

if TYPE_CHECKING:
    from thyme.sandbox import Sandbox, SandboxResult

MAX_ROUNDS = 6
"""Requests for one demonstration."""
MAX_OUTPUT_CHARS = 4096
"""Printed text beyond this is cut, as in rollouts."""


class HttpWriter:
    """A `Writer` whose model is asked over HTTP and whose code runs in this process's sandbox.

    Args:
        chat: the model.
        sandbox: runs its code, a session a demonstration.
        bare: ask as a rollout does, with the question alone, in place of the scenario's instructions.
    """

    def __init__(self, chat: Chat, sandbox: Sandbox, *, bare: bool = False) -> None:
        self._chat, self._sandbox, self._bare = chat, sandbox, bare

    async def triage(self, assignment: Assignment) -> int | None:
        """Which operation the model finds useful (`thyme.build.prompts.triage_prompt`); None: no such answer."""
        assert assignment.image is not None
        uri = await asyncio.to_thread(png_uri, assignment.image)
        content = parts(triage_prompt(assignment.raw.question), [uri])
        return read_triage(await self._chat.say([{"role": "user", "content": content}]))

    async def write(self, assignment: Assignment) -> Draft:
        system, turn = writer_system(), writer_turn(assignment)
        if self._bare:
            system, turn = SYSTEM_PROMPT, full_turn(assignment)
        return await self._rounds(assignment, system, turn, 0)

    async def answers(self, assignment: Assignment, samples: int) -> Sequence[str | None]:
        turn = full_turn(assignment)
        drafts = (self._rounds(assignment, SYSTEM_PROMPT, turn, sample) for sample in range(samples))
        return [draft.answer for draft in await asyncio.gather(*drafts)]

    async def close(self) -> None:
        await self._chat.close()

    async def _rounds(self, assignment: Assignment, system: str, turn: str, sample: int) -> Draft:
        shown = [] if assignment.image is None else [await asyncio.to_thread(png_uri, assignment.image)]
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": system},
            {"role": "user", "content": parts(turn, shown)},
        ]
        raw, rounds = assignment.raw, list[Ran]()
        session = await asyncio.to_thread(self._sandbox.session, assignment.image, raw.image_path or None)
        try:
            for _ in range(MAX_ROUNDS):
                said, code = split_at_code(await self._chat.say(messages, sample=sample, stop="</code>"))
                if code is None or "</answer>" in said.partition("<code>")[0]:
                    rounds.append(Ran(said, None))
                    break
                ran = self._ran(said, code, await session.arun(code), raw.image_path)
                rounds.append(ran)
                pictures = [await asyncio.to_thread(png_uri, image) for image in ran.images]
                messages += [
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": parts(f"{ran.output}\n\n{GO_ON}", pictures)},
                ]
        finally:
            session.close()
        return Draft(tuple(rounds))

    def _ran(self, said: str, code: str, result: SandboxResult, image_path: str) -> Ran:
        timeout_s = self._sandbox.config.timeout_s
        text = IMAGE * len(result.images) or content(
            result, image_path=image_path, compat="none", max_chars=MAX_OUTPUT_CHARS, timeout_s=timeout_s
        )
        error = "" if result.error is None else f"{result.error.type}: {result.error.message}"
        return Ran(
            said=said,
            code=code,
            ok=result.status is Status.OK,
            stdout=result.stdout.strip(),
            error=error or ("" if result.status is Status.OK else result.status.value),
            images=result.images,
            output=f"{OPEN}{text}{CLOSE}",
        )
