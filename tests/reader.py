"""Somebody who has what the pages speak of, small, and follows a page from top to bottom in a folder of their own."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.data.rows import thyme_sft, write_released_sets
from tests.evals.benchmarks.published import ROWS, write_tsv
from tests.pages import ROOT, Block, Command
from tests.report.runs import small_run
from thyme.cli import main
from thyme.verbs.table import VERBS

SERVERS = {"serve": "8000", "view": "8717", "data review": "8718"}
"""Verbs that go on until they are interrupted, which they are when the page ends, and the ports they listen on."""
PORTS = (*SERVERS.values(), "8080")
"""Ports that the pages name; a test takes free ones in their place."""
LOOP = (
    *("--rollout.max-tokens", "8", "--rollout.max-tokens-per-round", "8", "--rollout.group-size", "2"),
    *("--engine.num-blocks", "400", "--engine.max-context", "1600", "--engine.max-sequences", "8"),
    *("--sandbox.workers", "1", "--sandbox.memory-mib", "300"),
)
FEW = {
    stage: (f"--{stage}.epochs", "0", f"--{stage}.steps", "2", f"--{stage}.batch-size", "2")
    for stage in ("sft", "anneal", "rl")
}
SMALLER: dict[str, tuple[str, ...]] = {
    "sft": FEW["sft"],
    "anneal": FEW["anneal"],
    "rl": (*LOOP, *FEW["rl"], "--rl.save-steps", "1"),
    "resume": ("--rl.steps", "3"),
    "ablate": (*LOOP, *FEW["rl"], "--rl.steps", "1", "--eval.num-questions", "2", "--seeds", "0"),
    "rollout": LOOP,
    "profile rollout": (*LOOP, "--steps", "1"),
    "profile train": (*LOOP, *FEW["rl"], "--steps", "1"),
    "eval": (*LOOP, "--eval.num-questions", "3"),
    "ask": ("--max-tokens", "8"),
    "serve": LOOP,
    "data build": (*LOOP, "--build.samples", "2"),
}
"""Settings behind those of a page, so that what takes hours on its machine takes seconds here."""


class Reader:
    """Runs blocks of one page, in order. Use as a context manager; servers of the page end with it.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said = ""
        self._before, self._threads = Path.cwd(), torch.get_num_threads()
        self._servers: dict[int, tuple[subprocess.Popen[bytes], str, Path]] = {}
        self._ports: dict[str, int] = {}
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._env |= {"PYTHONPATH": self._path(), "BENCH_BUDGET_S": "0.01"}
        self._env |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        self._env.pop("TRITON_INTERPRET", None)  # the tests' own, and not a reader's

    def __enter__(self) -> Self:
        os.chdir(self.folder)
        (self.folder / "bin").mkdir()
        for name, words in {"thyme": "-m thyme", "pytest": "-m pytest", "python": ""}.items():
            script = self.folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            script.chmod(0o755)
        self._env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.chdir(self._before)
        torch.set_num_threads(self._threads)  # verbs of this process have set it
        for port in list(self._servers):
            self._end(port)

    def follow(self, block: Block) -> None:
        """Does what a block says; fails with the page, the line and what was said."""
        if block.saved_as:
            path = self.folder / block.saved_as
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n")
        if block.needs or block.language not in ("sh", "python"):
            return
        if block.language == "python" and block.saved_as is None:
            self._finished(block.where, [sys.executable, "-c", self._moved(block.text)])
        for command in block.commands() if block.language == "sh" else ():
            self._run(command)

    def _run(self, command: Command) -> None:
        text = self._moved(command.text)
        words = Command(command.where, text).words
        if words[0] == "thyme" and verb_of(words[1:]) in SERVERS and "--export" not in words:
            self._serve(command.where, text)
        elif text.startswith("thyme ") and command.is_plain and verb_of(words[1:]) != "bench":  # that is pytest's
            self._thyme(command.where, words[1:])
        elif text.startswith("export "):
            self._env |= dict(word.split("=", 1) for word in words[1:])
        else:
            if "--shapes" in words and not {"--contenders", "--without", "--"} & set(words):
                # Of benchmarks the one that would compile for a minute is left out.
                text = shlex.join([*words, "--without", "torch.compile"])
            self._finished(command.where, ["bash", "-euo", "pipefail", "-c", text])

    def _thyme(self, where: str, args: list[str]) -> None:
        """In this process, which has loaded torch already."""
        verb = verb_of(args)
        try:
            main([*args, *(() if "--score" in args else SMALLER.get(verb, ()))])
        except SystemExit as ended:
            assert not ended.code, f"{where}: thyme {' '.join(args)}: exit code {ended.code}"

    def _finished(self, where: str, command: list[str]) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=self._env, capture_output=True, text=True, check=False, timeout=400
        )
        assert done.returncode == 0, f"{where}: {command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def _serve(self, where: str, text: str) -> None:
        """Starts it in the place of the one that had its port, and waits until it answers."""
        words = Command(where, text).words[1:]
        verb = verb_of(words)
        named = words[words.index("--port") + 1] if "--port" in words else None
        port = int(named) if named else self._port(SERVERS[verb])
        self._end(port)
        words += [*([] if named else ["--port", str(port)]), *SMALLER.get(verb, ("--browser", "false"))]
        log = self.folder / f"{port}.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "thyme", *words], cwd=self.folder, env=self._env, stdout=said, stderr=said
            )
        self._servers[port] = process, where, log
        until = time.monotonic() + 120
        while not re.search(r"^serving|http://", log.read_text(), re.MULTILINE):
            assert process.poll() is None and time.monotonic() < until, f"{where}: {log.read_text()[-3000:]}"
            time.sleep(0.1)

    def _end(self, port: int) -> None:
        """A server that is interrupted ends by itself, and well."""
        if port not in self._servers:
            return
        process, where, log = self._servers.pop(port)
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        assert code == 0, f"{where}: ended with {code}: {log.read_text()[-3000:]}"

    def _moved(self, text: str) -> str:
        """Its ports are free ones."""
        return re.sub(rf"(?<=:|[ =])({'|'.join(PORTS)})\b", lambda found: str(self._port(found[0])), text)

    def _port(self, named: str) -> int:
        if named not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self._ports[named] = probe.getsockname()[1]
        return self._ports[named]

    @staticmethod
    def _path() -> str:
        return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def verb_of(args: list[str]) -> str:
    """The verb of a command line of thyme, "" where it has none."""
    return next((verb for verb in (" ".join(args[:2]), *args[:1]) if verb in VERBS), "")


def furnish(folder: Path, tokenizer: PreTrainedTokenizerFast, save_toy: Callable[[Path], Path]) -> None:
    """Puts into a folder what a reader of the pages has: the checkout, a model, the released sets, pictures, a run."""
    for name in ("bench", "csrc", "docs", "examples", "kernels", "tests", "thyme", "pyproject.toml", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("build", "benchmarks"):
        (folder / name).mkdir()
    tiny.write_hub_folder(folder / "Qwen2.5-VL-7B-Instruct", tokenizer)
    write_released_sets(folder)
    photo = Image.effect_noise((640, 480), 90).convert("RGB")
    photo.save(folder / "photo.jpg")
    photo.crop((0, 0, 252, 252)).save(folder / "sign.png")
    _write_lines(folder / "rows.jsonl", [thyme_sft(i) for i in range(3)])
    raw = {"image": "photo.jpg", "question": "What does the sign say?", "answer": "7", "box": [100, 75, 148, 124]}
    _write_lines(folder / "raw.jsonl", [raw])
    write_tsv(folder / "benchmarks" / "VStarBench.tsv", ROWS["VStarBench"])
    _write_lines(
        folder / "predictions.jsonl", [{"index": row["index"], "prediction": "A"} for row in ROWS["VStarBench"]]
    )
    run = small_run(folder / "runs" / "demo")
    small_run(folder / "runs" / "mine")
    for stage in ("sft", "rl"):
        save_toy(run / "checkpoints" / stage)


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
