"""Text to ids, and what belongs to a checkpoint's tokenizer: chat format, special ids, the bytes of each token.

Pictures are thyme.model.image_processor's; a Processor has one.

The only module that imports transformers, and of it only the tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from thyme.model.config import ImageConfig
from thyme.model.hf import as_ids, image_config_to_hf, read_image_config, read_json
from thyme.model.image_processor import ImageInputs, ImageProcessor
from thyme.model.token_table import token_table

IMAGE_TEXT = "<|vision_start|><|image_pad|><|vision_end|>"
"""How one picture stands in a prompt; the pad is expanded to one id per image feature."""

_NEVER_SAMPLED = (
    "<|im_start|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<sandbox_output>",
    "</sandbox_output>",
)


class Processor:
    """Owns the tokenizer and the picture settings of one checkpoint."""

    IMAGE_TEXT = IMAGE_TEXT

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_config: ImageConfig | None = None,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: a fast tokenizer.
            image_config: how pictures are cut into patches; None for text models.
            eos_token_ids: ids that end a generation; the tokenizer's eos by default.

        Raises:
            ValueError: `image_config` is given, but the tokenizer lacks the three vision tokens.
        """
        self.tokenizer = tokenizer
        self.image_config = image_config
        self._image_processor = None if image_config is None else ImageProcessor(image_config)
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        """One more than the largest id; a model's embedding may have more rows."""
        self.im_start_id = self._ids.get("<|im_start|>")
        self.im_end_id = self._ids.get("<|im_end|>")
        self.image_token_id = self._ids.get("<|image_pad|>") if image_config else None
        self.vision_start_id = self._ids.get("<|vision_start|>") if image_config else None
        self.vision_end_id = self._ids.get("<|vision_end|>") if image_config else None
        if image_config and None in (self.image_token_id, self.vision_start_id, self.vision_end_id):
            raise ValueError(f"the tokenizer of a vision model needs {IMAGE_TEXT} as three special tokens")
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.eos_token_ids: tuple[int, ...] = own if eos_token_ids is None else tuple(eos_token_ids)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Processor:
        """From a checkpoint's folder.

        Raises:
            FileNotFoundError: no tokenizer, or a vision model without preprocessor_config.json.
            ValueError: a file that cannot be read as what it is.
        """
        folder = Path(folder)
        config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        eos = as_ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
        eos = eos or as_ids({**config, **(config.get("text_config") or {})}.get("eos_token_id"))
        image = read_image_config(folder) if config.get("vision_config") else None
        return cls(_read_tokenizer(folder), image, eos or None)

    def with_max_pixels(self, max_pixels: int) -> Processor:
        """The same for pictures that are reduced to at most this area, in pixels.

        Raises:
            ValueError: a text model, or fewer pixels than its smallest picture has.
        """
        if self.image_config is None:
            raise ValueError(f"max_pixels: {max_pixels}, but the model takes no pictures")
        image_config = replace(self.image_config, max_pixels=max_pixels)
        return type(self)(self.tokenizer, image_config, self.eos_token_ids)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files and preprocessor_config.json into an existing folder."""
        self.tokenizer.save_pretrained(folder)
        if self.image_config is not None:
            content = json.dumps(image_config_to_hf(self.image_config), indent=2) + "\n"
            (Path(folder) / "preprocessor_config.json").write_text(content)

    # Text

    def encode(self, text: str) -> list[int]:
        """Ids of trusted text: the spelling of a special token becomes that token. Nothing is put in front."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_untrusted(self, text: str) -> list[int]:
        """Ids of text that a user, a tool or a model wrote: what spells a special token stays plain text."""
        ids: list[int] = self._plain_backend.encode(text, add_special_tokens=False).ids
        forged = self._special_ids.intersection(ids)
        if forged:
            raise ValueError(f"the tokenizer yields special ids {sorted(forged)} for plain text")
        return ids

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, is_trusted) parts put together; special tokens are read from trusted parts only.

        Between special tokens the text is tokenized as a whole, so a part's border leaves no trace.
        """
        ids: list[int] = []
        pending = ""
        for text, is_trusted in parts:
            pieces = self._special_pattern.split(text) if is_trusted else [text]
            for index, piece in enumerate(pieces):
                if index % 2 == 0:
                    pending += piece
                else:
                    ids += self.encode_untrusted(pending)
                    ids.append(self._ids[piece])
                    pending = ""
        return ids + self.encode_untrusted(pending)

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of ids, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for special tokens and unassigned ids.

        Raises:
            ValueError: an id outside the vocabulary, or a tokenizer whose tokens have no fixed bytes.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._bytes[token_id]

    def chat(self, user: str, system: str | None = None) -> str:
        """The prompt of a single turn, up to where the assistant speaks; "<image>" in `user` becomes a picture.

        Tokenizers without <|im_start|> use their own chat template.

        Raises:
            ValueError: neither is there.
        """
        if self.image_config is not None:
            user = user.replace("<image>", IMAGE_TEXT)
        if self.im_start_id is not None:
            turns = [("system", system)] if system is not None else []
            turns.append(("user", user))
            body = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
            return body + "<|im_start|>assistant\n"
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has neither <|im_start|> nor a chat template: encode the prompt as it is")
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": user})
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @cached_property
    def never_sampled_ids(self) -> tuple[int, ...]:
        """Ids with probability 0 in sampling and training: picture and markup tokens, <|im_start|>, sandbox tags that
        are single tokens, holes in the vocabulary; never an end-of-sequence id."""
        banned = {self._ids[name] for name in _NEVER_SAMPLED if name in self._ids}
        banned |= set(range(self.vocab_size)) - set(self._ids.values())
        return tuple(sorted(banned - set(self.eos_token_ids)))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = [name for name, i in self._ids.items() if i in self._special_ids]
        names.sort(key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else r"((?!))")

    @cached_property
    def _plain_backend(self) -> Tokenizer:
        # A copy, since the switch is a state of the tokenizer and both ways are used side by side.
        plain = Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _bytes(self) -> list[bytes]:
        return token_table(self._backend)

    # Pictures

    def preprocess(self, image: Image.Image) -> ImageInputs:
        """A picture as patches (see `ImageProcessor.preprocess`).

        Raises:
            ValueError: a text model, or a picture with a side of 0 or an aspect ratio above 200.
        """
        if self._image_processor is None:
            raise ValueError("preprocess: this model takes no pictures")
        return self._image_processor.preprocess(image)

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """(height, width) in pixels at which the model sees a picture.

        Raises:
            ValueError: as `preprocess`, but quickly.
        """
        if self._image_processor is None:
            raise ValueError("this model takes no pictures")
        return self._image_processor.size_of(image)

    def expand(self, ids: Sequence[int], images: Sequence[ImageInputs]) -> list[int]:
        """Repeats the image id of each picture once per feature; ids already expanded come back as they are.

        Raises:
            ValueError: the image ids match the pictures in neither way.
        """
        places = [place for place, i in enumerate(ids) if i == self.image_token_id]
        sizes = [image.num_tokens for image in images]
        if len(places) == len(images):
            out: list[int] = []
            done = 0
            for place, size in zip(places, sizes, strict=True):
                out += [*ids[done:place], *[ids[place]] * size]
                done = place + 1
            return out + list(ids[done:])
        if len(places) == sum(sizes):
            starts = np.cumsum([0, *sizes[:-1]])
            if all(places[a + n - 1] == places[a] + n - 1 for a, n in zip(starts, sizes, strict=True)):
                return list(ids)
        raise ValueError(
            f"expand: {len(places)} image ids for {len(images)} pictures of {sizes} features; "
            "give one id per picture, or all of a picture's in a row"
        )


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").is_file():
        # tokenizer.json says everything; the class that a checkpoint names might rebuild parts of it.
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise FileNotFoundError(f"{folder}: no tokenizer (tokenizer.json); copy the tokenizer's files into the folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: the tokenizer is no fast tokenizer; save it with a tokenizer.json")
    return tokenizer
