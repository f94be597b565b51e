"""Samples, and how they become packed batches: sequences laid end to end, no padding, common prefixes once if wanted.

Everything in a Sample is aligned to the token itself: weights[t] says how much predicting token t counts. A TrainBatch
is aligned to predictions: row i takes the hidden state before a trained token. Only tokens that are trained get a row,
so logits exist for them alone. The weights already carry the denominator of the whole global batch: the losses of its
micro-batches simply add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thyme.model.image_processor import ImageInputs
from thyme.model.prefix_tree import PrefixTree
from thyme.train.prefix_sharing import Keys, Trie, micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence of T tokens to learn from. The optional arrays are needed by the policy loss only."""

    token_ids: NDArray[np.int64]
    """[T], each image already expanded to its tokens."""
    positions: NDArray[np.int64]
    """[3, T]: time, row, column of M-RoPE."""
    weights: NDArray[np.float32]
    """[T]: the weight of predicting token t; 0 is not trained. weights[0] is 0, since nothing comes before."""
    images: tuple[ImageInputs, ...] = ()
    """In the order of their tokens."""
    advantages: NDArray[np.float32] | None = None
    """[T]."""
    temperatures: NDArray[np.float32] | None = None
    """[T]: the temperature token t was sampled at; 0 is greedy."""
    rollout_logprobs: NDArray[np.float32] | None = None
    """[T]: what the engine recorded, at the token's temperature; at temperature 1 where greedy."""
    segments: NDArray[np.uint8] | None = None
    """[T]: 0 text, 1 code."""
    phases: NDArray[np.uint8] | None = None
    """[T]: number of the phase it was drawn in."""
    name: str = ""
    """What it is called where its loss is not finite."""
    source: str = ""
    """Where its row comes from, for figures by source."""
    rank: int = 0
    """Which rank has its pictures, and trains it."""
    group: int | None = None
    """Samples of one group follow each other, and stay together where they share prefixes."""

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        for name in ("positions", "weights", *_PER_TOKEN):
            array = getattr(self, name)
            if array is not None and array.shape[-1] != length:
                raise ValueError(f"sample: {name} has {array.shape[-1]} entries for {length} tokens")
        if length == 0 or self.weights[0] != 0:
            raise ValueError("sample: the first token can't be trained, since nothing comes before it")


_PER_TOKEN = ("advantages", "temperatures", "rollout_logprobs", "segments", "phases")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """What one forward pass reads: T packed tokens, N trained rows, M image features."""

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[3, T] int64."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, or of each node of `tree`; they sum to T."""
    pixel_values: Tensor | None
    """[P, patch] float32: the patches of the distinct images; None without images."""
    grids: tuple[tuple[int, int, int], ...]
    """(t, h, w) in patches, of each distinct image."""
    image_positions: Tensor | None
    """[M] int64: the packed tokens that image features replace."""
    feature_rows: Tensor | None
    """[M] int64: which feature of the distinct images goes there; None when they stand in order."""
    rows: Tensor
    """[N] int64: the packed token whose hidden state predicts the trained token."""
    targets: Tensor
    """[N] int64."""
    weights: Tensor
    """[N] float32, none 0."""
    cu_seqlens: Tensor
    """[S + 1] int32: where each sequence's rows begin."""
    tree: PrefixTree | None = None
    """Of the packed tokens, where sequences share some; None: each sequence has its own."""
    advantages: Tensor | None = None
    """[N] float32."""
    temperatures: Tensor | None = None
    """[N] float32."""
    rollout_logprobs: Tensor | None = None
    """[N] float32."""
    segments: Tensor | None = None
    """[N] uint8."""
    phases: Tensor | None = None
    """[N] uint8."""
    old_logprobs: Tensor | None = None
    """[N] float32: under the policy that the ratio is against, at temperatures; None: the one that is trained."""
    ref_logprobs: Tensor | None = None
    """[N] float32: under the KL term's reference, at temperatures; None: not computed yet."""
    names: tuple[str, ...] = ()
    """Of the samples in it, where they have one."""
    sources: tuple[str, ...] = ()
    """[S] of each sequence."""
    num_weighted: int | None = None
    """How many weights are not 0, where the host knows: then no loss has to ask the device for it."""
    tempered: bool = True
    """Whether a temperature may be other than 0 and 1, which makes a second exponential of each logit."""
    same_bits: bool = False
    """Attend as the engine does (thyme.train.attention), where log-probs must have the bits that it recorded."""

    def to(self, device: torch.device) -> Self:
        """The batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def pack(
    samples: Sequence[Sample],
    *,
    image_token_id: int | None,
    max_tokens: int | None = None,
    share_prefixes: bool = False,
) -> list[TrainBatch]:
    """Packs the samples of one global batch into micro-batches of at most `max_tokens` tokens each.

    Samples are taken in order, so the rollouts of a question stay together and share their images, which a micro-batch
    encodes once each. A sample longer than `max_tokens` gets a micro-batch of its own; one in which nothing is trained
    is left out.

    Args:
        samples: of the batch.
        image_token_id: of an image feature.
        max_tokens: packed tokens of a micro-batch; None: all in one.
        share_prefixes: what samples have in common from their beginning on is packed once (thyme.train.prefix_sharing),
            and a group that fits into a micro-batch is not cut. The losses and gradients are the same.

    Raises:
        ValueError: image tokens and images of a sample don't match, or only some samples carry a per-token array.
    """
    samples = [sample for sample in samples if sample.weights.any()]
    if share_prefixes:
        keys = token_keys(samples, image_token_id)
        out: list[TrainBatch] = []
        trained = [int(np.count_nonzero(sample.weights)) for sample in samples]
        for micro_batch in micro_batches(keys, trained, [sample.group for sample in samples], max_tokens):
            trie = Trie()
            for i in micro_batch:
                trie.insert(keys[i])
            out.append(_pack_one([samples[i] for i in micro_batch], image_token_id, trie))
        return out
    parts: list[list[Sample]] = []
    budget = 0
    for sample in samples:
        length = len(sample.token_ids)
        if not parts or (max_tokens is not None and length > budget):
            parts.append([])
            budget = max_tokens or 0
        parts[-1].append(sample)
        budget -= length
    return [_pack_one(part, image_token_id) for part in parts]


def token_keys(samples: Sequence[Sample], image_token_id: int | None) -> list[Keys]:
    """The keys of each sample's tokens; pictures are told by their digests.

    Raises:
        ValueError: image tokens and images of a sample don't match.
    """
    numbers: dict[str, int] = {}
    out: list[Keys] = []
    for sample in samples:
        _check_images(sample, image_token_id)
        pictures = np.full(len(sample.token_ids), -1, dtype=np.int64)
        which = [numbers.setdefault(image.digest, len(numbers)) for image in sample.images]
        counts = [image.num_tokens for image in sample.images]
        pictures[sample.token_ids == image_token_id] = np.repeat(np.array(which, dtype=np.int64), counts)
        out.append(np.stack([sample.token_ids, *sample.positions, pictures], axis=1))
    return out


def _check_images(sample: Sample, image_token_id: int | None) -> None:
    """Raises ValueError where a sample has not one image token for each feature of its images."""
    expected, found = sum(i.num_tokens for i in sample.images), int((sample.token_ids == image_token_id).sum())
    if expected != found:
        raise ValueError(f"sample: {found} image tokens for {len(sample.images)} images of {expected} features")


def _pack_one(samples: list[Sample], image_token_id: int | None, trie: Trie | None = None) -> TrainBatch:
    """One micro-batch; `trie` has the samples' tokens, in their order."""
    tree: PrefixTree | None = None
    places: list[NDArray[np.int64]] = []
    if trie is not None and trie.size < sum(len(sample.token_ids) for sample in samples):
        tree, places = trie.layout()
    else:  # equal lengths side by side: attention runs them as one batch
        samples = sorted(samples, key=lambda sample: len(sample.token_ids))
        ends = np.cumsum([len(sample.token_ids) for sample in samples])
        places = [np.arange(end - len(sample.token_ids), end) for sample, end in zip(samples, ends, strict=True)]
    lengths = tuple(len(sample.token_ids) for sample in samples) if tree is None else tree.lengths
    input_ids, positions = np.empty(sum(lengths), dtype=np.int64), np.empty((3, sum(lengths)), dtype=np.int64)
    for sample, place in zip(samples, places, strict=True):
        input_ids[place], positions[:, place] = sample.token_ids, sample.positions
    trained = [np.flatnonzero(sample.weights) for sample in samples]

    images: dict[str, ImageInputs] = {}
    first_feature: dict[str, int] = {}
    feature_of = np.empty(len(input_ids), dtype=np.int64)
    num_features = 0
    for sample, place in zip(samples, places, strict=True):
        _check_images(sample, image_token_id)
        rows: list[NDArray[np.int64]] = []
        for image in sample.images:
            if image.digest not in images:
                images[image.digest] = image
                first_feature[image.digest] = num_features
                num_features += image.num_tokens
            rows.append(first_feature[image.digest] + np.arange(image.num_tokens))
        if rows:
            feature_of[place[sample.token_ids == image_token_id]] = np.concatenate(rows)
    distinct = list(images.values())
    image_positions = np.flatnonzero(input_ids == image_token_id)
    feature_rows = feature_of[image_positions]
    in_order = np.array_equal(feature_rows, np.arange(num_features))
    per_token: dict[str, Any] = {name: _rows_of(name, samples, trained) for name in _PER_TOKEN}
    return TrainBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        lengths=lengths,
        tree=tree,
        pixel_values=torch.from_numpy(np.concatenate([i.pixel_values for i in distinct])) if distinct else None,
        grids=tuple(image.grid for image in distinct),
        image_positions=torch.from_numpy(image_positions) if distinct else None,
        feature_rows=None if in_order or not distinct else torch.from_numpy(feature_rows),
        rows=torch.from_numpy(np.concatenate([place[t - 1] for t, place in zip(trained, places, strict=True)])),
        targets=torch.from_numpy(np.concatenate([s.token_ids[t] for s, t in zip(samples, trained, strict=True)])),
        weights=torch.from_numpy(np.concatenate([s.weights[t] for s, t in zip(samples, trained, strict=True)])),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, trained)], dtype=np.int32)),
        names=tuple(sample.name for sample in samples if sample.name),
        sources=tuple(sample.source for sample in samples),
        num_weighted=sum(map(len, trained)),
        tempered=_tempered(per_token["temperatures"]),
        **per_token,
    )


def _tempered(temperatures: Tensor | None) -> bool:
    return temperatures is not None and bool(((temperatures != 0) & (temperatures != 1)).any())


def _rows_of(name: str, samples: list[Sample], trained: list[NDArray[np.int64]]) -> Tensor | None:
    arrays = [getattr(sample, name) for sample in samples]
    if all(array is None for array in arrays):
        return None
    if any(array is None for array in arrays):
        raise ValueError(f"pack: only some samples of the batch carry {name}")
    return torch.from_numpy(np.concatenate([array[t] for array, t in zip(arrays, trained, strict=True)]))
