"""Messages of a chat as a prompt: plainly, or as the model was trained to be asked when its code is run.

What a client writes is not trusted: the spelling of a special token in it stays plain text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from thyme.engine import Prompt
from thyme.model.image_processor import ImageInputs
from thyme.model.processor import IMAGE_TEXT, Processor
from thyme.rollout.prompts import (
    DIRECT_SYSTEM_PROMPT,
    SYSTEM_PROMPT,
    PromptStyle,
    direct_prompt,
    text_prompt,
    user_prompt,
)
from thyme.rollout.types import Question
from thyme.serve.config import ServeConfig
from thyme.serve.errors import ApiError
from thyme.serve.fields import Fields
from thyme.serve.pictures import PictureReader

_HOLE = "\0"
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One message: texts and pictures in their order."""

    role: str
    """system, user or assistant."""
    parts: tuple[str | Image.Image, ...]

    @property
    def text(self) -> str:
        """Its texts in one, without its pictures."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[Image.Image]:
        """Its pictures."""
        return [part for part in self.parts if not isinstance(part, str)]


def read_messages(source: Sequence[Any], limits: ServeConfig) -> list[Message]:
    """The messages of a body, their pictures decoded.

    Raises:
        ApiError: 422, a wrong type, an unknown role or kind of content, no user's turn at the end; 400 or 413, a
            picture.
    """
    messages: list[Message] = []
    pictures = PictureReader(limits)
    for index, item in enumerate(source):
        fields = Fields(item, f"messages[{index}]")
        role = fields.choice("role", "", _ROLES)
        parts = _parts(fields, role, pictures)
        for unsupported in ("tool_calls", "function_call", "audio"):
            fields.neutral(unsupported, [])
        fields.finish(("name", "refusal", "annotations", "reasoning_content", "trace"))  # of an answer, sent back
        messages.append(Message("system" if role == "developer" else role, tuple(parts)))
    if not messages or messages[-1].role != "user":
        raise ApiError(422, "messages: the last one must be the user's", param="messages")
    if any(message.role == "system" for message in messages[1:]):
        raise ApiError(422, "messages: a system message can only be the first", param="messages")
    return messages


def plain_prompt(messages: Sequence[Message], processor: Processor) -> Prompt:
    """The prompt of a chat without tools: by the tokenizer's chat template, else as ChatML.

    Raises:
        ApiError: 400, the template refuses the messages, or there is none.
        ValueError: a picture the model cannot take.
    """
    turns = []
    for message in messages:
        told = [_HOLE if isinstance(part, str) else "<image>" for part in message.parts]
        turns.append(_Turn(message.role, "".join(told), [part for part in message.parts if isinstance(part, str)]))
    by_template = bool(processor.tokenizer.chat_template)
    return Prompt(_encode(turns, processor, by_template=by_template), _images(messages, processor))


def tool_prompt(messages: Sequence[Message], style: PromptStyle, processor: Processor) -> Prompt:
    """The prompt of a chat whose code is run, as `thyme.rollout.prompts` words it; a system message of the client's
    takes the place of its system prompt.

    Raises:
        ApiError, ValueError: as `plain_prompt`.
    """
    turns, shown = [], 0
    system = {"thyme": SYSTEM_PROMPT, "direct": DIRECT_SYSTEM_PROMPT}.get(style)
    if system is not None and messages[0].role != "system":
        turns.append(_Turn("system", system, []))
    for message in messages:
        pictures, frame = message.pictures, _HOLE
        if message.role == "user":
            paths = [(_path(shown + number), picture.size) for number, picture in enumerate(pictures)]
            shown += len(pictures)
            if style != "thyme":
                frame = "<image>" * len(pictures) + (_HOLE if style == "short" else direct_prompt(_HOLE))
            else:
                frame = user_prompt(_HOLE, *paths[0], paths[1:]) if paths else text_prompt(_HOLE)
        turns.append(_Turn(message.role, frame, [message.text]))
    by_template = processor.im_start_id is None
    return Prompt(_encode(turns, processor, by_template=by_template), _images(messages, processor))


def question_of(messages: Sequence[Message], name: str) -> Question:
    """What a sandbox session of the chat sees: all pictures, under the paths that the model is told."""
    pictures = [picture for message in messages for picture in message.pictures]
    more = tuple((_path(number), picture) for number, picture in enumerate(pictures[1:], 1))
    return Question(
        id=name,
        image=pictures[0] if pictures else None,
        image_path=_path(0) if pictures else "",
        question=messages[-1].text,
        solution="",
        more_images=more,
    )


@dataclass(frozen=True, slots=True)
class _Turn:
    """A message as text of ours with holes, and what goes into the holes."""

    role: str
    frame: str
    texts: list[str] = field(default_factory=list)


def _path(number: int) -> str:
    return f"image_{number + 1}.png"


def _images(messages: Sequence[Message], processor: Processor) -> tuple[ImageInputs, ...]:
    return tuple(processor.preprocess(picture) for message in messages for picture in message.pictures)


def _parts(fields: Fields, role: str, pictures: PictureReader) -> list[str | Image.Image]:
    content = fields.raw("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        fields.fail("content", "expected a string or a list of parts")
    parts: list[str | Image.Image] = []
    for index, item in enumerate(content):
        part = Fields(item, fields.place(f"content[{index}]"))
        kind = part.text("type", None)
        if kind == "text":
            text = part.text("text", None)
            if text is None:
                part.fail("text", "missing")
            part.finish()
            parts.append(text)
        elif kind == "image_url" and role == "user":
            url = part.raw("image_url")
            if isinstance(url, dict):
                named = Fields(url, part.place("image_url"))
                url = named.text("url", None)
                named.finish(("detail", "max_dynamic_patch"))  # evaluation kits send the second, meant for InternVL
            if not isinstance(url, str):
                part.fail("image_url", 'expected {"url": "data:image/png;base64,..."}')
            part.finish()
            parts.append(pictures.read(url, part.place("image_url")))
        else:
            takes = "text or image_url" if role == "user" else "text"
            part.fail("type", f"{kind!r} is not supported in a message of role {role}: it takes {takes}")
    return parts


def _encode(turns: Sequence[_Turn], processor: Processor, *, by_template: bool) -> list[int]:
    """Ids of the turns, up to where the assistant speaks."""
    framed = _template(turns, processor) if by_template else _chatml(turns, processor)
    pieces = framed.split(_HOLE)
    texts = [text for turn in turns for text in turn.texts]
    if len(pieces) != len(texts) + 1:
        raise ApiError(400, "messages: the model's chat template does not show all of them", param="messages")
    parts = [(pieces[0], True)]
    for text, piece in zip(texts, pieces[1:], strict=True):
        parts += [(text, False), (piece, True)]
    return processor.encode_parts(parts)


def _chatml(turns: Sequence[_Turn], processor: Processor) -> str:
    if processor.im_start_id is None:
        raise ApiError(400, "the model has neither a chat template nor <|im_start|>: use /v1/completions")
    body = "".join(f"<|im_start|>{turn.role}\n{_shown(turn, processor)}<|im_end|>\n" for turn in turns)
    return body + "<|im_start|>assistant\n"


def _template(turns: Sequence[_Turn], processor: Processor) -> str:
    if not processor.tokenizer.chat_template:
        return _chatml(turns, processor)
    conversation = [{"role": turn.role, "content": _shown(turn, processor)} for turn in turns]
    try:
        return str(processor.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ApiError(400, f"messages: the model's chat template refuses them: {error}", param="messages") from None


def _shown(turn: _Turn, processor: Processor) -> str:
    return turn.frame.replace("<image>", IMAGE_TEXT) if processor.image_config is not None else turn.frame
