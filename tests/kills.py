"""kill -9 at random moments of a small real sweep: what tests/test_kills.py does a few times and bench_kills.py often.

A trial starts a multirun on an empty store, kills one of its processes at a moment drawn uniformly from the time that
the undisturbed multirun took, waits until none of its processes is left, repeats the command until it succeeds, and
compares everything that the runs leave with the undisturbed multirun's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from tiny_runs import TINY, TOP, environment, science

from alignbench.inventory import leftovers
from alignbench.jsonio import read_json
from alignbench.store import Store

#: Every descendant of a trial's command inherits it, whatever its command line says.
MARK = "KILL_TRIAL"
#: Only a bound for what hangs.
PATIENCE_S = 900.0
#: What a trial does not compare, and why; the rest of a record is compared to the last digit.
LEFT_OUT = {
    "created, commit": "the moment of the run; somebody may commit meanwhile",
    "config.tracking": "a mirror that changes no number",
    "cost.seconds_now, cost.total.seconds, stages[].cost.seconds": "wall time",
    "cost.peak, stages[].cost.peak_rss_bytes": "memory of the process that happened to do the work",
    "cost.stages_built_now, stages[].built": "who built what: the killed command built some of it",
}


@dataclass(frozen=True)
class Sweep:
    """A multirun: its name in reports, its overrides, and whom its trials kill in turn."""

    name: str
    overrides: tuple[str, ...]
    victims: tuple[str, ...] = ("main process",)

    def command(self, folder: Path) -> list[str]:
        """What a user types, with everything it writes below `folder`."""
        places = (f"output_dir={folder}/out", f"store_dir={folder}/store")
        return [sys.executable, str(TOP / "main.py"), "-m", *TINY, *self.overrides, *places]


_LONG = ("model.sft.epochs=20", "hardware.checkpoint_every=3")
#: Two methods that share the reference and the pairs; most of the time after the imports goes into training. A choice
#: of one: Hydra would apply a plain override before it has chosen the method, and the default method has no such key.
ONE_PROCESS = Sweep(
    "one process",
    (
        *_LONG,
        "method=dpo_helpful,dpo_safe",
        "method.step.train.epochs=choice(30)",
        "method.step.train.batch_size=choice(8)",
    ),
)
#: Two runs that share three stages on two ranks each: a start-up of some seconds for every one of them.
TWO_RANKS = Sweep(
    "two ranks",
    (*_LONG, "hardware=cpu_2", "method=sft,dpo_helpful", "evaluate.samples_per_prompt=1"),
    ("rank 0", "main process", "rank 1"),
)


@dataclass
class Trial:
    """One kill, and what came of it.

    Attributes:
        moment: Seconds after the start (a rank that was not yet alive was killed somewhat later).
        victim: "main process" or "rank K".
        stages: Stages that were being computed then.
        checkpoint: Whether one of them had a whole checkpoint.
        gone_after: Seconds until the last process of the command had ended.
        orphans: Command lines of those that did not end.
        status: Exit status of the last command.
        repeats: How often the command was given again before it succeeded.
        resumed: Steps at which a repeated stage went on.
        leftovers: Folders of unfinished builds that stay in the store after the end.
        differences: Where the result differs from the undisturbed one, in words.
    """

    moment: float
    victim: str
    stages: list[str] = field(default_factory=list)
    checkpoint: bool = False
    gone_after: float = 0.0
    orphans: list[str] = field(default_factory=list)
    status: int = 0
    repeats: int = 0
    resumed: list[int] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing is left running and nothing differs."""
        return not self.orphans and not self.differences


class Running:
    """A sweep's command with its output in `folder/output-N`."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        self.mark = secrets.token_hex(8)
        with self.output.open("wb") as stream:
            self.popen = subprocess.Popen(
                sweep.command(folder), stdout=stream, stderr=stream, cwd=folder, env=environment(**{MARK: self.mark})
            )

    def processes(self) -> list[psutil.Process]:
        """Every living process that descends from the command."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[str, psutil.Process]:
        """The living ranks by name."""
        found = {}
        for process in self.processes():
            try:
                if "alignbench.worker" in process.cmdline():
                    found[f"rank {process.environ()['RANK']}"] = process
            except (psutil.Error, KeyError):
                continue
        return found

    def gone(self, patience: float = 60.0) -> tuple[float, list[str]]:
        """Wait until no process is left: seconds it took, and command lines of those that stayed."""
        begun = time.monotonic()
        while (left := self.processes()) and time.monotonic() - begun < patience:
            time.sleep(0.1)
        return time.monotonic() - begun, [" ".join(_line(process)) for process in left]

    def stop(self) -> None:
        """End whatever is left of it."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                continue
        self.popen.wait()


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return [str(process.pid)]


def undisturbed(sweep: Sweep, folder: Path) -> tuple[float, dict[str, Any]]:
    """Run a sweep in peace: its seconds, and its fingerprint."""
    begun = time.monotonic()
    running = Running(sweep, folder)
    try:
        status = running.popen.wait(PATIENCE_S)
    finally:
        running.stop()
    if status:
        raise RuntimeError(running.output.read_text(errors="replace"))
    return time.monotonic() - begun, fingerprint(folder)


def disturbed(sweep: Sweep, folder: Path, moment: float, victim: str, expected: Mapping[str, Any]) -> Trial | None:
    """One trial; None if the command had ended before its moment came.

    Where a rank is to die and none lives at that moment, the next one does, some random seconds after its start.
    """
    trial, store = Trial(round(moment, 2), victim), folder / "store"
    running = Running(sweep, folder)
    try:
        try:
            running.popen.wait(moment)
        except subprocess.TimeoutExpired:
            pass
        else:
            return None
        target = psutil.Process(running.popen.pid) if victim == "main process" else running.ranks().get(victim)
        late = random.Random(moment).uniform(0.0, 12.0)
        while target is None:
            if running.popen.poll() is not None:
                return None
            time.sleep(0.1)
            target = running.ranks().get(victim)
            if target is not None:
                time.sleep(late)
                target = running.ranks().get(victim)
        trial.stages, trial.checkpoint = _in_work(store)
        with contextlib.suppress(psutil.NoSuchProcess):
            target.kill()
        # a killed rank fails its run; the command goes on with the others and ends by itself
        trial.status = running.popen.wait(PATIENCE_S)
        trial.gone_after, trial.orphans = running.gone()
    finally:
        running.stop()
    while trial.status and trial.repeats < 3:
        again, trial.repeats = Running(sweep, folder), trial.repeats + 1
        try:
            trial.status = again.popen.wait(PATIENCE_S)
            trial.orphans += again.gone()[1]
        finally:
            again.stop()
        trial.resumed += [int(step) for step in re.findall(r"continuing at step (\d+) of", _text(again.output))]
    trial.leftovers = [str(path.relative_to(store)) for path in leftovers(Store(store))]
    if trial.status:
        trial.differences = [f"the repeated command fails: {_text(folder / 'output-3')[-2000:]}"]
    else:
        trial.differences = list(differences(expected, fingerprint(folder)))
    return trial


def _text(path: Path) -> str:
    return path.read_text(errors="replace")


def _in_work(store: Path) -> tuple[list[str], bool]:
    """Stages that are being computed, and whether one has a whole checkpoint."""
    stages = []
    for path in store.glob("locks/*.json"):
        try:
            stages.append(str(json.loads(path.read_text())["stage"]))
        except (OSError, ValueError, KeyError):
            continue
    return sorted(stages), any(store.glob("building/*/work/checkpoints/COMPLETE.json"))


def fingerprint(folder: Path) -> dict[str, Any]:
    """Everything that a sweep leaves and that must not depend on how often it was killed.

    By run: its record without what `LEFT_OUT` names, the sha256 of table and generations, and the sha256 of each
    artifact's safetensors, computed from the files; of the multirun, the sha256 of its table.
    """
    store, found = Store(folder / "store"), dict[str, Any]()
    for path in sorted((folder / "out").glob("*/record.json")):
        record = read_json(path)
        weights = {}
        for stage in record["stages"]:
            artifact = store.find(stage["key"])
            if artifact is None or store.faults(stage["key"]):
                weights[stage["label"]] = f"artifact {stage['key']} is not whole"
                continue
            for name in artifact.manifest["files"]:
                if name.endswith(".safetensors"):
                    weights[f"{stage['label']}: {name}"] = _sha256(artifact.folder / name)
        found[path.parent.name] = {
            "record": science(record),
            "files": {name: _sha256(path.with_name(name)) for name in ("table.md", "generations.jsonl")},
            "safetensors": weights,
        }
    found["sweeps"] = [  # its name knows the folder
        {"complete": read_json(path)["complete"], "failed": read_json(path)["failed"]}
        | {"table": _sha256(path.with_name("requested_achieved.md"))}
        for path in (folder / "out").glob("*/sweep.json")
    ]
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(value: Any) -> int:
    """How many single values are compared."""
    if isinstance(value, Mapping):
        return sum(map(numbers, value.values()))
    return sum(map(numbers, value)) if isinstance(value, list) else 1


def differences(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    """Every single value that is not exactly the expected one, with its place."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for name in sorted(expected.keys() | found.keys()):
            inner = f"{place}.{name}" if place else str(name)
            if name in expected and name in found:
                yield from differences(expected[name], found[name], inner)
            else:
                yield f"{inner}: only in the {'undisturbed' if name in expected else 'disturbed'} result"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif expected != found:
        yield f"{place}: {expected!r} became {found!r}"


def trials(sweep: Sweep, folder: Path, count: int, seed: int) -> Iterator[tuple[dict[str, Any], Trial]]:
    """`count` trials of a sweep, each with facts of the undisturbed run; a moment that came too late is drawn again."""
    choose = random.Random(f"{seed} {sweep.name}")
    seconds, expected = undisturbed(sweep, folder / "undisturbed")
    facts = {"seconds": round(seconds, 1), "values_compared": numbers(expected), "moments_too_late": 0}
    done = 0
    while done < count:
        place, victim = folder / f"trial-{done}", sweep.victims[done % len(sweep.victims)]
        trial = disturbed(sweep, place, choose.uniform(0.0, seconds), victim, expected)
        if trial is None:
            facts["moments_too_late"] += 1
        else:
            done += 1
            yield facts, trial
        if trial is None or trial.good:  # a bad one is kept for inspection
            shutil.rmtree(place)
