"""The toy tokenizer: exact round trip, greedy lexemes, Qwen's specials, a Hugging Face folder."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from thyme.toy.tokenizer import CODE_LEXEMES, SPECIAL_TOKENS, TAGS, TEXT_LEXEMES, toy_tokenizer, words_it_lacks

TOKENIZER = toy_tokenizer()
ASCII = "".join(map(chr, range(32, 127))) + "\n\t"


def _pieces(text: str) -> list[str]:
    return TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode(text))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*ASCII, *TAGS, *TEXT_LEXEMES, *CODE_LEXEMES, "  ", "\n\n", " n't", " ."])).map("".join)
)
def test_round_trip_is_exact(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_round_trip_with_special_tokens() -> None:
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What? <|im_end|>\n"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.convert_tokens_to_ids("<|image_pad|>") in ids


def test_the_longest_lexeme_wins() -> None:
    assert _pieces("The digit is 7.") == ["The digit is ", "7", "."]
    assert _pieces("The digital") == ["The ", *"digital"]
    assert _pieces("ImageOps.autocontrast(Image.open(image_path)") == [
        "ImageOps.autocontrast(",
        "Image.open(",
        "image_path",
        ")",
    ]


def test_numbers_are_cut_into_digits() -> None:
    assert not any(char.isdigit() for lexeme in (*TAGS, *TEXT_LEXEMES, *CODE_LEXEMES) for char in lexeme)
    assert _pieces("1809") == list("1809")


def test_tags_are_single_tokens_and_special_ids_come_last() -> None:
    for tag in TAGS:
        assert len(_pieces(tag)) == 1
    ids = TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(TOKENIZER) - len(SPECIAL_TOKENS), len(TOKENIZER)))
    assert TOKENIZER.eos_token == "<|im_end|>" and TOKENIZER.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("text", ["\u00e9t\u00e9", "\u2603\u2603"])
def test_unknown_characters_become_question_marks_one_by_one(text: str) -> None:
    expected = "".join(char if char.isascii() else "?" for char in text)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == expected


def test_saved_folder_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhat digit is on the red sign?<|im_end|>\n<think>The digit is 7.</think> .n't"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.eos_token_id == TOKENIZER.eos_token_id and len(again) == len(TOKENIZER)


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("What digit is on the red sign?", ()),
        ("What is 12 * 34?", ()),
        ("What colour is the car?", ("What", "colour", "is", "the", "car")),
        ("Where is the Müllauto? \u6570\u5b57", ("Müllauto", "\u6570\u5b57")),
    ],
)
def test_words_that_can_only_be_spelled_are_named(text: str, lacking: tuple[str, ...]) -> None:
    named = words_it_lacks(TOKENIZER, text)
    assert set(lacking) <= set(named) if lacking else named == ()


def test_other_tokenizers_lack_no_word(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    assert words_it_lacks(byte_level_tokenizer, "Qu'est-ce que c'est? \u6570\u5b57") == ()
