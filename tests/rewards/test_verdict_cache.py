"""The folder of verdicts: what stands in it is whole, whoever writes."""

import multiprocessing
import threading
from pathlib import Path

from thyme.rewards.verdict_cache import VerdictCache


def _rewrite(folder: str, key: str, go: "threading.Event") -> None:
    cache = VerdictCache(Path(folder))
    while not go.is_set():
        cache.put(key, "x" * 50_000)


def test_a_verdict_is_never_seen_in_part_while_other_processes_write_it(tmp_path: Path) -> None:
    cache, key = VerdictCache(tmp_path), VerdictCache.key(prompt="p")
    assert cache.get(key) is None
    cache.put(key, "x")
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    others = [spawn.Process(target=_rewrite, args=(str(tmp_path), key, stop), daemon=True) for _ in range(2)]
    for other in others:
        other.start()
    file = next(tmp_path.rglob("*.json"))
    while file.stat().st_size < 50_000:  # until the first of them has written
        assert cache.get(key) is not None
    assert {cache.get(key) for _ in range(3000)} == {"x" * 50_000}
    stop.set()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key[2:]}.json"]


def test_all_that_a_verdict_depends_on_is_in_its_name(tmp_path: Path) -> None:
    asked = {"model": "m", "prompt": "p", "temperature": 0.0, "max_tokens": 256}
    others = [asked | changed for changed in ({"model": "n"}, {"prompt": "q"}, {"temperature": 0.1}, {"max_tokens": 9})]
    names = {VerdictCache.key(**each) for each in [asked, *others]}
    assert len(names) == 5 and VerdictCache.key(**dict(reversed(asked.items()))) in names
