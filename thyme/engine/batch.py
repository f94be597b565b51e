"""What one step computes: complete when constructed, read by the ModelRunner, never changed.

B sequences with T tokens in all, packed; U rows of logits: of sequences whose last token is among them, with one for
each drafted token behind it, and then of branches that begin with a hidden state that is kept (T may be 0); S samples
(S > U when siblings draw their first tokens from the same logits). All arrays are host numpy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thyme.engine.sequence import Sequence
from thyme.engine.sequence_table import SequenceTable
from thyme.kernels.paged_attention import capacity
from thyme.model.image_processor import ImageInputs


@dataclass(frozen=True, slots=True)
class ImageSlice:
    """A run of an image's features that stand at consecutive tokens of the batch."""

    image: ImageInputs
    start: int
    """First feature."""
    count: int
    token: int
    """Index in T of the first feature's token."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """What each sample may be drawn among, [S, phases]."""

    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Penalty:
    """A repetition penalty on one sample."""

    sample: int
    penalty: float
    token_ids: NDArray[np.int64]
    """The ids that are in the sequence."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Forced tokens whose log-probs this step gives, F of them, those with equal bans side by side; all [F]."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    """Where they stand in the sequence table."""
    tokens: NDArray[np.int64]
    """Index in T of the token before."""
    token_ids: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    bans: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Drafted:
    """Of a step in which sequences compute tokens that are not drawn yet, each of which may turn out to be drawn: a
    sequence with k of them has k + 1 samples, side by side; all [S]."""

    depths: NDArray[np.int64]
    """Drafted tokens before the sample."""
    token_ids: NDArray[np.int64]
    """The last of them; -1 where there is none."""
    states: NDArray[np.int64]
    """Of the tag automaton after it; of no meaning where there is none."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Batch:
    """One step."""

    rows: NDArray[np.int64]
    """[B] of the sequence table."""
    counts: NDArray[np.int64]
    """[B] tokens of each sequence in this step."""
    input_ids: NDArray[np.int64]
    """[T]; -1 where `unread` has them, until the runner puts them there."""
    unread: NDArray[np.int64]
    """[2, unread] indices in T of tokens that a step before this one draws and the host has not read, and their rows of
    the sequence table: the device has them."""
    positions: NDArray[np.int64]
    """[3, T]."""
    slot_mapping: NDArray[np.int64]
    """[T] where in the KV cache a token's key and value go: block * block_size + offset."""
    block_tables: NDArray[np.int32]
    """[B, blocks of the longest and more: one width for many lengths]; what a sequence does not use may be anything."""
    context_lens: NDArray[np.int32]
    """[B] tokens with their KV, those of this step included."""
    cu_seqlens_q: NDArray[np.int32]
    """[B + 1]."""
    copies: NDArray[np.int64]
    """[2, copies] blocks (source, target) to copy before anything is written."""
    saved: NDArray[np.int64]
    """[2, saved] blocks, and the slots of host memory that they are copied to before any of that."""
    restored: NDArray[np.int64]
    """[2, restored] slots, and the blocks that they are copied to after it."""
    images: list[ImageSlice]

    drafted: Drafted | None
    """None: no sequence has a draft."""
    logit_tokens: NDArray[np.int64]
    """[U, without those of `branched`] index in T."""
    branched: list[Any]
    """Hidden states [H], on the device, that branches begin with: the last rows of logits."""
    first: NDArray[np.int64]
    """Samples that are the first of a round of a held sequence: index in S."""
    sample_rows: NDArray[np.int64]
    """[S] of the sequence table."""
    sample_logits: NDArray[np.int64]
    """[S] index in U."""
    temperatures: NDArray[np.float32]
    """[S, phases]."""
    seeds: NDArray[np.int64]
    """[S]."""
    sample_positions: NDArray[np.int64]
    """[S] index in its sequence of the token to be drawn."""
    bans: NDArray[np.int64]
    """[S] number of the set of banned ids."""
    truncation: Truncation | None
    """None: every sample is drawn among all ids."""
    penalties: list[Penalty]
    scored: Scored | None
    started: list[Sequence]
    """Sequences whose round begins with this batch: automaton and detector are to be reset."""

    @classmethod
    def build(
        cls,
        table: SequenceTable,
        rows: NDArray[np.int64],
        counts: NDArray[np.int64],
        forks: dict[int, list[int]],
        copies: dict[int, int],
        moves: tuple[NDArray[np.int64], NDArray[np.int64]],
        started: list[Sequence],
        branches: list[Sequence] | None = None,
    ) -> "Batch":
        """The step in which rows compute some of their next tokens.

        Args:
            table: the sequences; blocks for the tokens of this step are in place.
            rows, counts: [B] which rows compute how many of their next tokens, drafted ones among them.
            forks: row -> rows of the siblings that sample from its logits.
            copies: target block -> source block.
            moves: `saved` and `restored`.
            started: sequences whose round begins with this step.
            branches: sequences of which nothing is left to compute before their first draw.
        """
        first = table.num_computed[rows]
        ends = first + counts
        cumulative = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=cumulative[1:])
        if len(rows) == cumulative[-1]:  # one token each
            token_rows, columns = rows, first
        else:
            token_rows = np.repeat(rows, counts)
            columns = np.arange(cumulative[-1]) + np.repeat(first - cumulative[:-1], counts)
        blocks = table.block_tables[token_rows, columns // table.block_size].astype(np.int64)
        length = table.num_tokens[rows]
        ahead = ends - length
        input_ids = table.token_ids[token_rows, columns].astype(np.int64)
        unread = np.flatnonzero((length > table.num_known[rows]) & (ahead >= 0))  # of each its last token
        last = cumulative[1:][unread] - 1
        input_ids[last] = -1
        done = np.flatnonzero(ahead >= 0)
        samples, depths = rows[done], np.zeros(len(done), dtype=np.int64)
        logit_tokens = cumulative[1:][done].astype(np.int64) - 1
        if is_drafted := bool((ahead > 0).any()):
            widths = ahead[done] + 1
            samples = np.repeat(samples, widths)
            depths = np.arange(len(samples)) - np.repeat(np.cumsum(widths) - widths, widths)
            logit_tokens = np.repeat(logit_tokens - ahead[done], widths) + depths
        logits, num_logits = np.arange(len(samples)), len(samples)
        if forks:
            groups = [[row, *forks.get(row, ())] for row in samples.tolist()]
            sizes = [len(group) for group in groups]
            logits, depths = np.repeat(logits, sizes), np.repeat(depths, sizes)
            samples = np.array([row for group in groups for row in group], dtype=np.int64)
        branched: dict[int, Any] = {}
        if branches:
            kept = [branch.starts[-1].hidden for branch in branches]
            branched = {id(hidden): hidden for hidden in kept}
            kept_at = {number: place for place, number in enumerate(branched, start=num_logits)}
            logits = np.concatenate((logits, [kept_at[id(hidden)] for hidden in kept]))
            rows_of = [branch.row for branch in branches if branch.row is not None]
            samples = np.concatenate((samples, np.array(rows_of, dtype=np.int64)))
            depths = np.concatenate((depths, np.zeros(len(rows_of), dtype=np.int64)))
        places = table.num_tokens[samples] + depths
        begins = np.flatnonzero(places == table.round_start[samples])
        return cls(
            rows=rows,
            counts=counts,
            input_ids=input_ids,
            unread=np.array((last, rows[unread])),
            positions=np.ascontiguousarray(table.positions[token_rows, :, columns].T, dtype=np.int64),
            slot_mapping=blocks * table.block_size + columns % table.block_size,
            block_tables=table.block_tables[rows, : capacity(int(ends.max(initial=1)), table.block_size)],
            context_lens=ends.astype(np.int32),
            cu_seqlens_q=cumulative,
            copies=np.array([list(copies.values()), list(copies.keys())], dtype=np.int64),
            saved=moves[0],
            restored=moves[1],
            images=_image_slices(table, rows, first, ends, cumulative[:-1]),
            drafted=_drafted(table, samples, depths, places) if is_drafted else None,
            logit_tokens=logit_tokens,
            branched=list(branched.values()),
            first=np.array([i for i in begins if _is_held(table, samples[i])], dtype=np.int64),
            sample_rows=samples,
            sample_logits=logits,
            temperatures=table.temperatures[samples],
            seeds=table.seeds[samples],
            sample_positions=places,
            bans=table.ban[samples],
            truncation=_truncation(table, samples),
            penalties=[_penalty(table, i, samples[i], places[i]) for i in np.flatnonzero(table.penalizes[samples])],
            scored=_scored(table, rows, first, ends, cumulative[:-1]),
            started=started,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def drawing(self) -> NDArray[np.int64]:
        """Samples that count whatever they are: all but those behind a drafted token."""
        return np.arange(len(self.sample_rows)) if self.drafted is None else np.flatnonzero(self.drafted.depths == 0)

    def drafts(self) -> list[tuple[int, int, int]]:
        """(row, tokens of its sequence before the draft, tokens of the draft) of each that has one."""
        if self.drafted is None:
            return []
        depths = self.drafted.depths
        last = np.flatnonzero((depths > 0) & np.append(depths[1:] == 0, True))
        counts = depths[last]
        starts = self.sample_positions[last] - counts
        return list(zip(self.sample_rows[last].tolist(), starts.tolist(), counts.tolist(), strict=True))

    def borne_out(self, samples: NDArray[np.int64], token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Given samples that count, those behind them that do too, since what was drafted is what was drawn;
        `token_ids`: [S] that were drawn."""
        assert self.drafted is not None
        samples = samples[samples + 1 < len(token_ids)]
        return samples[token_ids[samples] == self.drafted.token_ids[samples + 1]] + 1


def _is_held(table: SequenceTable, row: int) -> bool:
    sequence = table.sequences[row]
    return sequence is not None and sequence.hold


def _image_slices(
    table: SequenceTable, rows: NDArray[Any], first: NDArray[Any], ends: NDArray[Any], tokens: NDArray[Any]
) -> list[ImageSlice]:
    slices: list[ImageSlice] = []
    for i in np.flatnonzero(first < table.images_end[rows]):
        sequence = table.sequences[rows[i]]
        assert sequence is not None
        low, high = int(first[i]), int(ends[i])
        for start, image in zip(sequence.image_starts, sequence.images, strict=True):
            begin, end = max(low, start), min(high, start + image.num_tokens)
            if begin < end:
                slices.append(ImageSlice(image, begin - start, end - begin, int(tokens[i]) + begin - low))
    return slices


def _scored(
    table: SequenceTable, rows: NDArray[Any], first: NDArray[Any], ends: NDArray[Any], tokens: NDArray[Any]
) -> Scored | None:
    low, high = np.maximum(first, table.score_start[rows]), np.minimum(ends, table.score_end[rows])
    if not (low < high).any():
        return None
    counts = np.maximum(high - low, 0)
    scored = np.repeat(rows, counts)
    places = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])  # of the tokens before
    by_ban = np.argsort(table.ban[scored], kind="stable")
    behind = np.repeat(tokens - first, counts)[by_ban]
    scored, places = scored[by_ban], places[by_ban]
    return Scored(
        rows=scored,
        columns=places + 1,
        tokens=places + behind,
        token_ids=table.token_ids[scored, places + 1].astype(np.int64),
        temperatures=table.records[scored, 3, places + 1],
        bans=table.ban[scored],
    )


def _truncation(table: SequenceTable, samples: NDArray[np.int64]) -> Truncation | None:
    if not table.truncates[samples].any():
        return None
    return Truncation(table.top_k[samples], table.top_p[samples], table.min_p[samples])


def _drafted(table: SequenceTable, samples: NDArray[Any], depths: NDArray[Any], places: NDArray[Any]) -> Drafted:
    token_ids = np.where(depths > 0, table.token_ids[samples, places - 1], -1).astype(np.int64)
    return Drafted(depths, token_ids, table.states[samples, places - 1].astype(np.int64))


def _penalty(table: SequenceTable, sample: int, row: int, place: int) -> Penalty:
    sequence = table.sequences[row]
    assert sequence is not None
    ids = np.unique(table.token_ids[row, :place]).astype(np.int64)
    return Penalty(int(sample), sequence.params.repetition_penalty, ids)
