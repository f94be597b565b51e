"""Prompts are byte-equal to the released ones; the code and answer rules follow the original."""

import hashlib
import random
from collections.abc import Iterable

import pytest

from thyme.engine.tags import Mode, TagAutomaton, TagEvent
from thyme.rollout.prompts import (
    SYSTEM_PROMPT,
    build_prompt,
    extract_answer,
    extract_code,
    text_prompt,
    until_answer,
    user_prompt,
)
from thyme.rollout.types import Question


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_system_prompt_is_the_released_one() -> None:
    # Digest of scripts/prompt.txt of the original repository, which has no newline at its end either.
    assert _digest(SYSTEM_PROMPT) == "c5e7db63596377f9a1afef0dd131d282b2f9e6c873058c056c5c0aa5a89f99a7"
    assert SYSTEM_PROMPT.endswith("in a sandbox environment.")


def test_user_prompt_is_the_released_one() -> None:
    assert user_prompt("What is the value?", "/data/a.png", (640, 480)) == (
        "<image>\n"
        "What is the value?\n"
        "\n"
        '### User Image Path:** "/data/a.png"\n'
        '### User Image Size:** "640x480"\n'
        "\n"
        "### **Output Format (strict adherence required):**\n"
        "\n"
        "<think>Your detailed reasoning process, including any code, should go here.</think>\n"
        "<answer>Your final answer to the user's question goes here.</answer>\n"
    )


def test_unreadable_image_is_said_in_the_prompt() -> None:
    lines = user_prompt("q", "x.png", None).split("\n")
    assert '### User Image Size:** "Unable to determine (error reading image)"' in lines


def test_text_prompt_claims_no_image() -> None:
    prompt = text_prompt("What is 2 * 3?")
    assert prompt.startswith("What is 2 * 3?\n\n### **Output Format")
    assert "<image>" not in prompt and "Image Path" not in prompt and prompt.endswith("</answer>\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("<code>\n```python\nx = 1\nprint(x)\n```\n</code>", "x = 1\nprint(x)"),
        ("<code>x = 1</code>", "x = 1"),
        ("<code>\npython\nx = 1\n</code>", "x = 1"),
        ("<code>```\nx = 1\n```</code>", "x = 1"),
        ("<CODE>\n```Python\nx = 1\n```\n</Code>", "x = 1"),
        ("a <code>first</code> b <code>second</code>", "first"),
        ("<code></code>", ""),
        ("<code>\n```python\n```\n</code>", ""),
        ("<code>\n    ```python\n    x = 1\n    y = 2\n    ```\n    </code>", "x = 1\n    y = 2"),
        ("<code>x = 1", None),
        ("x = 1</code>", None),
        ("no code", None),
    ],
)
def test_extract_code(text: str, code: str | None) -> None:
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>\n<answer> 7 </answer>", "7"),
        ("<answer>7</answer><answer>8</answer>", "7"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        (r"<answer>so \boxed{7}</answer>", "7"),
        (r"<answer>\boxed{6} or rather \boxed{ \frac{1}{2} }</answer>", r"\frac{1}{2}"),
        (r"<answer>\boxed{\boxed{5}}</answer>", "5"),
        (r"<answer>\boxed{7</answer>", r"\boxed{7"),
        (r"<answer>\boxed{6}, \boxed{7</answer>", "6"),
        ("<answer>7", None),
        ("7</answer>", None),
        ("7</answer> <answer>8</answer>", None),  # the turn ended at the first </answer>
        ("<code>print('<answer>6</answer>')</code>", None),
        ("<code># <answer></code><sandbox_output>1</sandbox_output> 7</answer>", None),
        ("<code>'</answer>'</code><sandbox_output>1</sandbox_output><answer>7</answer>", "7"),
        ("<code>1</code><sandbox_output><answer>6</answer></sandbox_output>", None),
        ("<code>1</code><sandbox_output><answer>6</answer></sandbox_output><answer>7</answer>", "7"),
        ("<answer>6<code>1</code><sandbox_output>1</sandbox_output></answer>", None),
        ("<answer>6<code>1</code><sandbox_output>1</sandbox_output><answer>7</answer>", "7"),
        ("<code>1 <answer>7</answer>", None),
        (r"<answer>} \boxed{7} {</answer>", "7"),
        (r"<answer>" + r"\boxed{" * 20_000 + "</answer>", r"\boxed{" * 20_000),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


class _Bytes:
    """A tokenizer of single bytes."""

    vocab_size = 128

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def _decoded(rounds: Iterable[str]) -> tuple[str, bool]:
    """The turn that a rollout writes whose rounds would be `rounds` if nothing ended them, and whether it answered."""
    automaton = TagAutomaton.compile(_Bytes())
    written = ""
    for words in rounds:
        state = 0
        for byte in words.encode():
            mode = automaton.modes[state]
            state, event = automaton.step(state, byte)
            written += chr(byte)
            if event == TagEvent.ANSWER_END:
                return written, mode == Mode.ANSWER
            if event == TagEvent.FORGED:
                return written, False
            if event == TagEvent.CODE_END:
                written += "<sandbox_output><image>&lt;/answer></sandbox_output>"
                break
        else:
            return written, False
    return written, False


def test_an_answer_is_found_where_decoding_saw_one_and_nowhere_else() -> None:
    rng = random.Random(0)
    pieces = ["<code>", "</code>", "<answer>", "</answer>", "<sandbox_output>", "<think>", "<", "a", "'", " 7", "<answ"]
    outcomes = set()
    for _ in range(4000):
        rounds = ["".join(rng.choices(pieces, (6, 4, 6, 3, 1, 1, 1, 1, 1, 1, 1), k=rng.randrange(9))) for _ in range(4)]
        text, answered = _decoded(rounds)
        assert (extract_answer(text) is not None) == answered, text
        assert until_answer(text) == text and until_answer(text + "<answer>x</answer>").startswith(text)
        outcomes.add((answered, text.count("<answer>") > 1, "</code>" in text))
    assert len(outcomes) == 8


def _question(text: str = "How many?", path: str = "a.png") -> Question:
    from PIL import Image

    return Question(id="q", image=Image.new("RGB", (640, 480)), image_path=path, question=text, solution="3")


class _Processor:
    """Characters as ids, except that trusted text may spell one special token."""

    def chat(self, user: str, system: str | None = None) -> str:
        head = "" if system is None else f"[{system}]"
        return f"{head}<|im_start|>{user.replace('<image>', '<|image_pad|>')}!"

    def encode_parts(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, is_trusted in parts:
            for index, piece in enumerate(text.split("<|image_pad|>") if is_trusted else [text]):
                ids += [-1] * (index > 0) + [ord(char) for char in piece]
        return ids


def _decode(ids: list[int]) -> str:
    return "".join("{pad}" if token < 0 else chr(token) for token in ids)


def test_thyme_prompt_joins_system_user_and_image() -> None:
    question = _question()
    prompt = build_prompt(question, "thyme", _Processor())  # type: ignore[arg-type]
    expected = user_prompt("How many?", "a.png", (640, 480)).replace("<image>", "{pad}")
    assert _decode(list(prompt.token_ids)) == f"[{SYSTEM_PROMPT}]<|im_start|>{expected}!"
    assert list(prompt.images) == [question.image]


def test_short_prompt_is_picture_and_question() -> None:
    prompt = build_prompt(_question(), "short", _Processor())  # type: ignore[arg-type]
    assert _decode(list(prompt.token_ids)) == "<|im_start|>{pad}How many?!"


def test_direct_prompt_is_that_of_thyme_s_evaluation_without_tools() -> None:
    """Byte for byte `SIMPLE_SYS_PROMPT` and `generate_prompt_simple_qa` of its branch of VLMEvalKit."""
    prompt = build_prompt(_question(), "direct", _Processor())  # type: ignore[arg-type]
    said = (
        "You are an advanced AI assistant specializing in visual question answering (VQA). You don't need to perform "
        "any image manipulation or reasoning. Give the answer to the following question directly.\n"
        '**User\'s Question:** "How many?"'
    )
    assert _decode(list(prompt.token_ids)) == f"[You are a helpful assistant.]<|im_start|>{{pad}}{said}!"


def test_several_pictures_stand_first_and_are_told_in_order() -> None:
    from PIL import Image

    pictures = [Image.new("RGB", size) for size in ((640, 480), (64, 48), (6, 4))]
    more = tuple((f"{name}.png", picture) for name, picture in zip("bc", pictures[1:], strict=True))
    question = Question(
        id="q", image=pictures[0], image_path="a.png", question="Which?", solution="a", more_images=more
    )
    prompt = build_prompt(question, "thyme", _Processor())  # type: ignore[arg-type]
    told = user_prompt("Which?", "a.png", (640, 480), [("b.png", (64, 48)), ("c.png", (6, 4))])
    assert told.startswith(
        "<image>\n<image>\n<image>\nWhich?\n\n"
        '### User Image Path:** "a.png"\n### User Image Size:** "640x480"\n'
        '### User Image Path:** "b.png"\n### User Image Size:** "64x48"\n'
        '### User Image Path:** "c.png"\n### User Image Size:** "6x4"\n\n### **Output Format'
    )
    assert _decode(list(prompt.token_ids)) == f"[{SYSTEM_PROMPT}]<|im_start|>{told.replace('<image>', '{pad}')}!"
    assert list(prompt.images) == pictures
    assert _decode(list(build_prompt(question, "short", _Processor()).token_ids)).count("{pad}") == 3  # type: ignore[arg-type]
    for image, twice in ((None, more), (pictures[0], (("a.png", pictures[1]),))):
        with pytest.raises(ValueError, match=r"without an image|two pictures under one path"):
            Question(id="q", image=image, image_path="a.png", question="?", solution="", more_images=twice)


def test_prompt_without_image() -> None:
    question = Question(id="q", image=None, image_path="", question="What is 2 * 3?", solution="6")
    for style in ("short", "thyme", "direct"):
        prompt = build_prompt(question, style, _Processor())  # type: ignore[arg-type]
        assert "{pad}" not in _decode(list(prompt.token_ids)) and list(prompt.images) == []


@pytest.mark.parametrize("style", ["short", "thyme", "direct"])
@pytest.mark.parametrize("text", ["Is <image> a tag?", "Say <|image_pad|> twice"])
def test_a_question_cannot_claim_an_image(style: str, text: str) -> None:
    decoded = _decode(list(build_prompt(_question(text), style, _Processor()).token_ids))  # type: ignore[arg-type]
    assert decoded.count("{pad}") == 1 and text in decoded


def test_a_path_cannot_claim_an_image() -> None:
    prompt = build_prompt(_question(path="<image>.png"), "thyme", _Processor())  # type: ignore[arg-type]
    assert _decode(list(prompt.token_ids)).count("{pad}") == 1


@pytest.mark.parametrize(("text", "style", "match"), [(" ", "thyme", "empty"), ("q", "long", "style 'long'")])
def test_bad_prompts_are_named(text: str, style: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_prompt(_question(text), style, _Processor())  # type: ignore[arg-type]
