"""The toy tokenizer: every printable ASCII character, plus the words and code pieces of the synthetic tasks as lexemes.

A byte-level vocabulary would spend most of a tiny model's parameters and of its sequence on spelling. Here a text is
cut greedily into the longest lexemes; whatever is no lexeme falls back to single characters, so every ASCII text
survives `decode(encode(x))` exactly. No lexeme holds a digit: numbers are read and copied digit by digit.
"""

from __future__ import annotations

import json
import re
import string
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<code>",
    "</code>",
    "<sandbox_output>",
    "</sandbox_output>",
)

TEXT_LEXEMES = (
    "system\n",
    "user\n",
    "assistant\n",
    "What digit is on the ",
    "Where is the ",
    "Where are the signs?",
    "Read the digits.",
    "What is ",
    " sign?",
    "red",
    "green",
    "yellow",
    "white",
    "gray",
    "The ",
    " sign is small: column ",
    " sign is tiny: column ",
    ", row ",
    "The digit is ",
    "The digits are ",
    "The product is ",
    "The picture is turned by ",
    "The contrast is low.",
    "This needs code.",
)

# About as long as a real tokenizer's pieces of the same code: a snippet of one or two tokens would never fail.
CODE_LEXEMES = (
    "\n```python\n",
    "```\n",
    "from PIL import ",
    "Image",
    "ImageOps",
    ", ",
    "image",
    " = ",
    "Image.open(",
    "image_path",
    ")\n",
    ".width",
    " // ",
    "x, y",
    "*s",
    ".crop(",
    "(x, y, x + s, y + s)",
    ".rotate(",
    "ImageOps.autocontrast(",
    ".save(",
    '"out.png"',
    "print(",
    " * ",
)

# Qwen's control tokens, in Qwen's order.
SPECIAL_TOKENS = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
)

_CHARACTERS = (*(char for char in string.printable if char.isprintable()), "\n", "\t")
_UNKNOWN = "?"
"""What a character outside of printable ASCII, newline and tab becomes."""


@lru_cache(maxsize=1)
def _serialized() -> str:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*_CHARACTERS, *TAGS, *TEXT_LEXEMES, *CODE_LEXEMES]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    # The first alternative that matches wins, so longest first makes the cut greedy. The last one takes what is
    # unknown character by character, lest a whole run become one token.
    lexemes = sorted((word for word in words if len(word) > 1), key=lambda word: (-len(word), word))
    pattern = "|".join([*map(re.escape, lexemes), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer.to_str()


def toy_backend() -> Tokenizer:
    """A new tokenizer as the library of that name has it, which loads in no time."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(_serialized())


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer that saves and loads like any Hugging Face one; text lexemes first, then Qwen's specials.

    The unknown token is declared to the WordLevel model only: declared here it would become a special token, and every
    question mark with it.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=toy_backend(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def is_toy_folder(folder: Path) -> bool:
    """Whether the model in the folder is the embedded one or was trained from it: it has this tokenizer."""
    path = folder / "tokenizer.json"
    try:
        model = json.loads(path.read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return model.get("type") == "WordLevel" and TEXT_LEXEMES[0] in model.get("vocab", ())


def words_it_lacks(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[str, ...]:
    """Words of `text` that the toy's tokenizer can only spell letter by letter, or not even that.

    () for every other tokenizer: those of real checkpoints know all words by their bytes.
    """
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "WordLevel" or backend.token_to_id(TEXT_LEXEMES[0]) is None:
        return ()
    offsets = backend.encode(text, add_special_tokens=False).offsets
    single = {start for start, end in offsets if end - start == 1}
    words = (match for match in re.finditer(r"[^\W\d_]+", text) if len(match[0]) > 1 or not match[0].isascii())
    return tuple(word[0] for word in words if single.issuperset(range(*word.span())))
