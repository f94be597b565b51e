"""The engine: prompts in, completions out."""

import codecs
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from thyme.engine.core import EngineCore
from thyme.engine.params import Prompt, SamplingParams
from thyme.engine.request import AnyPrompt
from thyme.engine.sequence import Completion, Sequence


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one sequence of a stream."""

    sequence: Sequence
    token_ids: list[int]
    text: str
    """Complete characters only; empty without a processor."""
    completion: Completion | None
    """Set with the last delta of a sequence."""


class Engine(EngineCore):
    """Runs whole requests, all of their steps in one call; for more, and the arguments, see EngineCore."""

    def generate(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[Completion]:
        """Runs prompts to their ends.

        Args:
            prompts: one or many; a list of ints is one prompt.
            params: for all, or one per prompt.

        Returns:
            One completion per prompt and sample, in the prompts' order, the n of a prompt side by side.

        Raises:
            ValueError: a request that cannot be served (see `add`), or sequences from `add` are still unfinished.
        """
        sequences = self._add_all(prompts, params)
        done: dict[int, Completion] = {}
        try:
            while len(done) < len(sequences):
                done |= {completion.sequence.id: completion for completion in self.step()}
        finally:
            self._abort_all(sequences)
        return [done[sequence.id] for sequence in sequences]

    def stream(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """As `generate`, but yields what every step adds. Closing the iterator aborts what is unfinished."""
        sequences = self._add_all(prompts, params)
        decoders = {s.id: codecs.getincrementaldecoder("utf-8")("replace") for s in sequences}
        shown = {s.id: s.prompt_len for s in sequences}
        unfinished = {s.id: s for s in sequences}
        try:
            while unfinished:
                done = {completion.sequence.id: completion for completion in self.step()}
                for sequence in list(unfinished.values()):
                    completion = done.get(sequence.id)
                    ids = sequence.token_ids[shown[sequence.id] :]
                    if not ids and completion is None:
                        continue
                    shown[sequence.id] += len(ids)
                    raw = b"".join(map(self.reader.token_bytes, ids))
                    text = decoders[sequence.id].decode(raw, final=completion is not None)
                    if completion is not None:
                        del unfinished[sequence.id]
                    yield Delta(sequence, ids, text, completion)
        finally:
            self._abort_all(sequences)

    def score(
        self, prompts: Seq[AnyPrompt], token_ids: Seq[Seq[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """What `generate` would have recorded had it drawn these tokens after these prompts, under the present weights.

        Args:
            prompts: several; equal ones share their KV.
            token_ids: for each prompt what follows it, at least one id.
            params: temperatures and banned ids as they were drawn with; the rest does not matter.

        Returns:
            One completion per prompt: the given tokens with their log-probs; finish_reason is LENGTH.

        Raises:
            ValueError: as `add` and `generate` do.
        """
        if self.has_unfinished():
            raise ValueError("score: sequences from `add` are unfinished: step until they end, or abort them")
        params = params or SamplingParams()
        sequences: list[Sequence] = []
        done: dict[int, Completion] = {}
        try:
            for prompt, ids in zip(prompts, token_ids, strict=True):
                # One token more is drawn, and not shown.
                sequences.append(self.add(prompt, replace(params, n=1, max_tokens=len(ids) + 1), forced=ids))
            while len(done) < len(sequences):
                done |= {completion.sequence.id: completion for completion in self.step()}
        finally:
            self._abort_all(sequences)
        return [done[sequence.id].first(len(ids)) for sequence, ids in zip(sequences, token_ids, strict=True)]

    def _add_all(
        self, prompts: Seq[AnyPrompt] | AnyPrompt, params: SamplingParams | Seq[SamplingParams] | None
    ) -> list[Sequence]:
        if self.has_unfinished():
            raise ValueError("generate: sequences from `add` are unfinished: step until they end, or abort them")
        if isinstance(prompts, str | Prompt) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
            listed: list[AnyPrompt] = [prompts]  # type: ignore[list-item]
        else:
            listed = list(prompts)  # type: ignore[arg-type]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            raise ValueError(f"generate: {len(params)} params for {len(listed)} prompts: give one, or one per prompt")
        sequences: list[Sequence] = []
        try:
            for prompt, each in zip(listed, params, strict=True):
                sequences += self.add_group(prompt, each)
        except ValueError:
            self._abort_all(sequences)
            raise
        return sequences

    def _abort_all(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.abort(sequence)
