"""Chats whose code is run inside of the server: what comes back is a rollout, whole or as it happens."""

import base64
import io
import time
from typing import Any

import pytest
from PIL import Image

from tests.sandbox.host import eventually
from tests.serve.served import CONFIG, NAME, Served, asked
from thyme.data.rows import Demonstration
from thyme.engine import Engine, EngineConfig
from thyme.model import Model, Processor
from thyme.rollout import Question, Rollout, RolloutLoop
from thyme.rollout.prompts import build_prompt
from thyme.sandbox import Sandbox
from thyme.serve.chat import Message, plain_prompt, question_of, tool_prompt

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def question(row: Demonstration) -> Question:
    """The demonstration's, under the path that the server tells."""
    assert row.question.image is not None
    return question_of([Message("user", (row.question.image, row.question.question))], "q")


@pytest.fixture(scope="module")
def expected(taught: Model, sandbox: Sandbox, question: Question) -> Rollout:
    """What the rollout loop makes of the question."""
    assert taught.processor is not None
    engine = Engine(taught, EngineConfig(max_sequences=8, num_blocks=256, quiet=True))
    return RolloutLoop(engine, sandbox, taught.processor, CONFIG).run([question], CONFIG.sampling().greedy())[0][0]


@pytest.fixture
def messages(question: Question) -> list[Any]:
    assert question.image is not None
    return asked(question.question, question.image)


def test_the_answer_is_the_rollouts(tooled: Served, messages: list[Any], expected: Rollout, row: Demonstration) -> None:
    assert expected.answer == row.question.solution and expected.num_code == 2, "the toy has not learned its lesson"
    said = {"return_token_ids": True, "logprobs": True, "trace": "full"}
    answer = tooled.client().chat.completions.create(messages=messages, **GREEDY, extra_body=said)
    [choice] = answer.choices
    assert choice.message.content == expected.answer
    assert choice.message.reasoning_content == expected.text  # type: ignore[attr-defined]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "answered")  # type: ignore[attr-defined]
    trace = choice.trace  # type: ignore[attr-defined]
    assert trace["status"] == "answered" and len(trace["rounds"]) == 3
    for told, turn in zip(trace["rounds"], expected.turns, strict=True):
        assert (told["text"], told["code"], told["output"]) == (turn.text, turn.code, turn.output_text)
        if turn.result is not None:
            [picture] = told["result"]["images"]
            shown = Image.open(io.BytesIO(base64.b64decode(picture["url"].partition(",")[2])))
            assert shown.tobytes() == turn.result.images[0].tobytes() and told["result"]["status"] == "ok"
    records = choice.token_records  # type: ignore[attr-defined]
    prompt = answer.prompt_token_ids  # type: ignore[attr-defined]
    assert [*prompt, *records["token_ids"]] == expected.token_ids.tolist()
    assert records["sampled"] == expected.sampled[len(prompt) :].tolist()
    assert choice.token_ids == expected.token_ids[expected.sampled].tolist()  # type: ignore[attr-defined]
    assert answer.usage is not None and answer.usage.completion_tokens == expected.num_sampled
    assert choice.logprobs is not None and len(choice.logprobs.content or ()) == expected.num_sampled


def test_a_stream_shows_thoughts_code_and_outputs_as_they_come(
    tooled: Served, messages: list[Any], expected: Rollout
) -> None:
    reasoning, content, seen, trace = "", "", [], None
    for chunk in tooled.client().chat.completions.create(messages=messages, **GREEDY, stream=True):
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        seen.append(reasoning)
        trace = getattr(chunk.choices[0], "trace", None) or trace
    assert (content, reasoning) == (expected.answer, expected.text)
    assert len({*seen}) > 20 and trace is not None and len(trace["rounds"]) == 3
    assert not any("url" in image for turn in trace["rounds"] if turn["result"] for image in turn["result"]["images"])


def test_without_tools_code_is_only_text(tooled: Served, messages: list[Any]) -> None:
    said = {"run_code": False}
    answer = tooled.client().chat.completions.create(messages=messages, **GREEDY, max_tokens=60, extra_body=said)
    message = answer.choices[0].message
    assert not hasattr(message, "reasoning_content") and not hasattr(answer.choices[0], "trace")
    assert "<sandbox_output>" not in (message.content or "")


def test_limits_end_it_with_the_last_words_as_content(tooled: Served, messages: list[Any]) -> None:
    answer = tooled.client().chat.completions.create(messages=messages, **GREEDY, max_tokens=5)
    [choice] = answer.choices
    assert (choice.finish_reason, choice.stop_reason) == ("length", "length")  # type: ignore[attr-defined]
    assert choice.message.content == choice.message.reasoning_content != ""  # type: ignore[attr-defined]
    stopped = tooled.client().chat.completions.create(
        messages=messages, **GREEDY, stop=(choice.message.content or "")[-6:]
    )
    assert stopped.choices[0].message.content == (choice.message.content or "")[:-6]
    assert stopped.choices[0].finish_reason == "stop"
    stop = (choice.message.content or "")[-6:-3]  # inside of what is drawn at once: nothing behind it is shown
    kept = tooled.client().chat.completions.create(
        messages=messages, **GREEDY, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == (choice.message.content or "").partition(stop)[0] + stop


def test_several_choices_have_sessions_of_their_own(tooled: Served, messages: list[Any], expected: Rollout) -> None:
    answer = tooled.client().chat.completions.create(messages=messages, **GREEDY, n=3)
    assert [c.message.reasoning_content for c in answer.choices] == [expected.text] * 3  # type: ignore[attr-defined]
    assert eventually(lambda: tooled.idle() and not tooled.thread._executor._sessions)  # type: ignore[union-attr]
    assert not tooled.thread._jobs


def test_a_client_that_leaves_while_code_runs_takes_it_along(
    tooled: Served, messages: list[Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tooled.thread._executor.run  # type: ignore[union-attr]
    slow = "import time\ntime.sleep(60)"
    monkeypatch.setattr(tooled.thread._executor, "run", lambda n, q, seed, _: real(n, q, seed, slow))
    opened = tooled.start("/v1/chat/completions", {"messages": messages, **GREEDY})
    rounds = sandbox._client.rounds
    assert eventually(lambda: any(s.round is not None for s in rounds.live.values()), 20)
    began = time.monotonic()
    opened.close()
    assert eventually(lambda: tooled.idle() and not any(s.round is not None for s in rounds.live.values()), 20)
    assert time.monotonic() - began < 9, "it ended by the sandbox's own limit"


@pytest.mark.parametrize("style", ["thyme", "short", "direct"])
def test_the_prompt_is_the_one_that_rollouts_are_drawn_from(style: Any, processor: Processor) -> None:
    pictures = [Image.new("RGB", (60 + i, 84), "red") for i in range(2)]
    for shown in (pictures, pictures[:1], []):
        messages = [Message("user", (*shown, "What is it? <|im_end|>"))]
        ours = tool_prompt(messages, style, processor)
        theirs = build_prompt(question_of(messages, "q"), style, processor)
        assert list(ours.token_ids) == list(theirs.token_ids) and len(ours.images) == len(shown)


def test_earlier_turns_and_a_system_message_of_the_clients_stand_in_the_prompt(processor: Processor) -> None:
    picture = Image.new("RGB", (84, 84), "red")
    messages = [
        Message("system", ("Be brief.",)),
        Message("user", (picture, "What?")),
        Message("assistant", ("A sign.",)),
        Message("user", (picture, "Where?")),
    ]
    text = processor.decode(list(tool_prompt(messages, "thyme", processor).token_ids))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and text.endswith("<|im_start|>assistant\n")
    assert text.index("image_1.png") < text.index("A sign.") < text.index("image_2.png")
    plain = processor.decode(list(plain_prompt(messages, processor).token_ids))
    assert "image_1" not in plain and plain.count("<|vision_start|>") == 2
