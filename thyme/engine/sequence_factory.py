"""Makes sequences of what is asked for: of a prompt, of a prompt with forced tokens, of a round of another sequence."""

import secrets
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from thyme.engine.params import SamplingParams
from thyme.engine.phases import CODE, NUMBER, Phases
from thyme.engine.request import AnyPrompt, RequestReader
from thyme.engine.sequence import Forced, RoundStart, Sequence
from thyme.engine.tags import TagAutomaton, TokenKind


class SequenceFactory:
    """Numbers them in the order in which they are made.

    Args:
        reader: of prompts and parameters.
        automaton: of the model's whole vocabulary.
        phases: those it was compiled for.
        is_eos: [V] bool.
    """

    def __init__(
        self, reader: RequestReader, automaton: TagAutomaton, phases: Phases, is_eos: NDArray[np.bool_]
    ) -> None:
        self.reader = reader
        self.automaton = automaton
        self.phases = phases
        self._is_eos = is_eos
        self._num_made = 0

    def group(
        self,
        prompt: AnyPrompt,
        params: SamplingParams,
        hold: bool,
        forced: Seq[int] | None = None,
        written: Iterable[Seq[int]] = (),
    ) -> list[Sequence]:
        """The params.n sequences of a prompt, the others following the first; arguments and errors are those of
        `Engine.add`."""
        first = self.automaton.after(np.asarray(ids, dtype=np.int64) for ids in written)
        begun, begins_in = (None, first) if forced is None else self._forced(forced, params, first)
        tokens = self.reader.tokens(prompt, "add")
        if not len(tokens.token_ids):
            raise ValueError("add: the prompt is empty: give at least one token")
        num_forced = 0 if begun is None else len(begun.token_ids)
        self.reader.check_room(len(tokens.token_ids) + num_forced, "the prompt", "add")
        ban = self.reader.ban_of(params)
        self.phases.check_names(params.phases)
        seed = secrets.randbits(62) if params.seed is None else params.seed
        sequences = [
            Sequence(
                id=self._next_id(),
                index=index,
                params=replace(params, n=1, seed=seed + index),
                prompt=tokens,
                hold=hold,
                ban=ban,
                forced=begun,
                begins_in=begins_in,
                images=list(tokens.images),
                image_starts=list(tokens.image_starts),
                starts=[RoundStart(len(tokens.token_ids), tokens.next_position, first)],
            )
            for index in range(params.n)
        ]
        sequences[0].followers = sequences[1:]
        return sequences

    def branches(
        self, sequence: Sequence, round: int, seeds: Seq[int | None], params: SamplingParams | None
    ) -> list[Sequence]:
        """Sequences that begin where a round of this one began; arguments and errors are those of `Engine.branch`."""
        if not 0 <= round < len(sequence.starts):
            raise ValueError(f"branch: sequence {sequence.id} has rounds 0 to {len(sequence.starts) - 1}, not {round}")
        start = sequence.starts[round]
        if start.begins_in is None:
            raise ValueError(
                f"branch: round {round} of sequence {sequence.id} goes on inside the one before: branch from that"
            )
        params = sequence.params if params is None else params
        ban = self.reader.ban_of(params)
        num_images = sum(first < start.length for first in sequence.image_starts)
        return [
            Sequence(
                id=self._next_id(),
                index=sequence.index,
                params=replace(params, n=1, seed=secrets.randbits(62) if seed is None else seed),
                prompt=sequence.prompt,
                hold=sequence.hold,
                ban=ban,
                begins_in=start.begins_in,
                images=sequence.images[:num_images],
                image_starts=sequence.image_starts[:num_images],
                starts=[replace(known) for known in sequence.starts[: round + 1]],
            )
            for seed in seeds
        ]

    def _forced(self, token_ids: Seq[int], params: SamplingParams, begins_in: int) -> tuple[Forced, int]:
        """The ids with what is known of them, and the automaton's state after them."""
        ids = np.array(self.reader.tokens(list(token_ids), "add").token_ids)
        if not 0 < len(ids) < params.max_tokens:
            raise ValueError(f"add: {len(ids)} forced ids: give at least one, and fewer than max_tokens")
        if params.truncates or params.biases_logprobs:
            raise ValueError("add: forced ids have no log-probs under truncation or a repetition penalty: leave it out")
        kinds, states, state = self.automaton.walk(ids, begins_in)
        kinds[self._is_eos[ids]] = TokenKind.END
        warmth = np.array([each[0] for each in params.by_phase(self.phases)], dtype=np.float32)
        if warmth[NUMBER] != warmth[CODE] and self.automaton.is_place[states].any():
            raise ValueError(
                "add: forced ids have places of numbers in code, whose temperature depends on what the model would "
                "draw there: give numbers and code one temperature"
            )
        phases, after = self.automaton.phases[states], np.append(states[1:], state).astype(np.uint16)
        return Forced(ids, kinds, phases, after, warmth[phases]), state

    def _next_id(self) -> int:
        self._num_made += 1
        return self._num_made - 1
