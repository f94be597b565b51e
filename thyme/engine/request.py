"""Reads a request: what is asked for becomes what the engine works with, or a ValueError that says what to do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from thyme.engine.live_prompts import content_of
from thyme.engine.model_runner import Ban
from thyme.engine.params import Prompt, SamplingParams
from thyme.engine.sequence import Tokens
from thyme.model.image_processor import ImageInputs
from thyme.model.model import Model
from thyme.model.processor import Processor
from thyme.model.rope import mrope_positions

AnyPrompt = Prompt | str | Sequence[int]


class RequestReader:
    """Checks and converts, once per request. Owns the sets of banned ids that requests have asked for."""

    def __init__(self, model: Model, processor: Processor | None, max_context: int) -> None:
        self.model = model
        self.processor = processor
        self.max_context = max_context
        self.vocab_size = model.config.text.vocab_size
        self.bans: list[Ban] = []
        self._ban_numbers: dict[tuple[int, ...] | str, int] = {}

    def tokens(self, prompt: AnyPrompt, verb: str, start: int = 0) -> Tokens:
        """Ids checked and expanded, pictures preprocessed, positions counted from `start`.

        Raises:
            ValueError: what can't be computed, named after `verb`, the engine's method that was called.
        """
        if not isinstance(prompt, Prompt):
            prompt = Prompt(prompt)
        if isinstance(prompt.token_ids, str):
            if self.processor is None:
                raise ValueError(
                    f"{verb}: the prompt is text, but the engine has no tokenizer: give ids, or a processor"
                )
            ids = self.processor.encode(prompt.token_ids)
        else:
            ids = [int(token) for token in prompt.token_ids]
        outside = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if outside is not None:
            raise ValueError(f"{verb}: token id {outside} is outside the model's vocabulary of {self.vocab_size}")
        images = tuple(self._image(image, verb) for image in prompt.images)
        config = self.model.config
        if images and config.vision is None:
            raise ValueError(f"{verb}: {len(images)} pictures for a {config.model_type} model, which reads text only")
        if config.vision is None:
            places = np.arange(start, start + len(ids), dtype=np.int32)
            array = np.array(ids, dtype=np.int32)
            return Tokens(array, np.stack([places] * 3), start + len(ids), (), (), array.tobytes())
        if self.processor is not None:
            ids = self.processor.expand(ids, images)
        positions, following = mrope_positions(
            ids,
            [image.grid for image in images],
            image_token_id=config.image_token_id,
            spatial_merge_size=config.vision.spatial_merge_size,
            start=start,
        )
        token_ids = np.array(ids, dtype=np.int32)
        shown = np.flatnonzero(token_ids == config.image_token_id)
        starts = tuple(shown[np.cumsum([0, *(image.num_tokens for image in images)])[:-1]].tolist())
        content = content_of(token_ids, [image.digest for image in images], starts)
        return Tokens(token_ids, positions.astype(np.int32), following, images, starts, content)

    def _image(self, image: Any, verb: str) -> ImageInputs:
        if isinstance(image, ImageInputs):
            return image
        if self.processor is None:
            raise ValueError(f"{verb}: a picture needs a processor: give the engine one, or ImageInputs")
        return self.processor.preprocess(image)

    def check_room(self, length: int, what: str, verb: str) -> None:
        """ValueError unless a sequence of `length` tokens leaves room for one more; `what` says whose length it is."""
        if length >= self.max_context:
            raise ValueError(
                f"{verb}: {what} has {length} tokens, and one more must fit into {self.max_context}: shorten it, "
                "or raise max_context or the KV cache (num_blocks, kv_bytes)"
            )

    def ban_of(self, params: SamplingParams) -> int:
        """Checks the parameters against the model; returns the number, in `bans`, of their set of banned ids."""
        if params.stop and self.processor is None:
            raise ValueError("add: stop texts need a tokenizer: use stop_token_ids, or give the engine a processor")
        for token in params.stop_token_ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"add: stop_token_ids has {token}, outside the vocabulary of {self.vocab_size}")
        if params.banned_ids not in self._ban_numbers:
            self.bans.append(self._ban(params.banned_ids))
            self._ban_numbers[params.banned_ids] = len(self.bans) - 1
        return self._ban_numbers[params.banned_ids]

    def _ban(self, banned_ids: tuple[int, ...] | str) -> Ban:
        if banned_ids == ():
            return Ban(self.vocab_size, None)
        vocab_size = self.processor.vocab_size if self.processor else self.vocab_size
        if isinstance(banned_ids, str):
            banned_ids = self.processor.never_sampled_ids if self.processor else ()
        outside = [token for token in banned_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"add: banned_ids has {outside[0]}, outside the vocabulary of {self.vocab_size}")
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[[token for token in banned_ids if token < vocab_size]] = True
        if bool(mask.all()):
            raise ValueError(f"add: banned_ids leaves none of the {vocab_size} ids")
        return Ban(vocab_size, mask.to(self.model.device) if bool(mask.any()) else None)

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; nothing without a tokenizer."""
        known = self.processor is not None and token < self.processor.vocab_size
        return self.processor.token_bytes(token) if known and self.processor is not None else b""
