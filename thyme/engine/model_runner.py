"""Runs one batch through the model: owns the KV cache, image features in use, each row's place in the tag automaton.

Shapes: T tokens, B sequences, U rows of logits, S samples, V vocabulary, L layers, R rows of the sequence table.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme.engine.batch import Batch, ImageSlice
from thyme.engine.config import AttentionName, EngineConfig, check_context
from thyme.engine.sequence import Sampled
from thyme.engine.tags import TagAutomaton
from thyme.kernels.attention_backend import attention_backend, reads_shared_prefix
from thyme.kernels.kv_cache import mrope_write_kv
from thyme.kernels.paged_attention import SharedPrefix
from thyme.kernels.sample import SampleOutput, sample
from thyme.model.image_processor import ImageInputs
from thyme.model.model import MIN_ROWS, Model
from thyme.model.packed import PackedView, can_pack, packed_nbytes


@dataclass(frozen=True, slots=True)
class Ban:
    """What may not be sampled: ids from `vocab_size` on, and where `mask` [V] bool is set."""

    vocab_size: int
    mask: Tensor | None


@dataclass(slots=True)
class _Features:
    """Of one image, for as long as a live sequence shows it."""

    image: ImageInputs
    holders: int = 1
    values: Tensor | None = field(default=None)
    """[num_tokens, H]; None until first needed, and again when the weights change."""


class ModelRunner:
    """The device's side of the engine.

    With `deterministic`, what a sequence computes has the same bits in whatever batch. That rests on four things. On a
    CPU, a matrix product gives a row the same bits whatever the number of rows, once there are a few: BLAS takes other
    paths for one and two rows (measured with MKL in torch 2.13: 4 to 2048 rows agree, on one thread and on two),
    so batches and logits are padded to 16 rows. Norms and elementwise ops work row by row. Attention and sampling
    are computed per sequence, in an order that depends on its length alone. Images are encoded one by one. It costs
    speed only where a step has fewer than 16 rows. On a GPU only attention (ours, not flash-attn's) and sampling
    promise this; prefixes are then read by each sequence for itself, since what several read together is rounded
    differently.

    On a CPU the promise holds on one machine with one version of torch: another CPU's BLAS
    takes other paths and gives other bits.

    Args:
        model: run in inference mode, never changed.
        automaton: the tags, compiled against the model's tokenizer.
        num_blocks, block_size: of the KV cache; block_size in tokens.
        deterministic: promise the above.
        attention: see EngineConfig.attention.
        packs_weights: run a PackedView of the model instead.
    """

    def __init__(
        self,
        model: Model,
        automaton: TagAutomaton,
        num_blocks: int,
        block_size: int,
        *,
        deterministic: bool,
        attention: AttentionName = "auto",
        packs_weights: bool = False,
    ) -> None:
        text = model.config.text
        self.model = model
        self.packed = PackedView(model) if packs_weights else None
        """What is run instead of `model`; its copies are made with the next batch."""
        self.device = model.device
        self.deterministic = deterministic
        self._shape = (text.num_hidden_layers, 2, num_blocks, block_size, text.num_key_value_heads, text.head_dim)
        self.allocate()
        self._scale = text.head_dim**-0.5
        self._attend = attention_backend(
            attention, self.device, model.dtype, block_size, text.head_dim, batch_invariant=deterministic
        )
        self._shares_prefixes = reads_shared_prefix(self._attend, self.device) and not deterministic
        self._vocab_size = text.vocab_size
        self._features: dict[str, _Features] = {}
        self.num_encoded = 0
        """Images encoded so far."""
        # One lookup gives all three: next state, event << 8, kind << 16. Ids the tokenizer lacks are never sampled.
        packed = automaton.next_state | automaton.event.astype(np.int32) << 8 | automaton.kinds().astype(np.int32) << 16
        padded = np.zeros((len(packed), text.vocab_size), dtype=np.int32)
        padded[:, : packed.shape[1]] = packed
        self._transitions = torch.from_numpy(padded).flatten().to(self.device)
        self._temperature_mode = torch.from_numpy(automaton.temperature_mode.astype(np.int64)).to(self.device)
        self._states = torch.zeros(0, dtype=torch.int64, device=self.device)

    def allocate(self) -> None:
        """Takes the memory of the KV cache; what is in it is not defined."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # one tensor that large does not fit between what the allocator keeps cached
        self.kv_cache = torch.empty(self._shape, dtype=self.model.dtype, device=self.device)
        self._layers = [(layer[0], layer[1]) for layer in self.kv_cache]

    def free(self) -> None:
        """Gives the memory of the KV cache, of encoded images and of packed weights back; no batch is run until
        `allocate`."""
        if self.packed is not None:
            self.packed.free()
        self._layers = []
        self.kv_cache = torch.empty(0, dtype=self.model.dtype, device=self.device)
        self.forget_features()

    def hold_images(self, images: Iterable[ImageInputs]) -> None:
        """A sequence shows these images from now on. Equal images share their features."""
        for image in images:
            if (known := self._features.get(image.digest)) is not None:
                known.holders += 1
            else:
                self._features[image.digest] = _Features(image)

    def release_images(self, images: Iterable[ImageInputs]) -> None:
        """The sequence is gone."""
        for image in images:
            known = self._features[image.digest]
            known.holders -= 1
            if known.holders == 0:
                del self._features[image.digest]

    def forget_features(self) -> None:
        """The weights have changed: images still to be prefilled are encoded again."""
        for known in self._features.values():
            known.values = None

    @torch.inference_mode()
    def run(self, batch: Batch, bans: list[Ban]) -> Sampled:
        """Computes the batch's tokens and draws one for each sample; the one wait for the device is at the end."""
        if self.packed is not None:
            self.packed.refresh()
            self.model = self.packed.model
        if batch.copies.size:
            source, target = self._to_device(batch.copies)
            self.kv_cache[:, :, target] = self.kv_cache[:, :, source]
        if batch.started:
            self._start_rounds([sequence.row for sequence in batch.started if sequence.row is not None])
        hidden = self._forward(batch)
        if not len(batch.sample_rows):
            empty = np.zeros(0, dtype=np.uint8)
            return Sampled(empty.astype(np.int64), empty, empty, np.zeros((4, 0), dtype=np.float32))
        logits = self._logits(hidden, batch)
        rows = self._to_device(batch.sample_rows)
        states = self._states[rows]
        modes = self._temperature_mode[states]
        temperature = self._to_device(batch.temperatures).gather(1, modes[:, None]).squeeze(1)
        drawn = self._sample(logits, temperature, batch, bans)
        found = self._transitions[states * self._vocab_size + drawn.token]
        self._states[rows] = (found & 0xFF).long()
        logprob = drawn.logprob if batch.truncation is None else drawn.logprob - drawn.kept_mass.log()
        floats = (logprob, drawn.logprob_raw, drawn.entropy, temperature)
        packed = torch.stack([drawn.token.int(), found, *(x.float().view(torch.int32) for x in floats)])
        return _unpack(packed.cpu().numpy())

    def _forward(self, batch: Batch) -> Tensor:
        """Hidden states [U, H] of the tokens whose successor is drawn."""
        num_tokens = batch.num_tokens
        padding = max(0, MIN_ROWS - num_tokens) if self.deterministic else 0
        slots = self._to_device(batch.slot_mapping)
        placement = [self._to_device(array) for array in (batch.block_tables, batch.context_lens, batch.cu_seqlens_q)]
        options: dict[str, Any] = dict(scale=self._scale, max_query_len=int(batch.counts.max(initial=0)))
        if self._shares_prefixes:
            block_size = self.kv_cache.shape[3]
            options["shared"] = SharedPrefix.find(
                batch.block_tables, batch.context_lens, batch.counts, block_size, self.device
            )

        def attend(layer: int, qkv: Tensor, num_kv_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
            caches = self._layers[layer]
            if padding:
                qkv, cos, sin = qkv[:num_tokens], cos[:num_tokens], sin[:num_tokens]
            q = mrope_write_kv(qkv, cos, sin, *caches, slots)
            out = self._attend(q, *caches, *placement, **options)
            return out if padding == 0 else torch.nn.functional.pad(out, (0, 0, 0, 0, 0, padding))

        input_ids, positions = self._to_device(batch.input_ids), self._to_device(batch.positions)
        if padding:
            input_ids = torch.nn.functional.pad(input_ids, (0, padding))
            positions = torch.nn.functional.pad(positions, (0, padding))
        features, places = self._image_features(batch.images) if batch.images else (None, None)
        hidden: Tensor = self.model(input_ids, positions, attend, image_features=features, image_positions=places)
        return hidden[self._to_device(batch.logit_tokens)] if len(batch.logit_tokens) < len(hidden) else hidden

    def _logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        logits = self.model.logits(hidden, min_rows=MIN_ROWS if self.deterministic else 0)
        if len(batch.sample_logits) > len(hidden):
            logits = logits[self._to_device(batch.sample_logits)]
        for item in batch.penalties:
            ids = self._to_device(item.token_ids)
            seen = logits[item.sample, ids]
            logits[item.sample, ids] = torch.where(seen < 0, seen * item.penalty, seen / item.penalty)
        return logits

    def _sample(self, logits: Tensor, temperature: Tensor, batch: Batch, bans: list[Ban]) -> SampleOutput:
        draw = partial(sample, bitwise_logprobs=self.deterministic)
        columns: dict[str, Any] = {
            "seed": self._to_device(batch.seeds),
            "position": self._to_device(batch.sample_positions),
        }
        if batch.truncation is not None:
            truncation = batch.truncation
            columns |= {name: self._to_device(getattr(truncation, name)) for name in ("top_k", "top_p", "min_p")}
        kinds = np.unique(batch.bans)
        if len(kinds) == 1:
            ban = bans[kinds[0]]
            return draw(logits, temperature, vocab_size=ban.vocab_size, banned_ids=ban.mask, **columns)
        # Requests that ban different ids are drawn apart.
        places = [self._to_device(np.flatnonzero(batch.bans == kind)) for kind in kinds]
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

    def _start_rounds(self, rows: list[int]) -> None:
        """Sets the automaton of these rows to its start."""
        missing = max(rows) + 1 - len(self._states)
        if missing > 0:
            self._states = torch.nn.functional.pad(self._states, (0, missing + len(self._states)))
        self._states[self._to_device(np.array(rows))] = 0

    def _image_features(self, slices: list[ImageSlice]) -> tuple[Tensor, Tensor]:
        wanted = {part.image.digest: self._features[part.image.digest] for part in slices}
        missing = [known for known in wanted.values() if known.values is None]
        for group in ([known] for known in missing) if self.deterministic else ([missing] if missing else ()):
            pixels = torch.from_numpy(np.concatenate([known.image.pixel_values for known in group]))
            pixels = pixels.to(self.device, self.model.dtype)
            features = self.model.encode_images(pixels, [known.image.grid for known in group])
            sizes = [known.image.num_tokens for known in group]
            for known, values in zip(group, features.split(sizes), strict=True):
                known.values = values
            self.num_encoded += len(group)
        shown = [_values(wanted[part.image.digest])[part.start : part.start + part.count] for part in slices]
        places = np.concatenate([np.arange(part.token, part.token + part.count) for part in slices])
        return torch.cat(shown), self._to_device(places)

    def _to_device(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _values(features: _Features) -> Tensor:
    assert features.values is not None
    return features.values


def _unpack(packed: NDArray[np.int32]) -> Sampled:
    found = packed[1]
    records = packed[2:].view(np.float32)
    broken = int((~np.isfinite(records[2])).sum())
    if broken:
        raise ValueError(
            f"the model's logits hold NaN or infinity, or nothing finite that may be sampled, in {broken} of "
            f"{len(found)} rows: its weights are broken, load those of an earlier checkpoint"
        )
    return Sampled(
        token_ids=packed[0].astype(np.int64),
        events=(found >> 8 & 0xFF).astype(np.uint8),
        kinds=(found >> 16).astype(np.uint8),
        records=records,
    )


def num_kv_blocks(model: Model, config: EngineConfig, reserved: int) -> int:
    """Blocks of the KV cache: as configured, else what free memory, less `reserved` bytes, has room for and the
    sequences can use."""
    text = model.config.text
    if config.num_blocks is not None:
        return config.num_blocks
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
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


def packs_weights(model: Model, config: EngineConfig) -> bool:
    """Whether the engine runs packed copies of the weights: as configured, else where they serve and fit.

    Raises:
        ValueError: they are asked for by name and the model is not in float32 or bfloat16 on a CPU.
    """
    if config.pack_weights is None:
        if config.deterministic or not can_pack(model):
            return False
        return packed_nbytes(model) <= _free_memory(model.device) // 4
    if config.pack_weights and not can_pack(model):
        raise ValueError(
            f"EngineConfig.pack_weights: weights are packed in float32 and bfloat16 on a CPU, the model is in "
            f"{model.dtype} on {model.device}: leave it out"
        )
    return config.pack_weights


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
