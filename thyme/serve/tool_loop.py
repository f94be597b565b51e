"""A chat whose code is run: rounds of decoding and of the sandbox, as a rollout has them, one flight per choice."""

from collections.abc import Callable, Sequence

import numpy as np

from thyme.engine import Completion, Engine
from thyme.engine.tags import TokenKind
from thyme.model.processor import Processor
from thyme.rollout.executor import Executor
from thyme.rollout.flight import Flight
from thyme.rollout.trajectory import Trajectory
from thyme.rollout.types import Rollout, RolloutStatus
from thyme.serve.deltas import Begun, Delta, End, Event
from thyme.serve.requests import Asked

_STOPPED = {RolloutStatus.ANSWERED, RolloutStatus.EOS_WITHOUT_ANSWER}


class RoundText:
    """The text of one round as it is decoded, never half a character."""

    def __init__(self, decode: Callable[[Sequence[int]], str], start: int) -> None:
        self._decode, self._told = decode, start
        self.shown = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes all tokens of the sequence so far; returns what is new."""
        piece = self._decode(token_ids[self._told :])
        if piece.endswith("\ufffd"):
            return ""
        self._told = len(token_ids)
        self.shown += piece
        return piece

    def rest(self, text: str) -> str:
        """What is left of the whole round's text."""
        return text[len(self.shown) :]


class ToolLoop:
    """The flights of one request.

    Args:
        asked: the request; its `tools` are set.
        tell: is given its events, on the engine's thread; must not block.
        executor: of the server's sandbox.
        processor: of the model.
        wake: is called, from any thread, when a code block has ended.
    """

    def __init__(
        self,
        asked: Asked,
        tell: Callable[[Event], None],
        *,
        executor: Executor,
        processor: Processor,
        wake: Callable[["ToolLoop"], None],
    ) -> None:
        assert asked.tools is not None
        self.asked, self.tell, self.tools = asked, tell, asked.tools
        self._executor, self._processor, self._wake = executor, processor, wake
        self._flights: dict[int, Flight] = {}
        self._texts: dict[int, RoundText] = {}

    @property
    def places(self) -> int:
        """Sandbox sessions it needs."""
        return self.asked.params.n

    @property
    def is_over(self) -> bool:
        """Every choice has ended."""
        return not self._flights

    def begin(self, engine: Engine) -> list[int]:
        """Queues its sequences; returns their numbers. Raises ValueError where the engine refuses them."""
        (prompt,) = self.asked.prompts
        sequences = engine.add_group(prompt, self.asked.params, hold=True)
        for index, sequence in enumerate(sequences):
            seed = sequence.params.seed
            assert seed is not None
            flight = Flight(
                question=self.tools.question,
                group=0,
                index=index,
                seed=seed,
                sequence=sequence,
                trajectory=Trajectory(self._processor.image_token_id),
                stream=None,
            )
            flight.trajectory.add_given(sequence.token_ids, TokenKind.PROMPT, round_index=0)
            self._flights[sequence.id] = flight
            self._texts[sequence.id] = RoundText(self._processor.decode, len(sequence))
        self.tell(Begun((sequences[0].token_ids,)))
        return list(self._flights)

    def after_step(self, engine: Engine) -> None:
        """Tells what the flights that decode have written, where anybody listens."""
        if self.asked.stream:
            for number, flight in self._flights.items():
                if flight.future is None and (piece := self._texts[number].push(flight.sequence.token_ids)):
                    self.tell(Delta(flight.index, reasoning=piece))

    def round_ended(self, engine: Engine, completion: Completion) -> None:
        """Hands closed code to the sandbox, or ends the choice."""
        flight = self._flights[completion.sequence.id]
        is_text = np.asarray(completion.kinds) != TokenKind.END
        text = self._processor.decode(np.asarray(completion.token_ids)[is_text].tolist())
        status = flight.end_round(completion, text, self.tools.config.max_rounds)
        said = text if status is None else flight.turns[-1].text
        if rest := self._texts[flight.sequence.id].rest(said):
            self.tell(Delta(flight.index, reasoning=rest))
        if status is not None:
            stop = completion.stop_reason
            by_text = stop if isinstance(stop, int) or stop in self.asked.params.stop else None
            self._finish(engine, flight, status, by_text)
            return
        flight.future = self._executor.run(flight.sequence.id, flight.question, flight.seed, flight.code)
        flight.future.add_done_callback(lambda _: self._wake(self))

    def code_ended(self, engine: Engine) -> None:
        """Admits the outputs that have come."""
        for flight in list(self._flights.values()):
            if flight.future is None or not flight.future.done():
                continue
            result, output = flight.future.result()
            flight.future = None
            status = flight.end_code(result, output, self.tools.config, engine.max_context)
            if status is not None:
                self._finish(engine, flight, status, None)
                continue
            config, sequence = self.tools.config, flight.sequence
            self.tell(Delta(flight.index, reasoning=output.text))
            budget = min(config.max_tokens_per_round, config.max_tokens - flight.num_sampled)
            engine.append(sequence, output.token_ids, images=output.images, max_tokens=budget)
            self._texts[sequence.id] = RoundText(self._processor.decode, len(sequence))

    def abort(self, engine: Engine) -> None:
        """Ends every choice now; code that runs is killed."""
        for flight in list(self._flights.values()):
            if flight.future is not None:
                flight.future.cancel()
            completion = engine.abort(flight.sequence)
            if completion is not None:
                is_text = np.asarray(completion.kinds) != TokenKind.END
                text = self._processor.decode(np.asarray(completion.token_ids)[is_text].tolist())
                flight.end_round(completion, text, max_rounds=0)
            self._finish(engine, flight, RolloutStatus.ABORTED, None)

    def _finish(self, engine: Engine, flight: Flight, status: RolloutStatus, by_text: str | int | None) -> None:
        rollout = flight.finished(status)
        engine.release(flight.sequence)
        del self._flights[flight.sequence.id], self._texts[flight.sequence.id]
        self._executor.end(flight.sequence.id)
        reason = "stop" if status in _STOPPED else "abort" if status is RolloutStatus.ABORTED else "length"
        stop = status.value if by_text is None else by_text
        said = said_at_last(rollout, by_text, keeps=self.asked.keep_stop)
        self.tell(Delta(flight.index, content=said, end=End(reason, stop, rollout=rollout)))


def said_at_last(rollout: Rollout, stop: str | int | None, *, keeps: bool) -> str:
    """The answer; where none was given, what the last round said up to the stop text that ended it, with it where it
    `keeps` that."""
    if rollout.answer is not None:
        return rollout.answer
    text = rollout.turns[-1].text if rollout.turns else ""
    if not isinstance(stop, str) or stop not in text:
        return text
    return text[: text.index(stop) + len(stop) * keeps]
