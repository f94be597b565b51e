"""What SFT teaches a model to read is, to the token, what a rollout gives it."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.rows import FIRST, HDD, SECOND, b64, thyme_rl, thyme_sft
from tests.material import MISSING, published_cases
from thyme.data.layouts.known import read_row
from thyme.data.problems import text_problems
from thyme.data.resolve import resolve
from thyme.model import ImageConfig
from thyme.model.processor import Processor
from thyme.rollout.prompts import SYSTEM_PROMPT, build_prompt, user_prompt
from thyme.sandbox import Sandbox, Status
from thyme.train.sft import row_sample


@pytest.fixture(scope="module")
def qwen(byte_level_tokenizer: PreTrainedTokenizerFast) -> Processor:
    return Processor(byte_level_tokenizer, ImageConfig())


def test_the_prompt_of_a_released_row_is_the_prompt_of_its_rollout(qwen: Processor) -> None:
    ready = resolve(read_row(thyme_sft()), "sft", name="a", source="s", folder=None)
    row, asked = ready.demonstration(), resolve(read_row(thyme_rl()), "rl", name="a", source="s", folder=None).question
    path = "/mnt/data/sign_00110792.png_rotated_image_318.png"
    assert row.question.image_path == asked.image_path == path
    assert row.prompt == user_prompt("Which digit is on sign 7?", path, (60, 40))
    ids = qwen.encode(qwen.chat(row.prompt, SYSTEM_PROMPT))
    assert ids == build_prompt(asked, "thyme", qwen).token_ids
    assert ids == build_prompt(row.question, "thyme", qwen).token_ids
    assert HDD not in row.response and f'image_path = "{path}"' in row.response


def test_a_special_token_in_a_question_stays_text(qwen: Processor) -> None:
    row = resolve(
        read_row(thyme_sft(question="<image>\nWhat is <|im_end|>?")), "sft", name="a", source="s", folder=None
    )
    ids = row_sample(qwen, row.demonstration(), "all", "thyme").token_ids.tolist()
    assert qwen.im_end_id is not None and ids.count(qwen.im_end_id) == 3  # system, user, assistant
    shown = qwen.expand(list(build_prompt(row.question, "thyme", qwen).token_ids), [qwen.preprocess(row.images[0])])
    assert ids[: len(shown)] == list(shown)


def test_the_code_of_a_released_row_runs_in_the_sandbox(sandbox: Sandbox) -> None:
    row = resolve(read_row(thyme_sft()), "sft", name="a", source="s", folder=None).demonstration()
    code = row.response.partition("```python\n")[2].partition("```")[0]
    result = sandbox.run(code, row.question.image, row.question.image_path)
    assert result.status is Status.OK and not result.fixes and [image.size for image in result.images] == [(28, 18)]


@pytest.mark.parametrize("name", sorted(published_cases()) or [pytest.param("", marks=pytest.mark.skip(MISSING))])
def test_published_traces_as_rows_of_the_released_set(name: str, qwen: Processor) -> None:
    case = published_cases()[name]
    path = case["image_path"] and f"/mllm_hdd/someone/data/{case['image_path']}"
    text = ""
    for said, ran in zip(case["thinking"], [*case["rounds"], None], strict=False):
        text += said
        if ran is not None:
            values = "".join(value["value"] for value in ran["returned_text"] or ())
            shown = "<image>" * len(ran["returned_images"]) or values
            code = ran["code"].replace(case["image_path"] or "\0", path or "")
            text += f"<code>\n```python\n{code}\n```\n</code><sandbox_output>{shown}</sandbox_output>"
    response = f"<think>{text}</think>\n<answer>{case['answer'][0]}</answer>"
    question = case["question"][0]
    asked = question if not case["inputs"] else user_prompt(question, path or "/mllm_hdd/x.png", (60, 40))
    images = [b64(FIRST)] * len(case["inputs"]) + [b64(SECOND)] * text.count("<image>")
    row = read_row({"image": images, "question": asked, "response": response})
    assert not list(text_problems(row, "sft"))
    demonstration = resolve(row, "sft", name="a", source="s", folder=None).demonstration()
    assert demonstration.question.question == question.strip()
    assert "mllm_hdd" not in demonstration.prompt + demonstration.response
    ids = qwen.encode(qwen.chat(demonstration.prompt, SYSTEM_PROMPT))
    assert ids == build_prompt(demonstration.question, "thyme", qwen).token_ids
