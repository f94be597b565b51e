"""Which sequence computes which of its tokens in the next step, and in which blocks.

There is no prefill phase and no decode phase: every running sequence has num_computed tokens chasing num_tokens. One
that lacks a single token decodes; one that lacks more is prefilled, in chunks, within the same budget of tokens.

Places among the running are given in the order: preempted, resumed (appended to), new. One that does not run only
claims its blocks (parking.py): it computes again what was taken of them and is not in the prefix cache.

A block is shared from the moment its tokens are planned: a step writes all keys of a layer before it reads any. Of
sequences that begin alike the first in line computes what is common, chunk by chunk, and the others wait for it; one
whose prompt equals one under way joins it as a sibling does. Who waits for whom is found anew in each step.

Those that run are in the order in which they were asked for, whatever happened since: siblings are neighbors in every
batch, so that attention can read their prompt once, and the oldest is never stopped for a younger one.
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from thyme.engine.batch import Batch
from thyme.engine.block_manager import BlockManager
from thyme.engine.config import EngineConfig
from thyme.engine.host_kv import HostKv, Tradeoff
from thyme.engine.parking import Parking
from thyme.engine.prefix import PrefixCache
from thyme.engine.sequence import RoundStart, Sequence, SequenceStatus
from thyme.engine.sequence_table import SequenceTable
from thyme.engine.speculation import Speculation
from thyme.engine.tags import TokenKind

_IS_GIVEN = np.isin(np.arange(len(TokenKind)), (TokenKind.PROMPT, TokenKind.SANDBOX, TokenKind.IMAGE))


class Scheduler:
    """Owns the queues and, through them, the blocks of every sequence in the table."""

    def __init__(
        self,
        config: EngineConfig,
        table: SequenceTable,
        blocks: BlockManager,
        block_bytes: int,
        is_encoded: Callable[[str], bool],
        speculation: Speculation | None = None,
        tradeoff: Tradeoff | None = None,
    ) -> None:
        self.config = config
        self.table = table
        self.blocks = blocks
        self.preempted: deque[Sequence] = deque()
        self.resumed: deque[Sequence] = deque()
        self.new: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """By id; the last is the first to be preempted."""
        self.counts: Counter[str] = Counter()
        pin_blocks = None if config.pin_bytes is None else config.pin_bytes // block_bytes
        self.host = HostKv(config.host_kv_bytes // block_bytes, self.counts, tradeoff)
        blocks.on_reuse = self.host.reuse
        self.prefixes = PrefixCache(table, blocks, self.host, self.counts, is_on=config.prefix_cache)
        self.parking = Parking(table, blocks, self.counts, self.host, pin_blocks, config.pin_seconds)
        self._prompts: dict[object, Sequence] = {}  # by content: those running whose prompt is not computed yet
        self._is_encoded = is_encoded
        self._speculation = speculation
        self._encoding: dict[str, int] = {}  # image tokens of the images that the step being planned encodes
        self._coming: set[tuple[int, object] | None] = set()  # blocks that the step being planned does not fill yet
        self._rows: NDArray[np.int64] | None = None
        self._open: NDArray[np.int64] | None = None
        self._copies: dict[int, int] = {}
        self._started: list[Sequence] = []

    # From outside: sequences come and go.

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence that has no row yet, with its followers, at the end of the queue."""
        self.new.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Puts a held sequence that has been appended to in line."""
        sequence.status = SequenceStatus.WAITING
        self.resumed.append(sequence)
        self.parking.recall(sequence)

    def branch(self, source: Sequence, sequence: Sequence, start: RoundStart, max_tokens: int) -> None:
        """Puts a sequence in line that goes on from where a round of the source began, with the blocks of that."""
        table, blocks = self.table, self.blocks
        assert source.row is not None
        row = table.branch(source.row, sequence, start, max_tokens)
        held = table.blocks(row)
        for block in held:
            blocks.share(block)
        sequence.nodes = source.nodes[: int(table.num_computed[row]) // table.block_size + 1]
        self.host.inherit(source, sequence, start.length - (start.hidden is None), table.block_size)
        # Whoever writes first to a block that both have in part gets a copy.
        for other in (source.row, row):
            table.has_shared_tail[other] |= table.num_computed[other] % table.block_size != 0
        self.parking.park(sequence, between_rounds=False)
        self.resumed.append(sequence)

    def forget_hidden(self, sequence: Sequence) -> None:
        """The hidden states that are kept of a sequence are of other weights: its last token is computed again where it
        is yet to draw from one."""
        for start in sequence.starts:
            start.hidden = None
        table, row = self.table, sequence.row
        assert row is not None
        if table.num_computed[row] == table.num_tokens[row]:
            table.num_computed[row] -= 1
            table.has_shared_tail[row] = True

    def hold(self, sequence: Sequence) -> None:
        """Takes a running sequence out; it keeps its KV for as long as nothing that runs needs the room."""
        self._leave(sequence)
        self._trim(sequence)
        sequence.status = SequenceStatus.HELD
        self.parking.park(sequence, between_rounds=True)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its row and blocks. A follower takes over what it led."""
        followers, sequence.followers = sequence.followers, []
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._leave_queue(sequence)
        if sequence.row is not None:
            self.parking.drop(sequence)
            self.blocks.release(reversed(self.table.blocks(sequence.row)))
            self.table.free(sequence.row)
        else:
            sequence.final_ids = sequence.token_ids
        self.host.close(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._lead_themselves(followers)

    @property
    def has_unfinished(self) -> bool:
        """Whether some sequence runs or waits for a place; held ones do neither."""
        return bool(self.running or self.preempted or self.resumed or self.new)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place among the running, followers included."""
        queues = (self.preempted, self.resumed, self.new)
        return sum(1 + len(sequence.followers) for queue in queues for sequence in queue)

    # One step.

    def schedule(self, *, ahead: bool = False) -> Batch | None:
        """The next step, its blocks in place; None when nothing is left to run.

        With `ahead` the step before is not read yet: None too where that is to be read first.
        """
        self.parking.enforce_limits()
        self._open = None
        if ahead and self._takes_drawn_ids():
            return None
        while self.has_unfinished:
            if not self._reserve_to_decode(may_preempt=not ahead):
                return None  # what has ended, and is not known to have, may leave room
            rows, counts, forks, branches = self._plan()
            if len(rows) or branches:
                moves = self.host.take()
                batch = Batch.build(self.table, rows, counts, forks, self._copies, moves, self._started, branches)
                self._copies, self._started = {}, []
                return batch
            if ahead:
                return None
            self._preempt_youngest()
        return None

    def pause(self) -> None:
        """Nothing runs: all that did is first in line, with its blocks."""
        while self.running:
            self._preempt(self.running[-1])

    def drop_all(self) -> None:
        """Takes all blocks from all sequences, of which none may run; what is in them is not found again."""
        assert not self.running
        self.blocks.forget_prefixes()
        self.host.cancel_saves()
        for sequence in self.table.sequences:
            if sequence is not None:
                self.parking.drop(sequence)

    def fail(self, batches: list[Batch]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Steps that were planned have not been computed: nothing that they were to write may be read, and what they
        were to draw is not drawn. Returns rows, and the state of the tag automaton that each of them is in; rounds that
        were to begin are yet to begin."""
        table = self.table
        table.take_back(np.array([s.row for s in table.sequences if s is not None], dtype=np.int64))
        self.blocks.forget_prefixes()
        self.host.forget()
        self.pause()
        for sequence in (*self.preempted, *self.resumed):  # a branch may have blocks of one that ran
            self.parking.drop(sequence)
        for sequence in (*self._started, *(sequence for batch in batches for sequence in batch.started)):
            sequence.has_begun = False
        self._started = []
        begun = [s for s in table.sequences if s is not None and s.has_begun]
        rows = np.array([s.row for s in begun], dtype=np.int64)
        drawn = table.num_tokens[rows] > table.round_start[rows]
        begins_in = np.array([s.begins_in for s in begun], dtype=np.int64)
        return rows, np.where(drawn, table.states[rows, table.num_tokens[rows] - 1], begins_in)

    def commit(self, batch: Batch) -> None:
        """The step has been launched: what it computes counts, but for drafted tokens, that are not known to be drawn,
        and who draws has one token more."""
        table = self.table
        before = table.num_computed[batch.rows]
        after = np.minimum(before + batch.counts, table.num_tokens[batch.rows])
        self._count(batch, before, after)
        self._advance(batch.rows, after)
        table.advance(batch.sample_rows[batch.drawing])

    def commit_drafted(self, rows: NDArray[np.int64]) -> None:
        """A drafted token of each of these rows was drawn: it counts as computed, and the one behind it as drawn."""
        self._advance(rows, self.table.num_computed[rows] + 1)
        self.table.advance(rows)

    def drew(self, rows: NDArray[np.int64]) -> None:
        """What these rows drew is known: full blocks are published."""
        table, size = self.table, self.table.block_size
        self.counts["sampled_tokens"] += len(rows)
        if self.config.prefix_cache:
            full = table.num_computed[rows]  # of known tokens: one behind the last is drawn, and not computed, yet
            for i in np.flatnonzero(full % size == 0):
                sequence = table.sequences[rows[i]]
                assert sequence is not None
                self.prefixes.publish(sequence, int(full[i]) // size)

    def end_drafts(self, batch: Batch) -> None:
        """What was drawn of the batch's drafts is known: blocks that only the rest stood in are given back."""
        assert self._speculation is not None
        for row, start, count in batch.drafts():
            sequence = self.table.sequences[row]
            self._speculation.learn(sequence, count, int(self.table.num_tokens[row]) - start - 1)
            if sequence is not None and sequence.status is SequenceStatus.RUNNING:
                self._trim(sequence)

    def _advance(self, rows: NDArray[np.int64], computed: NDArray[np.int64]) -> None:
        self.table.num_computed[rows] = computed
        self.table.num_seen[rows] = np.maximum(self.table.num_seen[rows], computed)

    def check_integrity(self) -> None:
        """Raises RuntimeError unless every block is accounted for and every live sequence is in one place."""
        live = [sequence for sequence in self.table.sequences if sequence is not None]
        rows = [sequence.row for sequence in self.running if sequence.row is not None]
        self.blocks.check_integrity(map(self.table.blocks, rows), self.parking.tables())
        self.host.check_integrity()
        for sequence in live:
            assert sequence.row is not None
            if self.table.num_blocks[sequence.row] < self.blocks.blocks_for(int(self.table.num_computed[sequence.row])):
                raise RuntimeError(f"sequence {sequence.id} has computed tokens without a block")
            held = self.table.num_blocks[sequence.row] > 0
            if held and (sequence in self.parking) == (sequence in self.running):
                raise RuntimeError(f"sequence {sequence.id} holds blocks, but is neither running nor parked, or both")

    # Planning.

    def _plan(self) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, list[int]], list[Sequence]]:
        """Rows, how many tokens each computes, which rows fork from which, and the branches that only draw."""
        rows = self._open_rows()
        pending = self.table.num_tokens[rows] - self.table.num_computed[rows]
        decoding = pending == 1
        decode_rows = rows[decoding]
        budget = self.config.max_batch_tokens - len(decode_rows)
        chunks: list[tuple[int, int]] = []
        self._coming.clear()
        self._encoding.clear()
        for row in rows[pending > 1].tolist():
            budget -= self._prefill(row, budget, chunks)
        budget -= self._admit_waiting(budget, chunks)
        branches = self._branches()
        rows, counts = decode_rows, np.ones(len(decode_rows), dtype=np.int64)
        if chunks:
            prefills = np.array(chunks, dtype=np.int64)
            rows = np.concatenate((decode_rows, prefills[:, 0]))
            counts = np.concatenate((counts, prefills[:, 1]))
        forks = self._fork_groups(rows, counts)
        if self._speculation is not None:  # last: a table that grows keeps no drafts
            self._draft(self._speculation, decode_rows, counts, budget)
        return rows, counts, forks, branches

    def _draft(self, speculation: Speculation, rows: NDArray[np.int64], counts: NDArray[np.int64], budget: int) -> None:
        """Adds to what the rows compute the tokens of their drafts that the step and the free blocks have room for."""
        table = self.table
        for i, token_ids, states in speculation.propose(rows, len(self.running)):
            row, computed = int(rows[i]), int(table.num_computed[rows[i]])
            room = (int(table.num_blocks[row]) + self.blocks.num_free) * table.block_size - computed - 1
            count = min(len(token_ids), room, budget)
            if count > 0:
                table.draft(row, token_ids[:count], states[:count])
                self._reserve(row, computed + 1 + count)
                counts[i] += count
                budget -= count

    def _trim(self, sequence: Sequence) -> None:
        """Gives back blocks in which nothing stands that counts."""
        table, row = self.table, sequence.row
        assert row is not None
        needed = self.blocks.blocks_for(int(table.num_computed[row]))
        while table.num_blocks[row] > needed:
            table.num_blocks[row] -= 1
            self.blocks.release((int(table.block_tables[row, table.num_blocks[row]]),))

    def _branches(self) -> list[Sequence]:
        """Those that run and have nothing left to compute: the hidden state that they draw from is kept."""
        rows = self._running_rows()
        ready = rows[self.table.num_tokens[rows] == self.table.num_computed[rows]]
        return [sequence for row in ready if (sequence := self.table.sequences[row]) is not None]

    def _takes_drawn_ids(self) -> bool:
        """Whether the host needs the ids that were drawn to plan the next step: for drafts or a repetition penalty."""
        drafts = self._speculation is not None and len(self.running) <= self.config.speculation_batch
        return drafts or bool(self.table.penalizes[self._running_rows()].any())

    def _needy_rows(self) -> NDArray[np.int64]:
        """Those that decode and need a block for it."""
        table, rows = self.table, self._open_rows()
        computed = table.num_computed[rows]
        full = table.num_blocks[rows] * table.block_size <= computed
        return rows[(full | table.has_shared_tail[rows]) & (table.num_tokens[rows] == computed + 1)]

    def _reserve_to_decode(self, *, may_preempt: bool) -> bool:
        """A block for every sequence that decodes and needs one; the youngest are preempted until there are enough, or
        nothing is done. Returns whether there are."""
        while len(wanted := self._needy_rows()) > self.blocks.num_available:
            if not may_preempt:
                return False
            self._preempt_youngest()
        for row in wanted.tolist():
            self._reserve(row, int(self.table.num_computed[row]) + 1)
        return True

    def _prefill(self, row: int, budget: int, chunks: list[tuple[int, int]]) -> int:
        """Adds the row's next chunk, as long as budget and blocks allow, and unless an earlier row of this step is at
        the very block that comes next; returns its length."""
        table, size, sequence = self.table, self.table.block_size, self.table.sequences[row]
        assert sequence is not None
        if budget <= 0 or table.num_computed[row] == table.num_tokens[row]:
            return 0
        kept = self.prefixes.recover(sequence, self._allocate)
        is_at_start = table.num_computed[row] % size == 0
        if self._coming and is_at_start and self.prefixes.next_block(sequence) in self._coming:
            return 0
        computed = int(table.num_computed[row])
        count = min(int(table.num_tokens[row]) - computed, budget, self.config.prefill_chunk or budget)
        room = self.blocks.num_available - int(self._must_copy_tail(row))
        count = min(count, (int(table.num_blocks[row]) + room) * size - computed)
        if kept is not None:
            count = min(count, kept * size - computed)
        if room >= 0 and computed < table.images_end[row]:
            count = self._until_unaffordable(sequence, computed, count)
        if room < 0 or count <= 0:
            return 0
        self._reserve(row, computed + count)
        chunks.append((row, count))
        self.prefixes.publish(sequence, (computed + count) // size)
        if computed + count < table.num_tokens[row] and (coming := self.prefixes.next_block(sequence)) is not None:
            self._coming.add(coming)
        return count

    def _until_unaffordable(self, sequence: Sequence, computed: int, count: int) -> int:
        """How many of these tokens come before an image for which the step's encoder budget has no room."""
        for start, image in zip(sequence.image_starts, sequence.images, strict=True):
            if start >= computed + count or start + image.num_tokens <= computed or image.digest in self._encoding:
                continue
            if not self._is_encoded(image.digest):
                used, limit = sum(self._encoding.values()), self.config.encoder_budget
                if used and limit is not None and used + image.num_tokens > limit:
                    return max(0, start - computed)
                self._encoding[image.digest] = image.num_tokens
        return count

    def _reserve(self, row: int, end: int) -> None:
        """Blocks of the row's own for all tokens it will write up to `end`."""
        table = self.table
        if self._must_copy_tail(row):
            last = int(table.num_computed[row]) // table.block_size
            block, own = int(table.block_tables[row, last]), self._allocate()
            self._copies[own] = block
            table.block_tables[row, last] = own
            self.blocks.release((block,))
        table.has_shared_tail[row] = False
        for position in range(int(table.num_blocks[row]), self.blocks.blocks_for(end)):
            table.block_tables[row, position] = self._allocate()
            table.num_blocks[row] = position + 1

    def _allocate(self) -> int:
        if not self.blocks.num_free:
            self.parking.make_room()
        return self.blocks.allocate()

    def _must_copy_tail(self, row: int) -> bool:
        """The next token goes to a block that has other holders, or more in it than the row knows."""
        if not self.table.has_shared_tail[row]:
            return False
        return self.blocks.must_copy(
            int(self.table.block_tables[row, self.table.num_computed[row] // self.table.block_size])
        )

    def _admit_waiting(self, budget: int, chunks: list[tuple[int, int]]) -> int:
        used = 0
        if not (self.preempted or self.resumed or self.new):
            return used
        places = self.config.max_sequences - len(self.running) - sum(len(s.followers) for s in self._prompts.values())
        for queue in (self.preempted, self.resumed, self.new):
            while queue:
                sequence = queue[0]
                places -= 1 + len(sequence.followers)
                if used >= budget or places < 0 or not self._admit(sequence):
                    return used
                queue.popleft()
                if sequence.row is not None:
                    used += self._prefill(sequence.row, budget - used, chunks)
        return used

    def _admit(self, sequence: Sequence) -> bool:
        """Makes a waiting sequence run, if the blocks for all its tokens are available; or else has it follow a running
        one, with its own followers, that is computing the same prompt."""
        table, blocks = self.table, self.blocks
        is_new = sequence.row is None
        if is_new and self.config.prefix_cache and sequence.forced is None:
            leader = self._prompts.get(sequence.prompt.content)
            if leader is not None and leader.nodes[0] == blocks.root:  # it has nothing of earlier weights
                leader.followers += [sequence, *sequence.followers]
                sequence.followers = []
                return True
        # Those that run should not be stopped at once for one more: each will soon want a block, as will each sibling.
        reserve = len(self.running) + len(sequence.followers)
        hits = [block for block, _ in self.prefixes.find(sequence)]
        own = [] if sequence.row is None else table.blocks(sequence.row)
        missing = blocks.blocks_for(len(sequence)) - len(own) - len(hits)
        available = blocks.num_available - blocks.num_unreferenced(own + hits)
        if missing + reserve > available and (self.running or missing > available):
            return False
        if is_new:
            table.assign(sequence)
            sequence.nodes = [blocks.root]
        self.parking.unpark(sequence)
        self._join(sequence)
        assert sequence.row is not None
        if table.num_computed[sequence.row] < len(sequence) == sequence.prompt_len:
            content = sequence.prompt.content if self.config.prefix_cache else sequence.id
            if (other := self._prompts.get(content)) is not None:
                self._prompts[other.id] = other
            self._prompts[content] = sequence
        return True

    def _fork_groups(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[int, list[int]]:
        """Followers of every leader whose prompt this step completes get their rows; they share all its blocks."""
        forks: dict[int, list[int]] = {}
        if not self._prompts:
            return forks
        ends = dict(zip(rows.tolist(), (self.table.num_computed[rows] + counts).tolist(), strict=True))
        for content, leader in tuple(self._prompts.items()):
            assert leader.row is not None
            if self.table.num_computed[leader.row] >= leader.prompt_len:  # all of it came back from host memory
                del self._prompts[content]
                followers, leader.followers = leader.followers, []
                self._lead_themselves(followers)
                continue
            if ends.get(leader.row) != leader.prompt_len:
                continue
            del self._prompts[content]
            if leader.followers:
                forks[leader.row] = [self._fork(leader, follower) for follower in leader.followers]
                leader.followers = []
        return forks

    def _lead_themselves(self, followers: list[Sequence]) -> None:
        """The first of those that followed leads the others, and is the next new one to be admitted."""
        if followers:
            followers[0].followers = followers[1:]
            self.new.appendleft(followers[0])

    def _fork(self, leader: Sequence, sequence: Sequence) -> int:
        table = self.table
        assert leader.row is not None
        row = table.fork(leader.row, sequence)
        for block in table.blocks(row):
            self.blocks.share(block)
        # The step itself still writes the prompt's last tokens, once for all; what follows goes to copies.
        table.num_computed[row] = table.num_seen[row] = leader.prompt_len
        table.has_shared_tail[[leader.row, row]] = leader.prompt_len % table.block_size != 0
        sequence.nodes = leader.nodes.copy()
        self._join(sequence)
        return row

    # Taking back.

    def _preempt_youngest(self) -> None:
        """Room for those that run before; the only one that does needs none but for a copy, and is spared that."""
        if len(self.running) == 1:
            self._keep_tail(self.running[0])
            return
        self._preempt(self.running[-1])
        self.counts["preemptions"] += 1

    def _keep_tail(self, sequence: Sequence) -> None:
        """The block that the next token goes to becomes the sequence's own where it is: whoever is parked and claims it
        gives it up, and it is not found again."""
        table, row = self.table, sequence.row
        assert row is not None
        assert table.has_shared_tail[row], "a sequence fits into an empty cache: the engine checked that"
        block = int(table.block_tables[row, table.num_computed[row] // table.block_size])
        for other in self.parking.claimants(block):
            self.parking.drop(other, keeps=True)
        self.blocks.withdraw(block)
        table.has_shared_tail[row] = False

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        self.parking.park(sequence, between_rounds=False)
        self.preempted.appendleft(sequence)

    def _join(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=lambda running: running.id)
        self._rows = self._open = None
        if not sequence.has_begun:
            sequence.has_begun = True
            self._started.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        for content in (sequence.prompt.content, sequence.id):
            if self._prompts.get(content) is sequence:
                del self._prompts[content]
        self._rows = self._open = None

    def _leave_queue(self, sequence: Sequence) -> None:
        for queue in (self.preempted, self.resumed, self.new):
            if sequence in queue:
                queue.remove(sequence)
                return
            for leader in (*queue, *self.running):
                if sequence in leader.followers:
                    leader.followers.remove(sequence)
                    return

    # Small things.

    def _running_rows(self) -> NDArray[np.int64]:
        if self._rows is None:
            self._rows = np.array([sequence.row for sequence in self.running], dtype=np.int64)
        return self._rows

    def _open_rows(self) -> NDArray[np.int64]:
        """Those that run, but for rounds that are as long as they may be, which is known before their last tokens
        are."""
        if self._open is None:
            table, rows = self.table, self._running_rows()
            length = table.num_tokens[rows]
            self._open = rows[(length < table.round_end[rows]) & (length < table.max_context)]
        return self._open

    def _count(self, batch: Batch, before: NDArray[np.int64], after: NDArray[np.int64]) -> None:
        table, rows = self.table, batch.rows
        seen = table.num_seen[rows]
        recomputed = int(np.maximum(np.minimum(after, seen) - before, 0).sum())
        given, fresh = 0, np.maximum(before, seen)
        # A round's own tokens are drawn; of those before it the last may be, where the sequence was appended to.
        for i in np.flatnonzero(fresh < np.minimum(after, table.round_start[rows])):
            given += int(_IS_GIVEN[table.kinds[rows[i], fresh[i] : after[i]]].sum())
        self.counts["steps"] += 1
        self.counts["recomputed_tokens"] += recomputed
        self.counts["prefilled_tokens"] += recomputed + given
