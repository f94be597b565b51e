"""Counters of the server, in Prometheus' text format. Standard library only; used on the event loop alone."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)

_ENGINE: dict[str, tuple[str, str, str]] = {
    "running": ("thyme_sequences_running", "gauge", "Sequences that are decoded."),
    "waiting": ("thyme_sequences_waiting", "gauge", "Sequences that wait for a place in the engine."),
    "parked": ("thyme_sequences_parked", "gauge", "Sequences that keep their KV while their code runs."),
    "blocks": ("thyme_kv_blocks", "gauge", "Blocks of the KV cache."),
    "blocks_used": ("thyme_kv_blocks_used", "gauge", "Blocks of the KV cache that sequences hold."),
    "weight_version": ("thyme_weight_version", "gauge", "Weight updates since the start."),
    "steps": ("thyme_engine_steps_total", "counter", "Passes through the model."),
    "prefilled_tokens": ("thyme_prefilled_tokens_total", "counter", "Given tokens that were computed."),
    "cached_tokens": ("thyme_cached_tokens_total", "counter", "Given tokens that the prefix cache had."),
    "sampled_tokens": ("thyme_sampled_tokens_total", "counter", "Tokens drawn."),
    "dropped_tokens": ("thyme_dropped_tokens_total", "counter", "Tokens computed for rounds that had ended."),
    "verifications": ("thyme_verifications_total", "counter", "Drafts of a sequence that a step tried out."),
    "drafted_tokens": ("thyme_drafted_tokens_total", "counter", "Tokens in these drafts."),
    "accepted_tokens": ("thyme_accepted_tokens_total", "counter", "Tokens in these drafts that were drawn."),
    "preemptions": ("thyme_preemptions_total", "counter", "Sequences that lost their place for another."),
    "images_encoded": ("thyme_images_encoded_total", "counter", "Pictures that the vision tower encoded."),
}
"""Name in `Engine.stats` -> metric, type, help."""


class Histogram:
    """How often a duration fell below each bound."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[sum(seconds > bound for bound in _SECONDS)] += 1
        self.total += seconds

    def lines(self) -> Iterator[str]:
        """In Prometheus' format."""
        yield from (f"# HELP {self.name} {self.text}", f"# TYPE {self.name} histogram")
        below = 0
        for bound, count in zip([*map(str, _SECONDS), "+Inf"], self.counts, strict=True):
            below += count
            yield f'{self.name}_bucket{{le="{bound}"}} {below}'
        yield from (f"{self.name}_sum {self.total:.6f}", f"{self.name}_count {below}")


class Metrics:
    """What has been served."""

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        """By path and status."""
        self.disconnects = 0
        self.code_blocks: Counter[str] = Counter()
        """By the sandbox's status."""
        self.first_token = Histogram(
            "thyme_time_to_first_token_seconds", "From the end of the body to the first token."
        )
        self.whole = Histogram("thyme_request_seconds", "From the end of the body to the end of the answer.")

    def text(self, stats: Mapping[str, Any], *, num_open: int, is_paused: bool, is_asleep: bool) -> str:
        """Everything, with what the engine says of itself."""
        lines: list[str] = []

        def add(name: str, kind: str, text: str, values: Mapping[str, Any]) -> None:
            lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value}" for labels, value in values.items())

        for key, (name, kind, text) in _ENGINE.items():
            add(name, kind, text, {"": stats[key]})
        add("thyme_requests_open", "gauge", "Requests that run or wait.", {"": num_open})
        add("thyme_paused", "gauge", "1 while nothing is decoded on purpose.", {"": int(is_paused)})
        add("thyme_asleep", "gauge", "1 while the KV cache is given back.", {"": int(is_asleep)})
        answered = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(self.answers.items())}
        add("thyme_http_answers_total", "counter", "Answers by path and status.", answered)
        add("thyme_disconnects_total", "counter", "Clients that left before their answer.", {"": self.disconnects})
        blocks = {f'{{status="{status}"}}': count for status, count in sorted(self.code_blocks.items())}
        add("thyme_code_blocks_total", "counter", "Code blocks run, by how they ended.", blocks)
        for histogram in (self.first_token, self.whole):
            lines.extend(histogram.lines())
        return "\n".join(lines) + "\n"
