"""Bodies of requests, read and checked: what the engine is asked for, and how the answer is to look."""

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from thyme.engine import Prompt, SamplingParams
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.types import Question
from thyme.serve.chat import plain_prompt, question_of, read_messages, tool_prompt
from thyme.serve.config import ServeConfig
from thyme.serve.errors import ApiError
from thyme.serve.fields import Fields, parse_json
from thyme.serve.pictures import PictureReader

TraceDetail = Literal["off", "text", "full"]

_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "dataset", "priority")
"""Fields that change nothing here: OpenAI's book-keeping, and what evaluation kits send along (`dataset`)."""
_MOST_PROMPTS = 256
_MOST_CHOICES = 1024
"""Of all prompts of a request together."""
_MOST_STOPS = 16
_COMPLETION_TOKENS = 16
"""What OpenAI's completions draw where nobody says how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The code of this chat is run."""

    question: Question
    """What its sandbox session sees."""
    config: RolloutConfig
    trace: TraceDetail


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, ready for the engine."""

    name: str
    """Its id in the answer."""
    is_chat: bool
    prompts: tuple[Prompt, ...]
    """Pictures preprocessed; each has `params.n` choices, and the choices of a prompt stand side by side."""
    params: SamplingParams
    tools: ToolUse | None
    stream: bool
    include_usage: bool
    """A stream ends with a chunk that has the counts."""
    logprobs: bool
    processed: bool
    """Log-probs at the temperature used, over the ids that truncation kept; else the model's own, at temperature 1."""
    return_token_ids: bool
    keep_stop: bool
    """The text ends with the stop text; else before it."""


class BodyReader:
    """Reads bodies for one model. Its methods take CPU time and may run on several threads at once.

    Args:
        processor: of the model.
        rollout: how chats are run whose code is run, where they say nothing else; None: no chat's code is.
        limits: of a request.
        model_name: what `model` must say.
        most_choices: that one prompt may have.
        max_context: tokens of one sequence.
        vocab_size: of the model.
    """

    def __init__(
        self,
        processor: Processor,
        rollout: RolloutConfig | None,
        limits: ServeConfig,
        *,
        model_name: str,
        most_choices: int,
        max_context: int,
        vocab_size: int,
    ) -> None:
        self.processor, self.rollout, self.limits = processor, rollout, limits
        self.model_name, self.most_choices = model_name, most_choices
        self.max_context, self.vocab_size = max_context, vocab_size

    def chat(self, body: bytes) -> Asked:
        """The request of a body of /v1/chat/completions.

        Raises:
            ApiError: what is wrong with it.
        """
        fields, name = Fields(parse_json(body)), f"chatcmpl-{uuid.uuid4().hex}"
        self._check_model(fields)
        logprobs = fields.flag("logprobs", False)
        if fields.integer("top_logprobs", 0, 0, 20):
            fields.fail("top_logprobs", "only the log-prob of the drawn token is known: leave it out")
        limit = fields.integer("max_tokens", None, 1)
        limit = fields.integer("max_completion_tokens", limit, 1)
        run_code = fields.flag("run_code", self.rollout is not None and self.limits.run_code)
        trace: Any = fields.choice("trace", "text", ("off", "text", "full"))
        if run_code and self.rollout is None:
            fields.fail("run_code", "this server opens no sandbox: leave it out, or start it with --serve.run-code")
        source = fields.items("messages", dict, "objects")
        drawing = self._tool_params(fields, limit) if run_code else self._plain_params(fields, limit, self.max_context)
        shape = self._shape(fields)
        for unsupported in ("functions", "tools", "modalities", "audio", "prediction", "web_search_options"):
            fields.neutral(unsupported, [])
        fields.neutral("response_format", {"type": "text"})
        for choice in ("tool_choice", "function_call"):
            fields.neutral(choice, "none", "auto")
        fields.neutral("parallel_tool_calls", True, False)
        for unsupported in ("reasoning_effort", "verbosity"):
            fields.neutral(unsupported)
        fields.finish(_IGNORED)
        messages = read_messages(source, self.limits)
        with _client_errors():
            if not run_code:
                prompt, tools = plain_prompt(messages, self.processor), None
            else:
                config, _ = self._loop_config(limit)
                if not messages[-1].text.strip():
                    fields.fail(f"messages[{len(messages) - 1}].content", "empty: ask something")
                prompt = tool_prompt(messages, config.prompt_style, self.processor)
                tools = ToolUse(question=question_of(messages, name), config=config, trace=trace)
        return Asked(
            name=name, is_chat=True, prompts=(prompt,), params=drawing, tools=tools, logprobs=logprobs, **shape
        )

    def completion(self, body: bytes) -> Asked:
        """The request of a body of /v1/completions.

        Raises:
            ApiError: what is wrong with it.
        """
        fields = Fields(parse_json(body))
        self._check_model(fields)
        known = fields.integer("logprobs", None, 0, 20)
        if known:
            fields.fail("logprobs", f"{known}: only the log-prob of the drawn token is known: say 0")
        prompts = self._prompts(fields)
        images = fields.items("images", str, "data URIs")
        if images and len(prompts) > 1:
            fields.fail("images", f"{len(prompts)} prompts: pictures go with one prompt")
        limit = fields.integer("max_tokens", _COMPLETION_TOKENS, 1)
        params, shape = self._plain_params(fields, limit, self.max_context), self._shape(fields)
        if len(prompts) * params.n > _MOST_CHOICES:
            fields.fail("n", f"{params.n} choices for each of {len(prompts)} prompts, at most {_MOST_CHOICES} in all")
        fields.neutral("echo", False)
        fields.neutral("best_of", *{1, params.n})
        fields.neutral("suffix", "")
        fields.finish(_IGNORED)
        with _client_errors():
            reader = PictureReader(self.limits)
            pictures = tuple(
                self.processor.preprocess(reader.read(uri, f"images[{i}]")) for i, uri in enumerate(images)
            )
            made = tuple(
                Prompt(self.processor.encode(prompt) if isinstance(prompt, str) else prompt, pictures)
                for prompt in prompts
            )
        name = f"cmpl-{uuid.uuid4().hex}"
        return Asked(
            name=name, is_chat=False, prompts=made, params=params, tools=None, logprobs=known is not None, **shape
        )

    def _check_model(self, fields: Fields) -> None:
        said = fields.text("model", None)
        if said is not None and said != self.model_name:
            raise ApiError(
                404, f"model: {said!r} is not here: {self.model_name!r} is", param="model", code="model_not_found"
            )

    def _prompts(self, fields: Fields) -> list[str | list[int]]:
        prompt = fields.raw("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            fields.fail("prompt", "expected a string, a list of token ids, or a list of either, and not empty")
        if len(prompt) > _MOST_PROMPTS:
            fields.fail("prompt", f"{len(prompt)} prompts in one request, at most {_MOST_PROMPTS}")
        for index, one in enumerate(prompt):
            if isinstance(one, list) and not all(type(token) is int and 0 <= token < self.vocab_size for token in one):
                fields.fail(f"prompt[{index}]", f"token ids are integers in 0..{self.vocab_size - 1}")
            if not isinstance(one, str | list) or not one:
                fields.fail(f"prompt[{index}]", "expected text or token ids, and not empty")
        return prompt

    def _shape(self, fields: Fields) -> dict[str, Any]:
        """How the answer is to look."""
        stream = fields.flag("stream", False)
        said = fields.raw("stream_options")
        options = Fields({} if said is None else said, "stream_options")
        include_usage = options.flag("include_usage", False)
        options.finish(("include_obfuscation",))
        modes = ("raw_logprobs", "processed_logprobs")
        return {
            "stream": stream,
            "include_usage": include_usage,
            "processed": fields.choice("logprobs_mode", modes[0], modes) == modes[1],
            "return_token_ids": fields.flag("return_token_ids", False),
            "keep_stop": fields.flag("include_stop_str_in_output", False),
        }

    def _common(self, fields: Fields) -> dict[str, Any]:
        """What is drawn, as far as chats with and without tools agree."""
        fields.neutral("presence_penalty", 0, 0.0)
        fields.neutral("frequency_penalty", 0, 0.0)
        fields.neutral("logit_bias", {})
        stop = fields.raw("stop")
        stop = [stop] if isinstance(stop, str) else [] if stop is None else fields.items("stop", str, "strings")
        if len(stop) > _MOST_STOPS or not all(stop):
            fields.fail("stop", f"at most {_MOST_STOPS} texts, none empty")
        ids = fields.items("stop_token_ids", int, "token ids")
        if not all(0 <= token < self.vocab_size for token in ids):
            fields.fail("stop_token_ids", f"token ids are in 0..{self.vocab_size - 1}")
        top_k = fields.integer("top_k", None, -1)
        top_p = fields.number("top_p", None, 0, 1)
        if top_p == 0:
            fields.fail("top_p", "0 leaves no token: it must be above 0; for greedy drawing say temperature 0")
        n = fields.integer("n", 1, 1)
        assert n is not None
        if n > self.most_choices:
            fields.fail("n", f"{n} choices, at most {self.most_choices} are drawn side by side")
        return {
            "n": n,
            "top_k": None if top_k == -1 else top_k,
            "top_p": top_p,
            "min_p": fields.number("min_p", None, 0, 1),
            "repetition_penalty": fields.number("repetition_penalty", 1.0, 1e-3, 1e3),
            "seed": fields.integer("seed", None, -(1 << 63), (1 << 63) - 1 - n),
            "stop": tuple(stop),
            "stop_token_ids": tuple(ids),
        }

    def _plain_params(self, fields: Fields, limit: int | None, most: int) -> SamplingParams:
        """Without tools: the tags of code mean nothing, and no loop is looked for."""
        temperature = fields.number("temperature", 1.0, 0, 100)
        code = fields.number("code_temperature", None, 0, 100)
        assert temperature is not None
        return SamplingParams(
            max_tokens=min(limit or most, most),
            temperature=temperature,
            code_temperature=temperature if code is None else code,
            adaptive=code is not None,
            ignore_eos=fields.flag("ignore_eos", False),
            stop_at_tags=False,
            repetition=None,
            **self._common(fields),
        )

    def _tool_params(self, fields: Fields, limit: int | None) -> SamplingParams:
        """With tools: as rollouts are drawn, where the body says nothing else."""
        config, budget = self._loop_config(limit)
        said = self._common(fields)
        drawn = {key: said[key] for key in ("top_k", "top_p", "min_p") if said[key] is not None}
        temperature = fields.number("temperature", config.temperature, 0, 100)
        code = fields.number("code_temperature", config.code_temperature, 0, 100)
        sampling = config.sampling(n=said["n"], temperature=temperature, code_temperature=code, **drawn)
        if fields.raw("repetition_penalty") is not None:
            sampling = replace(sampling, repetition_penalty=said["repetition_penalty"])
        fields.neutral("ignore_eos", False)
        params = sampling.engine_params(self.processor, budget)
        return replace(params, **{key: said[key] for key in ("n", "seed", "stop", "stop_token_ids")})

    def _loop_config(self, limit: int | None) -> tuple[RolloutConfig, int]:
        """The loop's limits with at most `limit` tokens, and the tokens of its first round."""
        assert self.rollout is not None
        most = self.rollout.max_tokens if limit is None else min(limit, self.max_context)
        config = replace(
            self.rollout, max_tokens=most, max_tokens_per_round=min(most, self.rollout.max_tokens_per_round)
        )
        return config, min(config.max_tokens_per_round, config.max_tokens)


@contextmanager
def _client_errors() -> Iterator[None]:
    """What model and tokenizer refuse is the client's to mend: 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def dump(value: Any) -> bytes:
    """JSON as it goes over the wire; half a surrogate pair, which a snippet may have printed, becomes "?"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


Reader = Callable[[bytes], Asked]
