"""The bodies that VLMEvalKit's and lmms-eval's API clients send, field for field, and what they read of the answer."""

import ast
import base64
import gc
import importlib
import importlib.util
import io
import logging
import mimetypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tests import theirs
from tests.serve.served import NAME, Served, data_uri
from thyme.data.rows import Demonstration


@pytest.fixture(scope="module")
def picture(row: Demonstration) -> Image.Image:
    assert row.question.image is not None
    return row.question.image


def vlmevalkit(row: Demonstration, url: str, **more: Any) -> dict[str, Any]:
    """`OpenAIWrapper`: JPEG at some `detail`, text behind or before pictures, one choice."""
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": row.question.question},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"model": NAME, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048} | more


def lmms_eval(row: Demonstration, url: str, **more: Any) -> dict[str, Any]:
    """`openai` and `async_openai`: PNG, a list of parts also for text alone; what a task's generation_kwargs say of
    top_p, seed, penalties and n only where they say it."""
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": row.question.question},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "model": NAME, "max_tokens": 1024, "temperature": 0}
    return body | more


def answer_of(
    served: Served, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[str, dict[str, Any]]:
    """What both read: the first choice's content, a string; lmms-eval also the counts."""
    status, answer = served.ask("POST", "/v1/chat/completions", body, headers)
    assert status == 200, answer
    content = answer["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content.strip(), answer["usage"]


def test_both_get_the_answer_the_model_gives_with_its_code_run(
    tooled: Served, row: Demonstration, picture: Image.Image
) -> None:
    png = data_uri(picture)
    key = {"authorization": "Bearer sk-anything"}
    assert answer_of(tooled, vlmevalkit(row, png), key)[0] == row.question.solution
    content, usage = answer_of(tooled, lmms_eval(row, png))
    assert content == row.question.solution
    assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0


def test_other_shapes_of_their_bodies_are_taken(tooled: Served, row: Demonstration, picture: Image.Image) -> None:
    jpeg = data_uri(picture, "JPEG")
    short = {"max_tokens": 3, "run_code": False}
    # VLMEvalKit's LMDeploy wrapper sends its data set's name, and what it knows of a picture, along.
    body = vlmevalkit(row, jpeg, dataset="HRBench4K", **short)
    body["messages"][0]["content"][0]["image_url"] = {"url": jpeg, "max_dynamic_patch": 6}
    answer_of(tooled, body)
    # With a system prompt, and turns that end with the user's; o1-like names use the newer limit.
    turns = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    answer_of(tooled, {"model": NAME, "messages": turns, "n": 1, "max_completion_tokens": 3, "run_code": False})
    # lmms-eval for newer models, and a video as frames.
    frames = [{"type": "image_url", "image_url": {"url": data_uri(Image.new("RGB", (56, 56)))}}] * 4
    body = lmms_eval(row, jpeg) | short | {"response_format": {"type": "text"}}
    body["messages"][0]["content"] = [*frames, {"type": "text", "text": "What happens?"}]
    answer_of(tooled, body)
    answer_of(tooled, lmms_eval(row, jpeg, top_p=1.0, seed=3, presence_penalty=0, frequency_penalty=0.0, n=1) | short)


def test_the_model_is_found_as_they_find_it(tooled: Served) -> None:
    assert tooled.ask("GET", "/v1/models")[1]["data"][0]["id"] == NAME


@pytest.mark.soak
def test_vlmevalkits_own_client_gets_the_answer(
    tooled: Served, row: Demonstration, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class as it is, of an installed ms-vlmeval; of the rest of its package only what that class calls."""
    root = theirs._folder()
    if root is None:
        pytest.skip(theirs.UNINSTALLED)
    for name in ("vlmeval", "vlmeval.api", "vlmeval.smp", "vlmeval.smp.log"):
        package = ModuleType(name)
        package.__path__ = [str(root.parent / name.replace(".", "/"))]
        monkeypatch.setitem(sys.modules, name, package)
    smp: Any = sys.modules["vlmeval.smp"]
    smp.get_logger = sys.modules["vlmeval.smp.log"].get_logger = logging.getLogger  # type: ignore[attr-defined]
    smp.concat_images_vlmeval = None
    space = vars(smp) | {"__package__": "vlmeval.smp", "os": os, "io": io, "base64": base64, "Image": Image}
    space |= {"osp": os.path, "mimetypes": mimetypes, "validators": SimpleNamespace(url=lambda text: False)}
    for file, names in (("vlm.py", {"encode_image_to_base64", "resize_image_by_factor"}), ("file.py", {"parse_file"})):
        tree = ast.parse((root / "smp" / file).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
        exec(compile(tree, file, "exec"), space)
    smp.encode_image_to_base64, smp.parse_file = space["encode_image_to_base64"], space["parse_file"]
    client = importlib.import_module("vlmeval.api.gpt").GPT4V(
        model=NAME,
        api_base=f"http://127.0.0.1:{tooled.port}/v1/chat/completions",
        key="sk-none",
        img_size=-1,
        img_detail="high",
        retry=1,
        wait=0,
    )
    path = tmp_path / "sign.png"
    picture.save(path)
    before = tooled.server.metrics.answers["/v1/chat/completions", 200]
    answer = client.generate([{"type": "image", "value": str(path)}, {"type": "text", "value": row.question.question}])
    assert tooled.server.metrics.answers["/v1/chat/completions", 200] == before + 1
    # It sends JPEG, which the toy has not seen: it need not find the digit, but what it says is an answer.
    assert isinstance(answer, str) and answer and "Failed" not in answer


TASK, SPLIT = "vstar_bench", "test"


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an installed lmms-eval, whose files can be imported: of its registry, of its base class, and of two
    packages that it logs and reads the environment with, only what its clients call."""
    found = importlib.util.find_spec("lmms_eval")
    if found is None or found.origin is None:
        pytest.skip("lmms-eval is not installed: pip install --no-deps lmms-eval==0.7.3")
    pytest.importorskip("accelerate")
    root = Path(found.origin).parent
    packages = ("", ".api", ".models", ".models.chat", ".models.simple", ".models.model_utils")
    for name in (f"lmms_eval{package}" for package in packages):
        package = ModuleType(name)
        package.__path__ = [str(root.parent / name.replace(".", "/"))]
        monkeypatch.setitem(sys.modules, name, package)

    class Base:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    stands: dict[str, dict[str, Any]] = {
        "lmms_eval.api.registry": {"register_model": lambda *names: lambda cls: cls},
        "lmms_eval.api.model": {"lmms": Base},
        "loguru": {"logger": logging.getLogger("lmms_eval")},
        "dotenv": {"load_dotenv": lambda **_: False},
    }
    for name, values in stands.items():
        stand = ModuleType(name)
        vars(stand).update(values)
        monkeypatch.setitem(sys.modules, name, stand)
    before = set(sys.modules)
    yield root
    for name in set(sys.modules) - before:
        if name.startswith("lmms_eval"):
            del sys.modules[name]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # its asynchronous client is never closed
@pytest.mark.parametrize(
    ("path", "name"), [("chat.openai", "OpenAICompatible"), ("chat.async_openai", "AsyncOpenAIChat")]
)
def test_lmms_evals_own_clients_get_the_answers(
    lmms: Path, path: str, name: str, tooled: Served, row: Demonstration, picture: Image.Image, tmp_path: Path
) -> None:
    """Its chat clients as they are, eight requests at a time: pictures and texts as a task has them, and what a task's
    generation_kwargs say. The picture goes as PNG: the toy finds the digit."""
    client = getattr(importlib.import_module(f"lmms_eval.models.{path}"), name)(
        model_version=NAME, base_url=f"http://127.0.0.1:{tooled.port}/v1", api_key="none", max_retries=1
    )
    instance = importlib.import_module("lmms_eval.api.instance").Instance

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        shown = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["text"]}]
        return [{"role": "user", "content": shown}]

    docs = [{"image": picture, "text": row.question.question}] * 8
    client.task_dict = {TASK: {SPLIT: docs}}
    said = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    requests = [
        instance(
            request_type="generate_until",
            arguments=("", messages, dict(said), number, TASK, SPLIT),
            idx=0,
            metadata={"task": TASK, "doc_id": number, "repeats": 1},
        )
        for number in range(len(docs))
    ]
    before = tooled.server.metrics.answers["/v1/chat/completions", 200]
    answers = client.generate_until(requests)
    assert tooled.server.metrics.answers["/v1/chat/completions", 200] == before + len(docs)
    texts = [getattr(answer, "text", answer) for answer in answers]
    assert texts == [row.question.solution] * len(docs)
    assert all(answer.token_counts.output_tokens > 0 for answer in answers)
    del client
    gc.collect()
