"""A JSON object read field by field: types and ranges are checked, and what nobody read is unknown.

Every complaint is a 422 that names the field. null means absent, as in OpenAI's API. Standard library only.
"""

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from thyme.serve.errors import ApiError


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        value = json.loads(body, parse_constant=_no_constant)
        if b"\\ud" in body or b"\\uD" in body:  # half a surrogate pair is no text that a tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the body is JSON nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, it is {_name(value)}", code="invalid_json")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


class Fields:
    """The fields of one object.

    Args:
        source: the object; ApiError if it is none.
        where: its place in the body, "" for the body itself.
    """

    def __init__(self, source: Any, where: str = "") -> None:
        if not isinstance(source, dict):
            raise ApiError(422, f"{where or 'body'}: expected an object, got {_name(source)}", param=where or None)
        self._source, self._where = source, where
        self._read: set[str] = set()

    def place(self, name: str) -> str:
        """The field's full name."""
        return f"{self._where}.{name}" if self._where else name

    def fail(self, name: str, problem: str) -> NoReturn:
        """Raises the ApiError that says what is wrong with a field."""
        raise ApiError(422, f"{self.place(name)}: {problem}", param=self.place(name))

    def raw(self, name: str) -> Any:
        """Whatever it is; None where it is absent."""
        self._read.add(name)
        return self._source.get(name)

    def integer(self, name: str, default: int | None, low: int, high: int = (1 << 63) - 1) -> int | None:
        """A whole number from `low` to `high`."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is not int:
            self.fail(name, f"expected an integer, got {_name(value)}")
        if not low <= value <= high:
            self.fail(name, f"{value} must lie in {low}..{high}" if high < 1 << 62 else f"{value} must be >= {low}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float = math.inf) -> float | None:
        """A finite number from `low` to `high`."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) not in (int, float):
            self.fail(name, f"expected a number, got {_name(value)}")
        if not (low <= value <= high and math.isfinite(value)):
            self.fail(name, f"{value} must lie in {low:g}..{high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(name)
        if value is None:
            return default
        if type(value) is not bool:
            self.fail(name, f"expected true or false, got {_name(value)}")
        return value

    def text(self, name: str, default: str | None) -> str | None:
        """A string."""
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(name, f"expected a string, got {_name(value)}")
        return value

    def choice(self, name: str, default: str, allowed: Iterable[str]) -> str:
        """One of several strings."""
        value = self.text(name, default)
        if value not in (allowed := tuple(allowed)):
            self.fail(name, f"{value!r} must be one of {', '.join(allowed)}")
        return value

    def items(self, name: str, kind: type, what: str) -> list[Any]:
        """A list of `kind`, called `what` in complaints; empty where it is absent."""
        value = self.raw(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.fail(name, f"expected a list of {what}, got {_name(value)}")
        for index, item in enumerate(value):
            if type(item) is not kind:
                self.fail(f"{name}[{index}]", f"expected {what}, got {_name(item)}")
        return value

    def neutral(self, name: str, *values: Any) -> None:
        """A field of OpenAI's that is not supported: it may only say what is done anyway."""
        value = self.raw(name)
        if value is not None and not any(value == allowed and type(value) is type(allowed) for allowed in values):
            said = " or ".join(json.dumps(allowed) for allowed in values) or "nothing"
            self.fail(name, f"not supported here: leave it out, or say {said}")

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Refuses fields that were neither read nor are among those `ignored`."""
        for name in self._source.keys() - self._read - set(ignored):
            near = difflib.get_close_matches(name, sorted(self._read), n=1, cutoff=0.6)
            self.fail(name, "unknown field" + (f": did you mean {near[0]!r}?" if near else ""))


def _name(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return kinds[type(value)]
