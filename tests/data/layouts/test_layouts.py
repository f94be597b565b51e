"""Every layout of the field is read into the same questions and demonstrations."""

from pathlib import Path
from typing import Any

import pytest

from tests.data.rows import FIRST, RESPONSE, SECOND, b64, png, thyme_rl, thyme_sft, uri
from thyme.data.layouts.known import layout_of, read_row
from thyme.data.layouts.row import Kind
from thyme.data.problems import kind_of, text_problems
from thyme.data.refusal import BadRow
from thyme.data.resolve import Resolved, resolve

ASKED, ANSWER = "Which digit is on the sign?", "<think>a</think>\n<answer>7</answer>"
TEXT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"<image>{ASKED}"}]
PARTS = [{"type": "image_url", "image_url": {"url": uri(FIRST)}}, {"type": "text", "text": ASKED}]
SHOWN = {"role": "assistant", "content": RESPONSE}
SAID = [
    {"type": "text", "text": RESPONSE.partition("<image>")[0]},
    {"type": "image_url", "image_url": {"url": uri(SECOND), "detail": "high"}},
    {"type": "text", "text": RESPONSE.partition("<image>")[2]},
]
SHOWN_PARTS = {"role": "assistant", "content": SAID}
DEMONSTRATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "released": ("thyme", thyme_sft(question=f"<image>\n{ASKED}")),
    "ms-swift": ("messages", {"messages": [*TEXT, SHOWN], "images": [b64(FIRST), {"bytes": SECOND, "path": None}]}),
    "two lists": (
        "messages",
        {
            "messages": {"role": ["user", "assistant"], "content": [f"<image>\n{ASKED}", RESPONSE]},
            "images": {"bytes": [FIRST, SECOND], "path": [None, None]},
        },
    ),
    "parts": ("openai", {"messages": [TEXT[0], {"role": "user", "content": PARTS}, SHOWN_PARTS]}),
    "parts of Responses": (
        "openai",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": uri(FIRST)},
                        {"type": "input_text", "text": ASKED},
                    ],
                },
                SHOWN_PARTS,
            ]
        },
    ),
    "pictures beside parts": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]},
                {
                    "role": "assistant",
                    "content": [*SHOWN_PARTS["content"][:1], {"type": "image"}, *SHOWN_PARTS["content"][2:]],
                },
            ],
            "images": [FIRST, SECOND],
        },
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": RESPONSE}],
            "images": ["first.png", "second.png"],
            "system": "Be brief.",
        },
    ),
}
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "released": ("thyme", thyme_rl(question=ASKED, messages=TEXT)),
    "ms-swift": ("messages", {"messages": TEXT, "images": ["first.png"], "solution": 7}),
    "parts": ("openai", {"messages": [{"role": "user", "content": PARTS}], "solution": "7"}),
    "verl": (
        "verl",
        {
            "data_source": "deepeyes",
            "prompt": [TEXT[0], {"role": "user", "content": f"<image>\n{ASKED} Think first, then call a tool."}],
            "images": [{"bytes": FIRST, "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "7"},
            "extra_info": {"question": f"<image>{ASKED}", "index": 3, "split": "train"},
        },
    ),
    "verl as JSON": (
        "verl",
        {
            "data_source": "deepeyes",
            "prompt": f"<image>{ASKED}",
            "images": [b64(FIRST)],
            "reward_model": '{"ground_truth": ["7"]}',
        },
    ),
}


def _resolved(value: dict[str, Any], folder: Path, kind: Kind | None = None) -> Resolved:
    row = read_row(value)
    kind = kind or kind_of(row)
    assert not list(text_problems(row, kind))
    return resolve(row, kind, name="x", source="file", folder=folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "first.png").write_bytes(FIRST)
    (tmp_path / "second.png").write_bytes(SECOND)
    return tmp_path


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_demonstration_is_the_same_in_every_layout(name: str, folder: Path) -> None:
    layout, value = DEMONSTRATIONS[name]
    assert layout_of(value) == layout
    row = _resolved(value, folder).demonstration()
    assert row.question.question == ASKED and row.question.solution == "7" and row.scenario == "file"
    assert [image.size for image in row.images] == [(60, 40), (28, 18)]
    assert row.images[0].getpixel((0, 0)) == (255, 0, 0) and row.question.image is row.images[0]
    assert row.prompt.startswith(f"<image>\n{ASKED}\n\n### User Image Path:** ") and '"60x40"' in row.prompt
    path = "first.png" if name == "sharegpt" else "image.png"
    assert row.question.image_path == path and row.response == RESPONSE
    asked = _resolved(value, folder, "rl").question
    assert asked.solution == "7" and asked.image is not None


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_the_same_in_every_layout(name: str, folder: Path) -> None:
    layout, value = QUESTIONS[name]
    assert layout_of(value) == layout
    question = _resolved(value, folder).question
    assert question.question == ASKED and question.solution == "7" and question.image_size == (60, 40)
    assert question.scenario == ("deepeyes" if layout == "verl" else "file")
    assert question.meta == ({"row_id": "train-3"} if name == "verl" else {})


def test_a_row_without_pictures_is_read_in_every_layout(folder: Path) -> None:
    user = {"role": "user", "content": "What is 6 * 7?"}
    for value in (
        {"image": None, "question": "What is 6 * 7?", "response": ANSWER},
        {"messages": [user, {"role": "assistant", "content": ANSWER}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 6 * 7?"}]}], "solution": "7"},
        {"prompt": [user], "data_source": "x", "reward_model": {"ground_truth": "7"}, "images": []},
        {"conversations": [{"from": "human", "value": "What is 6 * 7?"}, {"from": "gpt", "value": ANSWER}]},
    ):
        question = _resolved(value, folder).question
        assert (question.image, question.image_path, question.question) == (None, "", "What is 6 * 7?")


def test_a_transparent_picture_lies_on_white(folder: Path) -> None:
    value = thyme_sft(image=[b64(png(8, 8, "#00000000", "RGBA")), b64(SECOND)])
    assert _resolved(value, folder).images[0].getpixel((0, 0)) == (255, 255, 255)


def test_a_layout_that_was_said_is_not_guessed() -> None:
    value = {"conversations": [{"from": "human", "value": "x"}], "prompt": "y", "data_source": "z"}
    with pytest.raises(BadRow, match=r"fit verl and sharegpt: say which \(data.format\)"):
        read_row(value)
    assert read_row(value, "sharegpt").user == "x"
    with pytest.raises(BadRow, match="messages must be a list"):
        read_row(value, "messages")
    with pytest.raises(BadRow, match=r"'text', 'label' are the keys of no layout .*sharegpt: conversations"):
        read_row({"text": 1, "label": 2})


def test_a_question_is_what_the_turn_asks_where_that_is_in_the_template(folder: Path) -> None:
    value = thyme_rl(question="Which digit?")
    assert _resolved(value, folder).question.question == "Which digit is on sign 7?"
    value["messages"] = [{"role": "user", "content": "<image> Think about it: which digit?"}]
    assert _resolved(value, folder).question.question == "Which digit?"


def test_several_pictures_of_one_question(folder: Path) -> None:
    content = "<image><image>Which is larger?"
    value = {"messages": [{"role": "user", "content": content}], "images": ["first.png", SECOND], "solution": "one"}
    question = _resolved(value, folder).question
    assert [(path, picture.size) for path, picture in question.pictures] == [
        ("first.png", (60, 40)),
        ("image.png", (28, 18)),
    ]
