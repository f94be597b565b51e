"""Runs one batch through the model: owns the KV cache, image features, each row's place in the tag automaton.

Shapes: T tokens, B sequences, U rows of logits, S samples, V vocabulary, L layers, R rows of the sequence table.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme.engine.batch import Batch, Scored
from thyme.engine.config import AttentionName, EngineConfig, check_context
from thyme.engine.download import Download
from thyme.engine.graph import DecodeGraphs, decodes_only, padded, padded_size
from thyme.engine.host_memory import HostMemory
from thyme.engine.image_features import ImageFeatures
from thyme.engine.in_flight import InFlight
from thyme.engine.phases import CODE
from thyme.engine.step_record import Launched, StepRecorder
from thyme.engine.tags import TagAutomaton
from thyme.engine.upload import Upload
from thyme.kernels import library
from thyme.kernels.attention_backend import attention_backend
from thyme.kernels.fp8 import FP8
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.kernels.native_step import NativeStep
from thyme.kernels.sample import SampleOutput, sample
from thyme.kernels.shared_prefix import SharedPrefix, shared_groups
from thyme.kernels.token_logprobs import token_logprobs
from thyme.model.fp8 import Fp8View, fp8_nbytes
from thyme.model.layers import MIN_ROWS
from thyme.model.model import Model
from thyme.model.packed import PackedView, ShortView, can_pack, has_short_way, packed_nbytes

SCORED_ROWS = 256
"""Forced tokens whose logits are in memory at once."""

_READ = ("slot_mapping", "block_tables", "context_lens", "cu_seqlens_q", "input_ids", "positions")
_DRAWN = (
    "logit_tokens",
    "sample_rows",
    "sample_logits",
    "temperatures",
    "seeds",
    "sample_positions",
)
_MAYBE = ("unread", "saved", "copies", "restored")
_SCORED = ("tokens", "token_ids", "temperatures")
_TRUNCATION = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Ban:
    """What may not be sampled: ids from `vocab_size` on, and where `mask` [V] bool is set."""

    vocab_size: int
    mask: Tensor | None


class ModelRunner:
    """The device's side of the engine.

    With `deterministic`, what a sequence computes has the same bits in whatever batch. That rests on four things. On a
    CPU, a matrix product gives a row the same bits whatever the number of rows, once there are a few: BLAS takes other
    paths for some numbers of rows below 12 (see MIN_ROWS), so batches, logits and the pictures' products are padded to
    16 rows. Norms and elementwise ops work row by row. Attention and sampling
    are computed per sequence, in an order that depends on its length alone. Images are encoded one by one. It costs
    speed only where a step has fewer than 16 rows. On a GPU only attention (ours, not flash-attn's) and sampling
    promise this; prefixes are then read by each sequence for itself, since what several read together is rounded
    differently.

    On a CPU the promise holds on one machine with one version of torch: another CPU's BLAS
    takes other paths and gives other bits.

    Args:
        model: run in inference mode, never changed.
        automaton: the tags, compiled against the model's tokenizer, as wide as the model's vocabulary.
        num_blocks, block_size: of the KV cache; block_size in tokens.
        deterministic: promise the above.
        float32_head: logits in float32, whatever the model's dtype: they are then rounded nowhere.
        image_cache_bytes, attention: see EngineConfig.
        packs_weights: run a PackedView of the model instead.
        fp8_weights: run an Fp8View of the model instead.
        fp8_cache: keep keys and values in 8 bits.
        host_kv_bytes, max_sequences, decode_graphs: see EngineConfig.

    Raises:
        ValueError: decode_graphs is asked for by name, and this attention cannot be captured.
    """

    def __init__(
        self,
        model: Model,
        automaton: TagAutomaton,
        num_blocks: int,
        block_size: int,
        *,
        deterministic: bool,
        float32_head: bool = True,
        image_cache_bytes: int = 0,
        attention: AttentionName = "auto",
        packs_weights: bool = False,
        fp8_weights: bool = False,
        fp8_cache: bool = False,
        host_kv_bytes: int = 0,
        max_sequences: int = 1,
        decode_graphs: bool | None = False,
    ) -> None:
        text = model.config.text
        self.model = model
        self.view: PackedView | None = None
        if packs_weights:
            self.view = PackedView(model, torch.float32 if float32_head else None)
        elif fp8_weights:
            self.view = Fp8View(model)
        elif has_short_way(model):
            self.view = ShortView(model)
        """What is run instead of `model`; its copies are made with the next batch."""
        self.device = model.device
        self.deterministic = deterministic
        self.float32_head = float32_head
        self._shape = (text.num_hidden_layers, 2, num_blocks, block_size, text.num_key_value_heads, text.head_dim)
        self._cache_dtype = FP8 if fp8_cache else model.dtype
        self.allocate()
        self._host = HostMemory(self._parts(), host_kv_bytes // self.block_bytes)
        self._scale = text.head_dim**-0.5
        self.attention = attention_backend(
            attention,
            self.device,
            model.dtype,
            block_size,
            text.head_dim,
            batch_invariant=deterministic,
            fp8_cache=fp8_cache,
        )
        """What computes attention."""
        self.shares_prefixes = self.attention.reads_shared_prefix and not deterministic
        self.recorder: StepRecorder | None = None
        self._vocab_size = text.vocab_size
        on_gpu, can_capture = self.device.type == "cuda", self.attention.reads_shared_prefix
        if decode_graphs and on_gpu and not can_capture:
            raise ValueError(
                f"EngineConfig.decode_graphs: attention by {self.attention.name} is not captured: say attention = "
                '"triton", or leave decode_graphs out'
            )
        replays = on_gpu and can_capture if decode_graphs is None else decode_graphs
        self.graphs = DecodeGraphs(self.device) if replays else None
        """Of steps that only decode; None: each step is launched anew."""
        self._most_decoded = max_sequences
        self._addresses: list[int] = []
        self._upload = Upload(self.device, packs=self.graphs is not None)
        self._download = Download(self.device, packs=self.graphs is not None)
        self.images = ImageFeatures(model, one_by_one=deterministic, cache_bytes=image_cache_bytes)
        # One lookup gives all three: next state, event << 16, kind << 20.
        events, kinds = automaton.event.astype(np.int32), automaton.kinds().astype(np.int32)
        packed = automaton.next_state.astype(np.int32) | events << 16 | kinds << 20
        self._transitions = self._told(packed.flatten())
        self._num_columns = packed.shape[1]
        self._columns = self._told(automaton.columns.astype(np.int64))
        self._phases = self._told(automaton.phases.astype(np.int64))
        self._is_place = self._told(automaton.is_place) if automaton.is_place.any() else None
        self._begins_number = self._told(automaton.begins_number)
        self._states = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._drawn = torch.zeros(0, dtype=torch.int64, device=self.device)
        """Of each row, as the state: its last token that was drawn."""
        self._settled: NDArray[np.int64] | None = None

    def _told(self, table: NDArray[Any]) -> Tensor:
        return torch.from_numpy(table).to(self.device)

    def allocate(self) -> None:
        """Takes the memory of the KV cache; what is in it is not defined."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # one tensor that large does not fit between what the allocator keeps cached
        self.kv_cache = torch.empty(self._shape, dtype=self._cache_dtype, device=self.device)
        self._layers = [(layer[0], layer[1]) for layer in self.kv_cache]
        self._take_scales()

    def _take_scales(self) -> None:
        """Those of a cache in 8 bits, [L, 2, blocks, block_size, Nkv] uint8."""
        shape = self._shape[:-1] if self._cache_dtype == FP8 and self._layers else (0,)
        self._kv_scales = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self._scales: list[dict[str, Tensor]] = [{} for _ in self._layers]
        if self._cache_dtype == FP8:
            self._scales = [{"k_scales": layer[0], "v_scales": layer[1]} for layer in self._kv_scales]

    @property
    def kv_nbytes(self) -> int:
        """Of the KV cache, scales included."""
        return self.kv_cache.nbytes + self._kv_scales.nbytes

    @property
    def block_bytes(self) -> int:
        """Of one block, over all layers."""
        return self.kv_nbytes // self._shape[2]

    def free_cache(self) -> None:
        """Gives the memory of the KV cache and of encoded images back; no batch is run until `allocate`."""
        self._forget_graphs()  # they know the cache's addresses
        self._layers = []
        self.kv_cache = torch.empty(0, dtype=self._cache_dtype, device=self.device)
        self._take_scales()
        self.images.forget()

    def free_weights(self) -> None:
        """Gives the memory of the copies of weights back; the next batch makes them anew."""
        if self.view is not None:
            self._forget_graphs()
            self.view.free()

    def weights_updated(self) -> None:
        """The weights have changed, where they lie or elsewhere: nothing made from the old ones is used again."""
        self.images.forget()
        if self.view is not None:
            self.view.outdate()
        addresses = [parameter.data_ptr() for parameter in self.model.parameters()]
        if addresses != self._addresses:
            self._forget_graphs()
        self._addresses = addresses

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()

    def settle(self, rows: NDArray[np.int64], states: NDArray[Any]) -> None:
        """Where the automaton is in these rows, after a step with drafts or one that failed: what counts of it is for
        the host to say, and the device is told with the next step."""
        self._settled = np.stack([rows, states.astype(np.int64)])

    @torch.inference_mode()
    def launch(self, batch: Batch, bans: list[Ban]) -> InFlight:
        """Has the device compute the batch's tokens and draw one for each sample; waits for nothing."""
        if self.view is not None:
            if self.view.refresh():
                self._forget_graphs()
            self.model = self.images.model = self.view.model
        shown, replays = batch, self.graphs is not None and decodes_only(batch)
        if replays:
            least = MIN_ROWS if self.deterministic else 1
            shown = padded(batch, padded_size(len(batch.rows), self._most_decoded, least))
        sent = self._upload(self._arrays(shown, replays=replays))
        recorded: Launched | None = None if self.recorder is None else self.recorder.begin(batch)
        self._move_blocks(batch, sent)
        if "settled" in sent:
            settled, states = sent["settled"]
            self._states[settled] = states
            self._settled = None
        if "begins" in sent:
            self._start_rounds(batch, *sent["begins"])
        if "unread" in sent:
            places, rows = sent["unread"]
            sent["input_ids"][places] = self._drawn[rows]  # where a graph reads them
        if batch.num_tokens:
            hidden = self._replayed(shown, sent) if replays else self._forward(shown, sent)
        else:
            hidden = self._nothing()
        scores = [] if batch.scored is None else [self._score(hidden, batch.scored, sent, bans)]
        packed, first = torch.zeros((7, 0), dtype=torch.int32, device=self.device), None
        if len(batch.sample_rows):
            packed, first = self._draw(hidden, batch, sent, bans)
        if recorded is not None:
            recorded.clock.stop()
        return InFlight(batch, self._download([packed, *scores]), first, recorded)

    def _draw(
        self, hidden: Tensor, batch: Batch, sent: dict[str, Tensor], bans: list[Ban]
    ) -> tuple[Tensor, Tensor | None]:
        """[7, S] int32 of the samples, as InFlight has them, and the hidden states that first ones are drawn from."""
        if len(batch.logit_tokens) < len(hidden):
            hidden = hidden[sent["logit_tokens"]]
        if batch.branched:
            hidden = torch.cat((hidden, torch.stack(batch.branched)))
        first = hidden[sent["first"]] if len(batch.first) else None
        logits = self._logits(hidden, batch, sent)
        rows = sent["sample_rows"]
        states = self._states[rows]
        if batch.drafted is not None:
            states = torch.where(sent["depths"] > 0, sent["states"], states)
        phases = self._phases_of(states, logits, batch, sent, bans)
        by_phase = {
            name: sent[name].gather(1, phases[:, None]).squeeze(1)
            for name in ("temperatures", *(_TRUNCATION if batch.truncation is not None else ()))
        }
        temperature = by_phase.pop("temperatures")
        drawn = self._sample(logits, temperature, by_phase, batch, sent, bans)
        found = self._transitions[states * self._num_columns + self._columns[drawn.token]]
        if batch.drafted is None:
            self._states[rows] = (found & 0xFFFF).long()
            self._drawn[rows] = drawn.token
        logprob = drawn.logprob if batch.truncation is None else drawn.logprob - drawn.kept_mass.log()
        floats = (logprob, drawn.logprob_raw, drawn.entropy, temperature, drawn.kept_mass)
        found = found | (phases << 24).int()
        return torch.stack([drawn.token.int(), found, *(x.float().view(torch.int32) for x in floats)]), first

    def _move_blocks(self, batch: Batch, sent: dict[str, Tensor]) -> None:
        """Out to host memory, from one to another, and back, in this order: what is planned counts on it."""
        if "saved" in sent:
            self._host.save(self._parts(), sent["saved"][0], batch.saved[1])
        if "copies" in sent:
            source, target = sent["copies"]
            for part in self._parts():
                part[:, :, target] = part[:, :, source]
        if "restored" in sent:
            self._host.restore(self._parts(), batch.restored[0], sent["restored"][1])

    def _parts(self) -> list[Tensor]:
        """What the KV of a block is in, [L, 2, blocks, ...] each."""
        if self._cache_dtype != FP8:
            return [self.kv_cache]
        return [self.kv_cache.view(torch.uint8), self._kv_scales]

    def _arrays(self, batch: Batch, *, replays: bool = False) -> dict[str, NDArray]:
        """All that the device is told of a step, pixels aside; what the model reads comes first."""
        arrays: dict[str, NDArray] = {name: getattr(batch, name) for name in _READ}
        if self.shares_prefixes and batch.num_tokens:
            block_size = self.kv_cache.shape[3]
            shown = (batch.block_tables, batch.context_lens, batch.counts, block_size)
            groups = shared_groups(*shown)
            if groups is not None and replays:
                groups = shared_groups(*shown, num_groups=len(batch.counts))
            if groups is not None:
                arrays["cu_groups"], arrays["group_blocks"] = groups
        arrays |= {name: getattr(batch, name) for name in _DRAWN}
        arrays |= {name: found for name in _MAYBE if (found := getattr(batch, name)).size}
        if batch.scored is not None:
            arrays |= {f"scored {name}": getattr(batch.scored, name) for name in _SCORED}
        if batch.drafted is not None:
            arrays |= {"depths": batch.drafted.depths, "states": batch.drafted.states}
        if self._settled is not None:
            arrays["settled"] = self._settled
        if begins := [(s.row, s.begins_in) for s in batch.started if s.row is not None]:
            arrays["begins"] = np.array(begins).T
        if len(batch.first):
            arrays["first"] = batch.sample_logits[batch.first]
        if batch.images:
            places = [np.arange(part.token, part.token + part.count) for part in batch.images]
            arrays["image_places"] = np.concatenate(places)
        if batch.truncation is not None:
            arrays |= {name: getattr(batch.truncation, name) for name in _TRUNCATION}
        arrays |= {f"penalized {i}": item.token_ids for i, item in enumerate(batch.penalties)}
        kinds = np.unique(batch.bans)
        if len(kinds) > 1:
            arrays |= {f"ban {kind}": np.flatnonzero(batch.bans == kind) for kind in kinds}
        return arrays

    def _forward(self, batch: Batch, sent: dict[str, Tensor]) -> Tensor:
        """Hidden states [T, H], followed by padding."""
        num_tokens = batch.num_tokens
        padding = max(0, MIN_ROWS - num_tokens) if self.deterministic else 0
        slots = sent["slot_mapping"]
        placement = [sent[name] for name in ("block_tables", "context_lens", "cu_seqlens_q")]
        options: dict[str, Any] = dict(scale=self._scale, max_query_len=int(batch.counts.max(initial=0)))
        if "cu_groups" in sent:
            options["shared"] = SharedPrefix(sent["cu_groups"], sent["group_blocks"])
        step = None
        if self.attention.is_native and library.watch is None:
            step = NativeStep(self._layers, slots, *placement, scale=self._scale)

        def attend(layer: int, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
            caches, scales = self._layers[layer], self._scales[layer]
            if padding:
                qkv, cos, sin = qkv[:num_tokens], cos[:num_tokens], sin[:num_tokens]
            if step is not None:
                out = step(layer, qkv, num_kv_heads, cos, sin)
            else:
                q = mrope_write_kv(qkv, cos, sin, *caches, slots, **scales)
                out = self.attention.run(q, *caches, *placement, **options, **scales)
            return out if padding == 0 else torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding))

        input_ids, positions = sent["input_ids"], sent["positions"]
        if padding:
            input_ids = torch.nn.functional.pad(input_ids, (0, padding))
            positions = torch.nn.functional.pad(positions, (0, padding))
        hidden: Tensor = self.model(
            input_ids,
            positions,
            attend if padding or step is None else step,
            image_features=self.images.of(batch.images) if batch.images else None,
            image_positions=sent.get("image_places"),
        )
        return hidden

    def _nothing(self) -> Tensor:
        """Hidden states of no token: all that is drawn begins a branch."""
        text = self.model.config.text
        return torch.zeros(0, text.hidden_size, dtype=self.model.dtype, device=self.device)

    def _replayed(self, batch: Batch, sent: dict[str, Tensor]) -> Tensor:
        """`_forward` of a padded batch, as it was captured: whatever it reads lies where it lay then."""
        assert self.graphs is not None
        key = (batch.block_tables.shape, "cu_groups" in sent, self._upload.address)
        return self.graphs.run(key, partial(self._forward, batch, sent))

    def _score(self, hidden: Tensor, scored: Scored, sent: dict[str, Tensor], bans: list[Ban]) -> Tensor:
        """[3, F] log-probs at their temperatures (0 where greedy), log-probs at temperature 1, and entropies."""
        out: list[Tensor] = []
        for kind, first, count in zip(*np.unique(scored.bans, return_index=True, return_counts=True), strict=True):
            among: dict[str, Any] = dict(vocab_size=bans[kind].vocab_size, banned_ids=bans[kind].mask)
            for start in range(first, first + count, SCORED_ROWS):
                end = min(start + SCORED_ROWS, first + count)
                tokens, ids, temperatures = (sent[f"scored {name}"][start:end] for name in _SCORED)
                logits = self._head(hidden[tokens])
                raw, entropy = token_logprobs(logits, ids, **among)
                drawn = token_logprobs(logits, ids, temperature=temperatures, **among)[0]
                drawn = torch.where(temperatures == 0, 0.0, drawn)
                out.append(torch.stack((drawn, raw, entropy)).float())
        return torch.cat(out, dim=1)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.logits(
            hidden, min_rows=MIN_ROWS if self.deterministic else 0, dtype=torch.float32 if self.float32_head else None
        )

    def _logits(self, hidden: Tensor, batch: Batch, sent: dict[str, Tensor]) -> Tensor:
        logits = self._head(hidden)
        if len(batch.sample_logits) > len(hidden):
            logits = logits[sent["sample_logits"]]
        for i, item in enumerate(batch.penalties):
            ids = sent[f"penalized {i}"]
            seen = logits[item.sample, ids]
            logits[item.sample, ids] = torch.where(seen < 0, seen * item.penalty, seen / item.penalty)
        return logits

    def _phases_of(
        self, states: Tensor, logits: Tensor, batch: Batch, sent: dict[str, Tensor], bans: list[Ban]
    ) -> Tensor:
        """[S] the phase of each token that is about to be drawn; a place of a number is one if a number is likely."""
        phases = self._phases[states]
        if self._is_place is None:
            return phases
        kinds = np.unique(batch.bans)
        likeliest = torch.empty_like(states)
        for kind in kinds:
            place = slice(None) if len(kinds) == 1 else sent[f"ban {kind}"]
            among = logits[place, : bans[kind].vocab_size]
            mask = bans[kind].mask
            likeliest[place] = (among if mask is None else among.masked_fill(mask, -torch.inf)).argmax(-1)
        is_syntax = self._is_place[states] & ~self._begins_number[likeliest]
        return torch.where(is_syntax, CODE, phases)

    def _sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        limits: dict[str, Tensor],
        batch: Batch,
        sent: dict[str, Tensor],
        bans: list[Ban],
    ) -> SampleOutput:
        draw = partial(sample, bitwise_logprobs=self.deterministic)
        columns: dict[str, Any] = {"seed": sent["seeds"], "position": sent["sample_positions"], **limits}
        kinds = np.unique(batch.bans)
        if len(kinds) == 1:
            ban = bans[kinds[0]]
            return draw(logits, temperature, vocab_size=ban.vocab_size, banned_ids=ban.mask, **columns)
        # Requests that ban different ids are drawn apart.
        places = [sent[f"ban {kind}"] for kind in kinds]
        parts = [
            draw(
                logits[place],
                temperature[place],
                vocab_size=bans[kind].vocab_size,
                banned_ids=bans[kind].mask,
                **{name: column[place] for name, column in columns.items()},
            )
            for kind, place in zip(kinds, places, strict=True)
        ]
        back = torch.cat(places).argsort()
        return SampleOutput(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))

    def _start_rounds(self, batch: Batch, rows: Tensor, states: Tensor) -> None:
        """Sets the automaton of these rows to where their rounds begin."""
        last = max(sequence.row for sequence in batch.started if sequence.row is not None)
        missing = last + 1 - len(self._states)
        if missing > 0:
            more = (0, missing + len(self._states))
            self._states, self._drawn = (torch.nn.functional.pad(x, more) for x in (self._states, self._drawn))
        self._states[rows] = states


def num_kv_blocks(model: Model, config: EngineConfig, reserved: int) -> int:
    """Blocks of the KV cache: as configured, else what free memory, less `reserved` bytes, has room for and the
    sequences can use."""
    text = model.config.text
    if config.num_blocks is not None:
        return config.num_blocks
    head = text.head_dim + 1 if config.kv_dtype == "fp8" else text.head_dim * model.dtype.itemsize
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head
    if config.kv_bytes is not None:
        limit = config.kv_bytes
    else:
        context = config.max_context or text.max_position_embeddings
        useful = config.max_sequences * -(-context // config.block_size) * config.block_size * per_token
        limit = min(useful, int((_free_memory(model.device) - reserved) * config.memory_fraction))
    num_blocks = limit // (per_token * config.block_size)
    if num_blocks < 1:
        raise ValueError(
            f"the KV cache has no room: {limit} bytes for blocks of {per_token * config.block_size}: raise "
            "kv_bytes or memory_fraction, or free memory"
        )
    if config.kv_bytes is not None and config.max_context is not None:
        check_context(config.max_context, num_blocks, config.block_size)
    return num_blocks


def _head_dtype(config: EngineConfig) -> torch.dtype | None:
    return torch.float32 if config.head_dtype == "float32" else None


def packed_bytes(model: Model, config: EngineConfig) -> int:
    """What the engine's copies of the weights will take; 0 where there are none."""
    if config.weight_dtype == "fp8":
        return fp8_nbytes(model)
    return packed_nbytes(model, _head_dtype(config)) if packs_weights(model, config) else 0


def packs_weights(model: Model, config: EngineConfig) -> bool:
    """Whether the engine runs packed copies of the weights: as configured, else where they serve and fit.

    Raises:
        ValueError: they are asked for by name and the model is not in float32 or bfloat16 on a CPU.
    """
    if config.pack_weights is None:
        if config.deterministic or config.weight_dtype == "fp8" or not can_pack(model):
            return False
        return packed_nbytes(model, _head_dtype(config)) <= _free_memory(model.device) // 4
    if config.pack_weights and not can_pack(model):
        raise ValueError(
            f"EngineConfig.pack_weights: weights are packed in float32 on a CPU, and in bfloat16 on one that "
            f"multiplies bfloat16, the model is in {model.dtype} on {model.device}: leave it out"
        )
    return config.pack_weights


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
