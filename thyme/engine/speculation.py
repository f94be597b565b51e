"""Speculation: a sequence computes several of its next tokens in one step, guessed ones, and keeps those that it draws.

It is exact at any temperature, since what is drawn is a function of logits, seed and position: where the draft is what
would have been drawn, the logits behind it are those of the next step. The sampler draws at every place of a draft
(each in the phase and at the temperature that the automaton has there), and samples count up to the first that
disagrees, that one included. What is written to the cache behind it is written over.

How long a draft is follows how good the last ones of its sequence were: nothing is tried for long that is not drawn.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from thyme.engine.config import EngineConfig
from thyme.engine.drafts import MATCHES, Drafts
from thyme.engine.phases import CODE
from thyme.engine.sequence import Sequence
from thyme.engine.sequence_table import SequenceTable
from thyme.engine.tags import IS_ENDING, TagAutomaton

_FIRST = 4  # tokens of a sequence's first draft


class Speculation:
    """Proposes drafts for the rows that decode, and learns what became of them.

    Args:
        config: which tokens are drafted, how many, and in which steps.
        table: of all live sequences.
        automaton: as the sampler has it.
        is_eos: [V] bool.
    """

    def __init__(
        self, config: EngineConfig, table: SequenceTable, automaton: TagAutomaton, is_eos: NDArray[np.bool_]
    ) -> None:
        self.config = config
        self.table = table
        self.automaton = automaton
        self.drafts = Drafts(config.draft_bytes)
        self.num_drafted = self.num_accepted = self.num_verified = 0
        """Tokens tried, those of them that were drawn, and how often a sequence had a draft."""
        self._is_eos = is_eos
        self._reach: dict[int, int] = {}  # by id: tokens of the next draft; 0: only where much agrees

    def propose(self, rows: NDArray[np.int64], num_running: int) -> Iterator[tuple[int, list[int], list[int]]]:
        """(place in `rows`, drafted tokens, state of the automaton after each) of the rows, each of which lacks one
        token, that have a draft."""
        if not 0 < num_running <= self.config.speculation_batch:
            return
        table = self.table
        length = table.num_tokens[rows]
        left = np.minimum(table.round_end[rows], table.max_context) - length - 1
        states = table.states[rows, length - 1]
        drawn = (length > table.round_start[rows]) & (left > 0)
        for i in np.flatnonzero(drawn).tolist():
            if self._is_drafted(rows[i], states[i], -1):
                draft = self._draft(int(rows[i]), int(states[i]), int(left[i]))
                if draft[0]:
                    yield i, *draft

    def learn(self, sequence: Sequence | None, drafted: int, accepted: int) -> None:
        """What became of a draft, of a sequence that may be over."""
        self.num_verified += 1
        self.num_drafted += drafted
        self.num_accepted += accepted
        if sequence is not None:
            reach = max(drafted, self._reach.get(sequence.id, _FIRST))
            self._reach[sequence.id] = (
                min(2 * reach, self.config.draft_tokens) if accepted == drafted else (accepted + reach) // 2
            )

    def close(self, sequence: Sequence) -> None:
        """A sequence is over: what it drew is kept for others."""
        if sequence.row is not None:
            self._observe(sequence)
            self.drafts.close(sequence.prompt.content, sequence.id)
        self._reach.pop(sequence.id, None)

    def _observe(self, sequence: Sequence) -> None:
        row, prompt = sequence.row, sequence.prompt
        start = sequence.prompt_len + self.drafts.length(prompt.content, sequence.id)
        fresh = self.table.token_ids[row, start : self.table.num_tokens[row]].tolist()
        self.drafts.grow(prompt.content, prompt.token_ids, sequence.id, fresh)

    def _draft(self, row: int, state: int, most: int) -> tuple[list[int], list[int]]:
        sequence = self.table.sequences[row]
        assert sequence is not None
        self._observe(sequence)
        reach = self._reach.get(sequence.id, _FIRST)
        length = int(self.table.num_tokens[row])
        tail = self.table.token_ids[row, max(0, length - MATCHES[0]) : length].tolist()
        most = min(most, max(1, reach), self.config.draft_tokens)
        draft, agreed = self.drafts.after(sequence.prompt.content, tail, most)
        if not reach and agreed < MATCHES[0]:
            return [], []
        return self._cut(row, state, draft)

    def _cut(self, row: int, state: int, draft: list[int]) -> tuple[list[int], list[int]]:
        """The draft up to where nothing is to be drafted, or the round would end, with the states after its tokens."""
        automaton, states = self.automaton, []
        for token in draft:
            if not self._is_drafted(row, state, token):
                break
            state, event = automaton.step(state, token)
            states.append(state)
            if (IS_ENDING[event] and self.table.stops_at_tags[row]) or self._is_eos[token]:
                break
        return draft[: len(states)], states

    def _is_drafted(self, row: int, state: int, token: int) -> bool:
        """Whether a token that is drawn in this state is to be guessed; -1: some token."""
        if self.config.speculation == "all":
            return True
        phase = self.automaton.phases[state]
        if self.automaton.is_place[state] and not (token >= 0 and self.automaton.begins_number[token]):
            phase = CODE
        return bool(self.table.temperatures[row, phase] == 0.0)
