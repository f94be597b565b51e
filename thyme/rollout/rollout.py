"""The multi-round loop: questions in, rollouts out, engine and sandbox at work at the same time.

A group of sequences is added to the engine per question. A round ends at `</code>`: the sequence is held with its KV
cache, its code runs in the rollout's sandbox session (thyme/rollout/executor.py), and the other sequences go on
decoding. When the result is there, `<sandbox_output>...</sandbox_output>` is appended and only those tokens are
prefilled. It goes on until an answer or a limit. The state of one run lives in thyme/rollout/run.py.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from functools import cached_property

from thyme.engine import Engine, SamplingParams
from thyme.model.processor import Processor
from thyme.rollout.config import RolloutConfig
from thyme.rollout.events import End, Event
from thyme.rollout.run import Run, RunTiming
from thyme.rollout.types import Question, Rollout
from thyme.sandbox import Sandbox

MAX_ASPECT = 200
"""Longer side over shorter side of an image: Qwen2.5-VL's resize refuses more."""


class RolloutLoop:
    """Runs questions through engine and sandbox.

    Args:
        engine: decodes; nothing else may use it during a run.
        sandbox: runs code; a session per rollout, opened at its first code block.
        processor: of the engine's model.
        config: limits, prompt style and sampling defaults.

    Raises:
        ValueError: the sandbox lets images through that the processor can't resize.
    """

    def __init__(
        self, engine: Engine, sandbox: Sandbox, processor: Processor, config: RolloutConfig | None = None
    ) -> None:
        if sandbox.config.max_aspect > MAX_ASPECT:
            raise ValueError(
                f"sandbox.max_aspect: {sandbox.config.max_aspect} must be at most {MAX_ASPECT}: "
                "no image processor takes longer images"
            )
        self.engine = engine
        self.sandbox = sandbox
        self.processor = processor
        self.config = config or RolloutConfig()
        self.timing: RunTiming | None = None
        """Of the last completed run."""

    def run(
        self,
        questions: Sequence[Question],
        n: int | None = None,
        *,
        temperature: float | None = None,
        code_temperature: float | None = None,
        adaptive: bool | None = None,
        seed: int = 0,
        allow_code: bool = True,
    ) -> list[list[Rollout]]:
        """`n` rollouts of each question, in question order, then by index.

        What a rollout draws depends on `seed`, the question's id and its index alone, not on the batch around it.

        Args:
            n: rollouts per question; None: the config's group_size.
            temperature, code_temperature, adaptive: of the sampler; None: the config's.
            seed: other seeds give other rollouts.
            allow_code: False is the no-code control: no token that completes `<code>` can be drawn, and where the
                tokenizer spells the tag in several tokens the rollout ends with MAX_ROUNDS at the tag, unanswered.

        Raises:
            ValueError: n < 1, an empty question, an image that can't be used.
        """
        n = self.config.group_size if n is None else n
        params = self._params(temperature, code_temperature, adaptive, allow_code)
        run = self._new_run(questions, n, params, seed, allow_code, streaming=False)
        rollouts: list[dict[int, Rollout]] = [{} for _ in questions]
        with closing(run.events()) as events:
            for event in events:
                if isinstance(event, End):
                    rollouts[event.rollout.group][event.rollout.index] = event.rollout
        self.timing = run.timing()
        return [[group[index] for index in range(n)] for group in rollouts]

    def stream(
        self,
        question: Question,
        *,
        temperature: float | None = None,
        code_temperature: float | None = None,
        adaptive: bool | None = None,
        seed: int = 0,
        allow_code: bool = True,
    ) -> Generator[Event, None, None]:
        """One rollout of one question as events, as they happen; the last one is End. Arguments as in `run`.

        Close the generator to cancel the rollout.
        """
        params = self._params(temperature, code_temperature, adaptive, allow_code)
        run = self._new_run([question], 1, params, seed, allow_code, streaming=True)
        yield from run.events()
        self.timing = run.timing()

    def _new_run(
        self,
        questions: Sequence[Question],
        n: int,
        params: SamplingParams,
        seed: int,
        allow_code: bool,
        *,
        streaming: bool,
    ) -> Run:
        return Run(
            self.engine,
            self.sandbox,
            self.processor,
            self.config,
            questions,
            n=n,
            params=params,
            seed=seed,
            max_rounds=self.config.max_rounds if allow_code else 0,
            streaming=streaming,
        )

    def _params(
        self, temperature: float | None, code_temperature: float | None, adaptive: bool | None, allow_code: bool
    ) -> SamplingParams:
        config = self.config
        return SamplingParams(
            max_tokens=min(config.max_tokens_per_round, config.max_tokens),
            temperature=config.temperature if temperature is None else temperature,
            code_temperature=config.code_temperature if code_temperature is None else code_temperature,
            adaptive=config.adaptive if adaptive is None else adaptive,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=() if allow_code else ("<code>",),
            banned_ids="default" if allow_code else (*self.processor.never_sampled_ids, *self._code_ids),
        )

    @cached_property
    def _code_ids(self) -> tuple[int, ...]:
        """Every token that completes `<code>` alone, whatever follows the tag in it."""
        token_bytes = self.processor.token_bytes
        return tuple(i for i in range(self.processor.vocab_size) if b"<code>" in token_bytes(i))
