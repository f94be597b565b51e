"""A request without tools in the engine: what its choices draw, as text."""

import codecs
from collections.abc import Callable, Iterable

from thyme.engine import Completion, Engine, FinishReason, Sequence
from thyme.serve.deltas import Begun, Delta, Drawn, End, Event
from thyme.serve.requests import Asked

FINISH_REASONS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.REPETITION: "length",
    FinishReason.ABORT: "abort",
}


class StopCut:
    """Text as it is drawn, up to a stop text: the beginning of one is held back until it is known to be none. What a
    token has behind a stop text is not shown.

    Args:
        stops: texts that end it.
        keeps: whether the stop text itself is shown.
    """

    def __init__(self, stops: Iterable[str], *, keeps: bool = False) -> None:
        self._stops, self._keeps = tuple(stops), keeps
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far may be shown now and was not yet."""
        text = self._held + text
        held = max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self, text: str, stop: str | None) -> str:
        """The rest, up to the stop text that ended it, if one did."""
        text, self._held = self._held + text, ""
        if stop is None or stop not in text:
            return text
        return text[: text.index(stop) + len(stop) * self._keeps]


class _Choice:
    """One sequence and what of it has been told."""

    def __init__(self, index: int, sequence: Sequence, cut: StopCut) -> None:
        self.index, self.sequence, self.cut = index, sequence, cut
        self.told = sequence.prompt_len
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")


class Generation:
    """The sequences of one request.

    Args:
        asked: the request.
        tell: is given its events, on the engine's thread; must not block.
    """

    def __init__(self, asked: Asked, tell: Callable[[Event], None]) -> None:
        self.asked, self.tell = asked, tell
        self._choices: dict[int, _Choice] = {}

    @property
    def places(self) -> int:
        """Sandbox sessions it needs."""
        return 0

    @property
    def is_over(self) -> bool:
        """Every choice has ended."""
        return not self._choices

    def begin(self, engine: Engine) -> list[int]:
        """Queues its sequences; returns their numbers.

        Raises:
            ValueError: the engine refuses one; none is queued then.
        """
        prompts: list[list[int]] = []
        try:
            for prompt in self.asked.prompts:
                sequences = engine.add_group(prompt, self.asked.params)
                prompts.append(sequences[0].token_ids)
                for sequence in sequences:
                    cut = StopCut(self.asked.params.stop, keeps=self.asked.keep_stop)
                    self._choices[sequence.id] = _Choice(len(self._choices), sequence, cut)
        except ValueError:
            self.abort(engine)
            raise
        self.tell(Begun(tuple(prompts)))
        return list(self._choices)

    def after_step(self, engine: Engine) -> None:
        """Tells what the sequences that go on have drawn, where anybody listens."""
        if self.asked.stream:
            for choice in self._choices.values():
                if drawn := drawn_since(engine, choice.sequence, choice.told):
                    choice.told += len(drawn.token_ids)
                    text = choice.decoder.decode(b"".join(map(engine.reader.token_bytes, drawn.token_ids)))
                    self.tell(Delta(choice.index, content=choice.cut.push(text), drawn=drawn))

    def round_ended(self, engine: Engine, completion: Completion) -> None:
        """Tells the rest of a sequence."""
        choice = self._choices.pop(completion.sequence.id)
        new = slice(choice.told - choice.sequence.prompt_len, None)
        drawn = Drawn(
            completion.token_ids[new], completion.logprobs[new].tolist(), completion.logprobs_raw[new].tolist()
        )
        raw = b"".join(map(engine.reader.token_bytes, drawn.token_ids))
        stop = completion.stop_reason if isinstance(completion.stop_reason, str) else None
        rest = choice.cut.end(choice.decoder.decode(raw, final=True), stop)
        end = End(FINISH_REASONS[completion.finish_reason], _reason(completion), completion=completion)
        self.tell(Delta(choice.index, content=rest, drawn=drawn, end=end))

    def abort(self, engine: Engine) -> None:
        """Ends every sequence now, telling what it has."""
        for choice in list(self._choices.values()):
            completion = engine.abort(choice.sequence)
            if completion is not None:
                self.round_ended(engine, completion)
        self._choices.clear()


def drawn_since(engine: Engine, sequence: Sequence, start: int) -> Drawn | None:
    """What a sequence under way has drawn from its token number `start` on; None where that is nothing."""
    if sequence.row is None:
        return None
    table, row = engine.table, sequence.row
    end = len(sequence)
    if end <= start:
        return None
    logprobs, raw = table.records[row, :2, start:end].tolist()
    return Drawn(table.token_ids[row, start:end].tolist(), logprobs, raw)


def _reason(completion: Completion) -> str | int | None:
    if completion.finish_reason in (FinishReason.CONTEXT, FinishReason.REPETITION, FinishReason.ABORT):
        return completion.finish_reason.value
    return completion.stop_reason
