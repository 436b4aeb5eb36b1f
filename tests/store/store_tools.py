"""What the store tests share: a stage, its identities, and worker processes that can be killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignbench.jsonio import write_json, write_jsonl
from alignbench.store import Identity, Workspace

WORKER = Path(__file__).with_name("store_worker.py")
SLOW = Identity("sample", 1, "responses", {"n": 3}, {}, 0)
MANY = Identity("many", 1, "responses", {}, {}, 0)
IDENTITY = Identity("score", 2, "scores", {"beta": 0.5, "name": "gold"}, {"responses": "a" * 32}, 7)
PATIENCE_S = 60.0  # only a bound for a test that hangs; nothing is asserted about time


def produce(space: Workspace) -> None:
    (space.out / "model").mkdir()
    write_json(space.out / "model" / "config.json", {"layers": 2})
    write_jsonl(space.out / "rows.jsonl", [{"score": 0.25}, {"score": -1.5}])
    space.cost["scored_tokens"] = 12


class Process:
    """A worker with its output in files, so that it can be read while it runs."""

    def __init__(self, mode: str, root: Path, log: Path) -> None:
        self.log = log
        environment = os.environ | {"PYTHONPATH": str(WORKER.parents[2])}
        with open(log, "w") as stream:
            self.popen = subprocess.Popen(
                [sys.executable, str(WORKER), mode, str(root)], stdout=stream, stderr=stream, env=environment
            )
        self.pid = self.popen.pid

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, *words: str) -> None:
        wait_until(lambda: any(w in self.text for w in words) or self.popen.poll() is not None, self)
        assert any(w in self.text for w in words), self.text

    def finish(self) -> str:
        self.popen.wait(PATIENCE_S)
        return self.text

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE_S)


def wait_until(true: Callable[[], bool], what: Any = None) -> None:
    begun = time.monotonic()
    while not true():
        if time.monotonic() - begun > PATIENCE_S:
            pytest.fail(f"nothing happened: {getattr(what, 'text', what)}")
        time.sleep(0.02)


def strict(value: Any) -> str:
    """A text that also tells 1 from 1.0 from True."""
    if isinstance(value, dict):
        return repr(sorted((name, strict(v)) for name, v in value.items()))
    return repr([strict(v) for v in value]) if isinstance(value, list) else repr(value)
