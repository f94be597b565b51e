"""Answers in OpenAI's layout: whole, or as the chunks of a stream."""

import base64
import io
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from thyme.model.processor import Processor
from thyme.rollout.types import Rollout, TokenKind
from thyme.serve.deltas import Delta, Drawn, End
from thyme.serve.requests import Asked, TraceDetail


class Answer:
    """Builds what is sent for one request.

    Args:
        asked: the request.
        model_name: of the model.
        processor: spells tokens.
        prompt_ids: of each prompt, images expanded.
    """

    def __init__(self, asked: Asked, model_name: str, processor: Processor, prompt_ids: Sequence[list[int]]) -> None:
        self.asked, self.processor, self.prompt_ids = asked, processor, prompt_ids
        kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {"id": asked.name, "object": kind, "created": int(time.time()), "model": model_name}
        count = len(asked.prompts) * asked.params.n
        self._content, self._reasoning = [""] * count, [""] * count
        self._drawn: list[list[Drawn]] = [[] for _ in range(count)]
        self._ends: list[End | None] = [None] * count
        self._num_chars = [0] * count
        self._begun: set[int] = set()

    def take(self, deltas: Iterable[Delta]) -> None:
        """Adds to the whole answer."""
        for delta in deltas:
            self._content[delta.choice] += delta.content
            self._reasoning[delta.choice] += delta.reasoning
            self._drawn[delta.choice].append(delta.drawn)
            self._ends[delta.choice] = delta.end

    def whole(self) -> dict[str, Any]:
        """The answer, once every choice has ended."""
        body: dict[str, Any] = {**self._head, "choices": []}
        for index, end in enumerate(self._ends):
            assert end is not None
            drawn = _joined(self._drawn[index]) if end.rollout is None else _of_rollout(end.rollout)
            choice: dict[str, Any] = {"index": index}
            if self.asked.is_chat:
                message = {"role": "assistant", "content": self._content[index], "refusal": None}
                if self.asked.tools is not None:
                    message["reasoning_content"] = self._reasoning[index]
                choice["message"] = message
            else:
                choice["text"] = self._content[index]
            body["choices"].append(choice | self._details(index, drawn) | self._ending(index, end))
        if self.asked.return_token_ids and self.asked.is_chat:
            body["prompt_token_ids"] = self.prompt_ids[0]
        return body | {"usage": self.usage()}

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """One chunk of a stream."""
        self._ends[delta.choice] = delta.end or self._ends[delta.choice]
        self._drawn[delta.choice].append(Drawn(delta.drawn.token_ids))
        index, end = delta.choice, delta.end
        drawn = _of_rollout(end.rollout) if end is not None and end.rollout is not None else delta.drawn
        choice: dict[str, Any] = {"index": index}
        if self.asked.is_chat:
            said: dict[str, Any] = {} if index in self._begun else {"role": "assistant", "content": ""}
            if delta.content:
                said["content"] = delta.content
            if delta.reasoning:
                said["reasoning_content"] = delta.reasoning
            choice["delta"] = said
        else:
            choice["text"] = delta.content
        choice |= self._details(index, drawn)
        choice |= {"finish_reason": None} if end is None else self._ending(index, end)
        body = {**self._head, "choices": [choice]}
        if self.asked.is_chat:
            body["object"] = "chat.completion.chunk"
            if self.asked.return_token_ids and not self._begun:
                body["prompt_token_ids"] = self.prompt_ids[0]
        self._begun.add(index)
        return body

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the counts."""
        kind = "chat.completion.chunk" if self.asked.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of all prompts, each once, and of all choices; what a sandbox returned counts as neither."""
        prompt = sum(map(len, self.prompt_ids))
        drawn = 0
        for parts, end in zip(self._drawn, self._ends, strict=True):
            if end is not None and end.rollout is not None:
                drawn += end.rollout.num_sampled
            else:
                drawn += sum(len(part.token_ids) for part in parts)
        return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}

    def _ending(self, index: int, end: End) -> dict[str, Any]:
        found: dict[str, Any] = {"finish_reason": end.finish_reason, "stop_reason": end.stop_reason}
        if self.asked.return_token_ids and not self.asked.is_chat:
            found["prompt_token_ids"] = self.prompt_ids[index // self.asked.params.n]
        if self.asked.return_token_ids:
            found["token_records"] = _records(end, len(self.prompt_ids[index // self.asked.params.n]))
        if end.rollout is not None and self.asked.tools is not None and self.asked.tools.trace != "off":
            found["trace"] = trace_of(end.rollout, self.asked.tools.trace)
        return found

    def _details(self, index: int, drawn: Drawn) -> dict[str, Any]:
        details: dict[str, Any] = {"logprobs": None}
        if self.asked.logprobs and drawn.token_ids:
            values = drawn.logprobs if self.asked.processed else drawn.logprobs_raw
            spelled = [self.processor.token_bytes(token) for token in drawn.token_ids]
            shown = [
                raw.decode(errors="replace") or self.processor.decode([token])
                for raw, token in zip(spelled, drawn.token_ids, strict=True)
            ]
            if self.asked.is_chat:
                rows = zip(shown, values, spelled, strict=True)
                content = [{"token": t, "logprob": v, "bytes": list(b), "top_logprobs": []} for t, v, b in rows]
                details["logprobs"] = {"content": content, "refusal": None}
            else:
                lengths = np.cumsum([self._num_chars[index], *map(len, shown)]).tolist()
                self._num_chars[index] = lengths[-1]
                details["logprobs"] = {
                    "tokens": shown,
                    "token_logprobs": list(values),
                    "top_logprobs": None,
                    "text_offset": lengths[:-1],
                }
        if self.asked.return_token_ids:
            details["token_ids"] = list(drawn.token_ids)
        return details


def trace_of(rollout: Rollout, detail: TraceDetail) -> dict[str, Any]:
    """What happened on the way to an answer: a row for each round.

    Args:
        detail: "full": with what the code's pictures show, as data URIs; else with their sizes alone.
    """
    rounds = []
    for turn in rollout.turns:
        row: dict[str, Any] = {"text": turn.text, "code": turn.code, "output": turn.output_text, "result": None}
        if (result := turn.result) is not None:
            row["result"] = {
                "status": result.status.value,
                "stdout": result.stdout,
                "error": None if result.error is None else result.error._asdict(),
                "fixes": [str(fix) for fix in result.fixes],
                "wall_s": result.wall_s,
                "images": [
                    {"width": image.width, "height": image.height}
                    | ({"url": _data_uri(image)} if detail == "full" else {})
                    for image in result.images
                ],
            }
        rounds.append(row)
    return {"status": rollout.status.value, "answer": rollout.answer, "seed": rollout.seed, "rounds": rounds}


def _records(end: End, prompt_len: int) -> dict[str, Any]:
    """What is known of each token of `token_ids`, or with tools of each token after the prompt, outputs included."""
    if end.rollout is not None:
        rollout = end.rollout
        columns = {name: getattr(rollout, name)[prompt_len:] for name in _ROLLOUT_COLUMNS}
        ids, sampled = rollout.token_ids[prompt_len:], rollout.sampled[prompt_len:]
    else:
        assert end.completion is not None
        done = end.completion
        columns = {name: getattr(done, name) for name in _ROLLOUT_COLUMNS[:-1]}
        columns["weight_versions"] = done.weight_version
        ids, sampled = np.asarray(done.token_ids), np.ones(len(done.token_ids), dtype=bool)
    kinds = [TokenKind(kind).name.lower() for kind in columns.pop("kinds")]
    numbers = {name: np.asarray(column).tolist() for name, column in columns.items()}
    return {"token_ids": ids.tolist(), "sampled": sampled.tolist(), "kinds": kinds} | numbers


_ROLLOUT_COLUMNS = ("kinds", "temperatures", "logprobs", "logprobs_raw", "entropies", "weight_versions")


def _joined(parts: Sequence[Drawn]) -> Drawn:
    return Drawn(
        [token for part in parts for token in part.token_ids],
        [value for part in parts for value in part.logprobs],
        [value for part in parts for value in part.logprobs_raw],
    )


def _of_rollout(rollout: Rollout) -> Drawn:
    """The tokens that a rollout drew."""
    drawn = rollout.sampled
    return Drawn(
        rollout.token_ids[drawn].tolist(), rollout.logprobs[drawn].tolist(), rollout.logprobs_raw[drawn].tolist()
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
