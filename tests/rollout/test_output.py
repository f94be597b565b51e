"""What the model is shown of a code result."""

import pytest

from thyme.rollout.output import content
from thyme.sandbox import SandboxResult, SnippetError, Status


def shown(result: SandboxResult, compat: str = "none", max_chars: int = 100) -> str:
    return content(result, image_path="a/b/pic.v2.png", compat=compat, max_chars=max_chars, timeout_s=10.0)  # type: ignore


def failed(kind: str, message: str, line: int | None, status: Status = Status.ERROR, stdout: str = "") -> SandboxResult:
    return SandboxResult(status=status, stdout=stdout, error=SnippetError(kind, message, line))


def test_printed_text_comes_stripped() -> None:
    assert shown(SandboxResult(status=Status.OK, stdout="\n 0.5 \n\n")) == "0.5"


def test_errors_name_type_message_and_line() -> None:
    assert shown(failed("NameError", "'x' is not defined", 3)) == "Error: NameError: 'x' is not defined (line 3)"
    assert shown(failed("TimeoutError", "10 s", None, Status.TIMEOUT)) == "Error: TimeoutError: 10 s"
    assert shown(SandboxResult(status=Status.CRASHED)) == "Error: CRASHED"


def test_what_was_printed_before_an_error_wins() -> None:
    assert shown(failed("NameError", "x", 3, stdout="5")) == "5"


def test_silence_is_said() -> None:
    assert shown(SandboxResult(status=Status.OK)) == "No output captured."


def test_long_output_is_cut_and_counted() -> None:
    assert shown(SandboxResult(status=Status.OK, stdout="x" * 130)) == "x" * 100 + "\n... (30 more characters)"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (SandboxResult(status=Status.OK), "No output captured."),
        (SandboxResult(status=Status.TIMEOUT), "Execution timed out after 10 seconds."),
        (failed("NameError", "name 'x' is not defined", 3), "Code execution failed: name 'x' is not defined"),
        (failed("TabError", "mixed", 1), "Code execution failed due to SyntaxError: mixed"),
        (
            failed("ModuleNotFoundError", "No module named 'y'", 1),
            "Code execution failed due to ImportError. Ensure all required modules are available and correctly named: "
            "No module named 'y'",
        ),
        (
            failed("MemoryError", "", 1, Status.MEMORY),
            "Code execution failed due to MemoryError. The operation likely consumed too much memory: ",
        ),
    ],
)
def test_the_released_wording(result: SandboxResult, expected: str) -> None:
    assert shown(result, compat="released") == "Sandbox for pic.v2: " + expected


def test_the_released_sandbox_drops_what_was_printed_before_an_error() -> None:
    assert shown(failed("NameError", "x", 3, stdout="5"), "released") == "Sandbox for pic.v2: Code execution failed: x"


@pytest.mark.parametrize(
    "tag", ["</sandbox_output>", "<answer>", "</ANSWER>", "<image>", "<code>", "</think>", "< answer >"]
)
def test_printed_tags_are_escaped(tag: str) -> None:
    text = shown(SandboxResult(status=Status.OK, stdout=f"a {tag} b < c <b>"))
    assert text == f"a &lt;{tag[1:]} b < c <b>"
