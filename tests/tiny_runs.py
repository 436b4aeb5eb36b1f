"""Tiny real runs, and one that the tests of a session share: `from tiny_runs import ...`.

A test that only reads takes `shared_tiny`; one that runs more on its store takes a copy (`Run.copied`), so that what
is in the shared store stays known.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest

from alignbench import cli
from alignbench.config import resolve
from alignbench.jsonio import read_json
from alignbench.lab import Node
from alignbench.methods import Outcome
from alignbench.plan import PlanLab
from alignbench.run import _recipe, execute
from alignbench.store import Artifact, Store
from alignbench.tracking import Tracker

TOP = Path(__file__).resolve().parents[1]
# one thread: the same bits in this process and in others, whatever the machine has
TINY = ("debug=tiny", "hardware.threads=1", "constraint.thresholds=[0.1]", "constraint.beta=0.5")
# SACPO with a stated multiplier: then only the evaluations know the thresholds, and no bank is sampled
STATED = "method.beta_over_lambda=[0.5]"
# like `debug=tiny`, for runs on files
TINY_EVALUATION = (
    "hardware.threads=1",
    "tracking=disabled",
    "tuned_by=null",
    "evaluate=unscored",
    "evaluate.samples_per_prompt=2",
    "evaluate.resamples=200",
    "evaluate.sampling.max_new_tokens=16",
)
PATIENCE_S = 120.0  # only a bound for a test that hangs; nothing is asserted about time


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        record: Its record.
        folder: Its folder, with table, picture, generations.
        store: Root of the store it used.
    """

    record: dict[str, Any]
    folder: Path
    store: Path

    def artifact(self, label: str) -> Artifact:
        """The artifact of the stage that the record calls `label`."""
        found = Store(self.store).find(self.key(label))
        assert found is not None
        return found

    def key(self, label: str) -> str:
        (key,) = [stage["key"] for stage in self.record["stages"] if stage["label"] == label]
        return str(key)

    @property
    def labels(self) -> list[str]:
        return [stage["label"] for stage in self.record["stages"]]

    @property
    def built(self) -> list[str]:
        """Labels of the stages that this run itself built."""
        return [stage["label"] for stage in self.record["stages"] if stage["built"]]

    def copied(self, root: Path, *, without: Sequence[str] = ()) -> Path:
        """A copy of the store, to run more on; stages with the labels `without` are to be made again."""
        shutil.copytree(self.store, root)
        for label in without:
            shutil.rmtree(root / self.artifact(label).folder.relative_to(self.store))
        return root

    def weights(self, label: str) -> bytes:
        """The safetensors of a policy."""
        return self.artifact(label).path("policy/model.safetensors").read_bytes()


def compose(*overrides: str) -> Any:
    """The configuration that `python main.py OVERRIDES` would run."""
    cli.register()
    with hydra.initialize_config_dir(str(TOP / "conf"), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def run(store: Path, out: Path, *overrides: str, base: tuple[str, ...] = TINY) -> Run:
    """Run in this process."""
    before = set(out.glob("*/record.json"))
    execute(compose(*base, f"store_dir={store}", f"output_dir={out}", *overrides))
    (path,) = set(out.glob("*/record.json")) - before
    return Run(read_json(path), path.parent, store)


def plan(
    store: Path, *overrides: str, base: tuple[str, ...] = TINY
) -> tuple[PlanLab, Outcome, dict[str, Node], dict[str, Node]]:
    """The recipe and its evaluations under a lab that runs nothing.

    Returns:
        The lab, the outcome, the evaluations by row, and the nodes by label.
    """
    config, settings = resolve(compose(*base, f"store_dir={store}", *overrides))
    tracker = Tracker(config.tracking, run_id="x", group="x", job_type="x", config={}, folder=store.with_name("none"))
    lab = PlanLab(config, Store(store), tracker)
    outcome, evaluations, _ = _recipe(lab, config, settings)
    labels = [node.label for node in lab.nodes.values()]
    assert len(labels) == len(set(labels)), "two stages of one run share a label"
    return lab, outcome, evaluations, {node.label: node for node in lab.nodes.values()}


def command(store: Path, out: Path, *overrides: str, base: tuple[str, ...] = TINY) -> list[str]:
    """The command line of a run in a process of its own."""
    return [sys.executable, str(TOP / "main.py"), *base, f"store_dir={store}", f"output_dir={out}", *overrides]


def environment(**extra: str) -> dict[str, str]:
    """The environment of such a process: nothing of W&B's comes from outside."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ALIGNBENCH_"))}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | extra


class Process:
    """A run in a process of its own, with its output in a file."""

    def __init__(self, argv: list[str], log: Path, **extra: str) -> None:
        self.log = log
        with open(log, "w") as stream:
            self.popen = subprocess.Popen(argv, stdout=stream, stderr=stream, cwd=TOP, env=environment(**extra))

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self) -> str:
        """Wait for its good end."""
        code = self.popen.wait(PATIENCE_S)
        assert code == 0, self.output
        return self.output

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """kill -9 at the first moment that `condition` holds; it must come before the end."""
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.popen.poll() is None, f"ended before it could be killed:\n{self.output}"
            assert time.monotonic() < until, self.output
            time.sleep(0.002)
        self.popen.send_signal(signal.SIGKILL)
        assert self.popen.wait(PATIENCE_S) == -signal.SIGKILL


@contextlib.contextmanager
def started(argv: list[str], log: Path, **extra: str) -> Iterator[Process]:
    """A `Process` that is not left behind if the test fails."""
    process = Process(argv, log, **extra)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


def only_record(out: Path) -> dict[str, Any]:
    """The one record below a folder."""
    (path,) = out.glob("*/record.json")
    return dict(read_json(path))


def science(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what may differ between two runs of one configuration: times, memory, who built what.

    The commit as well: somebody may commit while the tests run.
    """
    kept = json.loads(json.dumps(record))
    kept.pop("created")
    kept.pop("commit")
    kept["config"].pop("tracking")  # a mirror
    for name in ("stages_built_now", "seconds_now", "peak"):
        kept["cost"].pop(name, None)
    kept["cost"]["total"].pop("seconds")
    for stage in kept["stages"]:
        stage.pop("built")
        for name in ("seconds", "peak_rss_bytes"):
            stage["cost"].pop(name, None)
    return dict(kept)


_SHARED: list[Run] = []


def shared_tiny(factory: pytest.TempPathFactory) -> Run:
    """SACPO with a stated multiplier on the tiny world, run once in a session. Read only."""
    if not _SHARED:
        folder = factory.mktemp("tiny")
        _SHARED.append(run(folder / "store", folder / "out", STATED))
    return _SHARED[0]
