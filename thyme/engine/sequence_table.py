"""The numbers of all live sequences.

R rows of the table (one per live sequence), C tokens of context. What a step touches of every sequence is in arrays
over rows, so that a step costs a few numpy calls whatever the number of sequences.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thyme.engine.phases import TEXT, Phases
from thyme.engine.sequence import Forced, RoundStart, Sampled, Sequence, Tokens
from thyme.engine.tags import TokenKind

_TOKEN = np.dtype(
    {
        "names": ["token_ids", "positions", "records", "weight_versions", "states", "kinds", "phases"],
        "formats": [np.int32, (np.int32, 3), (np.float32, 5), np.int32, np.uint16, np.uint8, np.uint8],
    },
    align=True,
)


class SequenceTable:
    """One row per live sequence. Fields are public: Scheduler, Batch and StopChecker work on whole columns.

    What is known of one token lies together, in one cache line or two: a step writes and reads a token of every row.
    """

    def __init__(self, num_rows: int, max_context: int, block_size: int, phases: Phases | None = None) -> None:
        self.known_phases = phases or Phases()
        self.max_context = max_context
        self.block_size = block_size
        self.max_blocks = -(-max_context // block_size)
        self.sequences: list[Sequence | None] = []
        self._free: list[int] = []
        self._tokens = np.empty((0, max_context), dtype=_TOKEN)
        # Blocks.
        self.block_tables = np.empty((0, self.max_blocks), dtype=np.int32)
        self.num_blocks = np.empty(0, dtype=np.int64)
        self.has_shared_tail = np.empty(0, dtype=bool)
        """The block that the next token goes to may have other holders: copy it before writing."""
        # Progress: [0, num_computed) has its KV, or will when what was launched has run; num_seen is the most it ever
        # had. Tokens from num_known on are drawn by steps that are not read yet: they have a position, and no id.
        self.num_tokens = np.empty(0, dtype=np.int64)
        self.num_known = np.empty(0, dtype=np.int64)
        self.num_computed = np.empty(0, dtype=np.int64)
        self.num_seen = np.empty(0, dtype=np.int64)
        self.next_position = np.empty(0, dtype=np.int64)
        self.images_end = np.empty(0, dtype=np.int64)
        """One past the last image token, 0 without images."""
        # Forced tokens: those whose log-probs are not known yet stand at score_start + 1 to score_end.
        self.score_start = np.empty(0, dtype=np.int64)
        self.score_end = np.empty(0, dtype=np.int64)
        # The round: its first token, and where it must end.
        self.round_start = np.empty(0, dtype=np.int64)
        self.round_end = np.empty(0, dtype=np.int64)
        # Parameters.
        num_phases = len(self.known_phases.names)
        self.temperatures = np.empty((0, num_phases), dtype=np.float32)
        """By phase, as the limits."""
        self.seeds = np.empty(0, dtype=np.int64)
        self.top_k = np.empty((0, num_phases), dtype=np.int64)
        self.top_p = np.empty((0, num_phases), dtype=np.float32)
        self.min_p = np.empty((0, num_phases), dtype=np.float32)
        self.truncates = np.empty(0, dtype=bool)
        self.penalizes = np.empty(0, dtype=bool)
        self.ban = np.empty(0, dtype=np.int64)
        """Number of the row's set of banned ids."""
        self.stops_at_eos = np.empty(0, dtype=bool)
        self.stops_at_tags = np.empty(0, dtype=bool)
        # The repetition detector's slot of an open round that is watched.
        self.is_watched = np.empty(0, dtype=bool)
        self.detector_slots = np.empty(0, dtype=np.int32)
        self._grow(num_rows)

    def assign(self, sequence: Sequence) -> int:
        """Gives a sequence a row, filled with its prompt and parameters."""
        if not self._free:
            self._grow(2 * len(self.sequences))
        row = self._free.pop()
        self.sequences[row] = sequence
        sequence.row, sequence.table = row, self
        params = sequence.params
        self.num_tokens[row] = 0
        self.next_position[row] = self.images_end[row] = 0
        self.num_blocks[row] = self.num_computed[row] = self.num_seen[row] = 0
        self.has_shared_tail[row] = False
        by_phase = zip(*params.by_phase(self.known_phases), strict=True)
        self.temperatures[row], self.top_k[row], self.top_p[row], self.min_p[row] = by_phase
        assert params.seed is not None
        self.seeds[row] = params.seed
        self.truncates[row] = params.truncates
        self.penalizes[row] = params.repetition_penalty != 1.0
        self.ban[row] = sequence.ban
        self.stops_at_eos[row] = not params.ignore_eos
        self.stops_at_tags[row] = params.stop_at_tags
        self.is_watched[row] = False
        self.extend(row, sequence.prompt, TokenKind.PROMPT)
        self.begin_round(row, params.max_tokens)
        self.score_start[row] = self.score_end[row] = 0
        if sequence.forced is not None:
            self._force(row, sequence.forced)
        return row

    def extend(self, row: int, tokens: Tokens, kind: TokenKind) -> None:
        """Puts given tokens at the end of a row."""
        start = int(self.num_tokens[row])
        end = start + len(tokens.token_ids)
        self.token_ids[row, start:end] = tokens.token_ids
        self.positions[row, :, start:end] = tokens.positions
        self.kinds[row, start:end] = kind
        self.phases[row, start:end] = TEXT
        for first, image in zip(tokens.image_starts, tokens.images, strict=True):
            self.images_end[row] = start + first + image.num_tokens
            self.kinds[row, start + first : self.images_end[row]] = TokenKind.IMAGE
        self.num_tokens[row] = self.num_known[row] = end
        self.next_position[row] = tokens.next_position

    def _force(self, row: int, forced: Forced) -> None:
        start = int(self.num_tokens[row])
        end = start + len(forced.token_ids)
        self.token_ids[row, start:end] = forced.token_ids
        self.kinds[row, start:end] = forced.kinds
        self.phases[row, start:end] = forced.phases
        self.states[row, start:end] = forced.states
        self.positions[row, :, start:end] = self.next_position[row] + np.arange(end - start)
        self.records[row, :, start:end] = np.array([0, 0, 0, 0, 1], dtype=np.float32)[:, None]
        self.records[row, 3, start:end] = forced.temperatures
        self.num_tokens[row] = self.num_known[row] = end
        self.next_position[row] += end - start
        self.score_start[row], self.score_end[row] = start - 1, end - 1

    def begin_round(self, row: int, max_tokens: int) -> None:
        """The next sampled token is the first of a round."""
        self.round_start[row] = self.num_tokens[row]
        self.round_end[row] = self.num_tokens[row] + max_tokens

    def advance(self, rows: NDArray[np.int64]) -> None:
        """A step that was launched draws one token at the end of each row."""
        at = self.num_tokens[rows]
        position = self.next_position[rows]
        self.positions[rows, :, at] = position[:, None]
        self.num_tokens[rows] = at + 1
        self.next_position[rows] = position + 1

    def fill(self, rows: NDArray[np.int64], drawn: Sampled, weight_version: int) -> None:
        """What was drawn for each row is known: its first token without an id has one."""
        at = self.num_known[rows]
        self.token_ids[rows, at] = drawn.token_ids
        self.kinds[rows, at] = drawn.kinds
        self.phases[rows, at] = drawn.phases
        self.states[rows, at] = drawn.states
        self.records[rows, :, at] = drawn.records.T
        self.weight_versions[rows, at] = weight_version
        self.num_known[rows] = at + 1

    def take_back(self, rows: NDArray[np.int64]) -> None:
        """What steps that are not read draw for these rows, and compute of it, does not count."""
        rows = rows[self.num_tokens[rows] > self.num_known[rows]]
        known = self.num_known[rows]
        self.next_position[rows] -= self.num_tokens[rows] - known
        self.num_tokens[rows] = known
        # The last token that counts is an input of theirs at most.
        self.num_computed[rows] = np.minimum(self.num_computed[rows], known - 1)
        self.num_seen[rows] = np.minimum(self.num_seen[rows], known - 1)

    def draft(self, row: int, token_ids: list[int], states: list[int]) -> None:
        """Puts tokens that may be drawn next behind the end of a row: a step may compute them, and no more is known of
        them. `states`: of the tag automaton, after each."""
        start = int(self.num_tokens[row])
        end = start + len(token_ids)
        self.token_ids[row, start:end] = token_ids
        self.states[row, start:end] = states
        self.positions[row, :, start:end] = self.next_position[row] + np.arange(end - start)

    def score(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], scores: NDArray[np.float32], weight_version: int
    ) -> None:
        """Log-probs, those at temperature 1 and entropies [3, F] of forced tokens."""
        self.records[rows, :3, columns] = scores.T
        self.weight_versions[rows, columns] = weight_version
        np.maximum.at(self.score_start, rows, columns)

    def fork(self, source: int, sequence: Sequence) -> int:
        """Gives a sibling of the row's sequence, with the same prompt, a row that has come as far."""
        row = self.assign(sequence)
        self.num_computed[row], self.num_seen[row] = self.num_computed[source], self.num_seen[source]
        self.num_blocks[row] = self.num_blocks[source]
        self.block_tables[row] = self.block_tables[source]
        return row

    def branch(self, source: int, sequence: Sequence, start: RoundStart, max_tokens: int) -> int:
        """Gives a sequence a row with all that the source's row has before `start`, about to begin a round there. Its
        blocks are those of the source as far as they are full or partly filled with that."""
        row, length = self.assign(sequence), start.length
        self._tokens[row, :length] = self._tokens[source, :length]
        self.num_tokens[row] = self.num_known[row] = self.num_seen[row] = length
        self.next_position[row] = start.next_position
        ends = (first + image.num_tokens for first, image in zip(sequence.image_starts, sequence.images, strict=True))
        self.images_end[row] = max(ends, default=0)
        # Without the hidden state of the last token, that one is computed again.
        self.num_computed[row] = min(length - (start.hidden is None), self.num_computed[source])
        self.num_blocks[row] = min(-(-int(self.num_computed[row]) // self.block_size), self.num_blocks[source])
        self.block_tables[row] = self.block_tables[source]
        self.score_start[row] = self.score_end[row] = 0
        self.begin_round(row, max_tokens)
        return row

    def free(self, row: int) -> None:
        """Takes the row from its sequence, which keeps its token ids."""
        sequence = self.sequences[row]
        assert sequence is not None
        sequence.final_ids = sequence.token_ids
        sequence.row = sequence.table = None
        self.sequences[row] = None
        self._free.append(row)

    def blocks(self, row: int) -> list[int]:
        """Block ids the row holds, in the order of its tokens."""
        return self.block_tables[row, : self.num_blocks[row]].tolist()

    def round(self, row: int | None) -> tuple[list[int], dict[str, NDArray[Any]]]:
        """Tokens of the current round, forced ones as far as they are scored, and copies of the records under
        Completion's names; none without a row."""
        part = slice(0, 0)
        if row is None:
            row = 0
        else:
            is_scored = self.score_start[row] == self.score_end[row]
            end = self.num_tokens[row] if is_scored else self.score_start[row] + 1
            part = slice(int(self.round_start[row]), int(end))
        logprobs, raw, entropies, temperatures, kept_mass = self.records[row, :, part].copy()
        arrays: dict[str, NDArray[Any]] = dict(
            logprobs=logprobs,
            logprobs_raw=raw,
            entropies=entropies,
            temperatures=temperatures,
            kept_mass=kept_mass,
            kinds=self.kinds[row, part].copy(),
            phases=self.phases[row, part].copy(),
            weight_version=self.weight_versions[row, part].copy(),
        )
        return self.token_ids[row, part].tolist(), arrays

    def _grow(self, num_rows: int) -> None:
        old = len(self.sequences)
        lengths = self.num_tokens[:old].tolist()
        for name, array in vars(self).items():
            if not isinstance(array, np.ndarray) or array.base is not None:  # columns of _tokens
                continue
            grown = np.empty((num_rows, *array.shape[1:]), dtype=array.dtype)
            if array.ndim > 1 and array.shape[-1] == self.max_context:
                for row, length in enumerate(lengths):  # pages that were never written stay unclaimed
                    grown[row, ..., :length] = array[row, ..., :length]
            else:
                grown[:old] = array
            setattr(self, name, grown)
        self._name_columns()
        self.sequences += [None] * (num_rows - old)
        self._free += reversed(range(old, num_rows))

    def _name_columns(self) -> None:
        tokens = self._tokens
        self.token_ids: NDArray[np.int32] = tokens["token_ids"]
        """[R, C]."""
        self.kinds: NDArray[np.uint8] = tokens["kinds"]
        """[R, C] TokenKind."""
        self.phases: NDArray[np.uint8] = tokens["phases"]
        """[R, C] number of the phase a token was drawn in; that of text for given ones."""
        self.positions: NDArray[np.int32] = tokens["positions"].transpose(0, 2, 1)
        """[R, 3, C]."""
        self.records: NDArray[np.float32] = tokens["records"].transpose(0, 2, 1)
        """[R, 5, C] logprob, logprob_raw, entropy, temperature, kept_mass."""
        self.weight_versions: NDArray[np.int32] = tokens["weight_versions"]
        """[R, C]."""
        self.states: NDArray[np.uint16] = tokens["states"]
        """[R, C] of the tag automaton after a token that was drawn."""
