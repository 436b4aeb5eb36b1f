"""Running one stage on several processes, of this machine or of several.

The caller is never a rank: it freezes the job, has an agent (`alignbench.agent`, a process of its own) start the ranks,
passes their metrics on, has them save when it is asked to stop, and tells what the first failing rank said.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench import errors, nodes
from alignbench.agent import Start, environment
from alignbench.errors import AlignbenchError, ConfigError, RankError
from alignbench.hardware import HardwareConfig
from alignbench.jsonio import read_json
from alignbench.nodes import JOB
from alignbench.stages.stage import Context, Stage
from alignbench.stopping import SIGNALS

log = logging.getLogger(__name__)

METRICS, COST, ORDER, LISTENING = "metrics.jsonl", "cost.json", "save", "listening"
#: Seconds between two looks at the metrics of running ranks.
POLL = 0.2
#: Seconds that ranks have to stop after being asked to.
PATIENCE = 20.0


def log_file(folder: Path, rank: int) -> Path:
    """A rank's log."""
    return folder / f"rank_{rank}.log"


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank says why it failed."""
    return folder / f"failed_{rank}.json"


def run_on_ranks(stage: Stage, context: Context) -> None:
    """Run a stage on `hardware.processes` ranks.

    Args:
        stage: A stage that divides its work (`stage.parallel`).
        context: What it would get in place; `out` and `cost` are filled as if it had run there.

    Raises:
        AlignbenchError: of the type that the first failing rank raised; RankError if it was another one, or if a rank
            died without a word.
    """
    hardware = context.runtime.hardware
    check_devices(hardware)
    folder = (context.work / "ranks").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    frozen = replace(
        context,
        on_metrics=_nowhere,
        requests=SIGNALS,
        cost={},
        out=context.out.absolute(),
        work=context.work.absolute(),
    )
    (folder / JOB).write_bytes(pickle.dumps((stage.name, frozen)))
    log.info("%s on %d processes; logs: %s", stage.name, hardware.processes, folder)
    start = Start(
        processes=hardware.processes // (hardware.nodes if hardware.launcher == "torchrun" else 1),
        nodes=hardware.nodes if hardware.launcher == "torchrun" else 1,
        launcher=hardware.launcher,
        hostfile=hardware.hostfile and str(Path(hardware.hostfile).absolute()),
        hang_seconds=60 * hardware.hang_minutes,
    )
    with _machines(hardware, folder, start) as start:
        status = _watched(folder, start, context)
    if status or not (folder / COST).exists():
        raise _failure(stage, folder, status)
    context.cost.update(read_json(folder / COST))


@contextlib.contextmanager
def _machines(hardware: HardwareConfig, folder: Path, start: Start) -> Iterator[Start]:
    """The other machines' helpers, invited and at the end heard, where there are any."""
    if start.nodes == 1:
        yield start
        return
    head = nodes.head_for(hardware)
    # building/<key>/work/ranks: the store is what machines have in common, if anything
    start = head.invite(folder, folder.parents[3], start)
    try:
        yield start
    except BaseException:
        head.stop()
        raise
    head.collect(folder, start.nodes)


def _watched(folder: Path, start: Start, context: Context) -> int:
    """Run this machine's agent to its end, passing metrics on and requests to save down; returns its status."""
    command = [sys.executable, "-m", "alignbench.agent", str(folder), start.json()]
    threads = context.runtime.hardware.threads
    seen = 0
    with context.requests.heard(), _started(command, environment(start.processes, threads)) as process:
        while process.poll() is None:
            time.sleep(POLL)
            seen = _pass_on(folder, seen, context)
            if context.requests.pending():
                _have_saved(folder, process)
                context.requests.done()
    _pass_on(folder, seen, context)
    return int(process.returncode)


def _have_saved(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Have ranks that train write a checkpoint, and wait for it; others have nothing that could be saved."""
    if not (folder / LISTENING).exists():
        return
    (folder / ORDER).touch()
    while (folder / ORDER).exists() and (folder / LISTENING).exists() and process.poll() is None:
        time.sleep(POLL)


def check_devices(hardware: HardwareConfig) -> None:
    """Refuse more processes than there are GPUs; a CPU takes any number."""
    import torch

    here = hardware.processes // hardware.nodes
    if hardware.device == "cuda" and torch.cuda.device_count() < here:
        raise ConfigError(
            f"{here} processes of this machine want a GPU each, and torch sees {torch.cuda.device_count()}",
            where="hardware.processes",
            mend="hardware.processes as many as GPUs (see nvidia-smi, CUDA_VISIBLE_DEVICES), or hardware=cpu_2",
        )


def _nowhere(step: int, metrics: Any) -> None:
    """Metrics of a frozen job: a rank replaces it."""


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher in a session of its own, stopped with all its ranks if the body is left in any other way."""
    # without a preexec_fn, which would fork this process as it is: one that holds much memory could not
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _pass_on(folder: Path, seen: int, context: Context) -> int:
    """Hand over the metrics that rank 0 has written since `seen` bytes."""
    path = folder / METRICS
    if not path.exists():
        return seen
    with path.open("rb") as stream:
        stream.seek(seen)
        for line in stream:
            if not line.endswith(b"\n"):
                break  # being written
            step, metrics = json.loads(line)
            context.on_metrics(step, metrics)
            seen += len(line)
    return seen


def _failure(stage: Stage, folder: Path, status: int) -> AlignbenchError:
    """What the first failing rank said, as an error of its own type where it is one of ours."""
    hung = [read_json(path) for path in folder.glob("hung_*.json")]
    if hung:
        return _hung(stage, folder, hung)
    exits = {rank: code for path in folder.glob("agent_*.json") for rank, code in read_json(path)["exits"].items()}
    killed = [k for k, code in exits.items() if code < 0 and code != -signal.SIGTERM]
    said = [read_json(path) for path in folder.glob("failed_*.json")]
    # a killed rank has no words, and under DeepSpeed's launcher no exit status; what others say is that it is gone
    if killed or all(one["echo"] for one in said):
        who = f"rank {', '.join(killed)} was killed" if killed else "a rank or the ranks' launcher died without a word"
        if shutil.disk_usage(folder).free < 1 << 20:  # no room for its words
            who = f"a rank failed, and there is no space left on device for what it said; {who}"
        codes = ", ".join(f"rank {k}: {_spelled(code)}" for k, code in exits.items()) or f"exit status {status}"
        return RankError(
            f"{stage.name}: {who} ({codes})",
            where=f"logs: {folder}",
            mend="look for the out-of-memory killer (dmesg) or a batch system's limit, then run the same command "
            "again: the stage goes on from its last checkpoint",
        )
    first = min(said, key=lambda one: (one["echo"], one["time"]))
    kind = getattr(errors, first["type"], None)
    where = f"rank {first['rank']}, log: {log_file(folder, first['rank'])}"
    if isinstance(kind, type) and issubclass(kind, AlignbenchError):
        return kind(first["what"], where="; ".join(filter(None, (first["where"], where))), mend=first["mend"])
    place = [line.strip() for line in first["traceback"].splitlines() if line.startswith("  File")]
    return RankError(f"{first['type']}: {first['what']}", where="; ".join((*place[-1:], where)), mend=first["mend"])


def _hung(stage: Stage, folder: Path, machines: Sequence[Mapping[str, Any]]) -> RankError:
    """Where every rank was when none moved any more; the one that is behind is the one to look at."""
    ranks = {rank: one for machine in machines for rank, one in machine["ranks"].items()}
    furthest = max(one["progress"] for one in ranks.values())
    behind = [rank for rank, one in sorted(ranks.items()) if one["progress"] < furthest or not one["stack"]]
    lines = []
    for rank, one in sorted(ranks.items()):
        # faulthandler writes the main thread last, its innermost call first
        calls = [line.strip() for line in one["stack"].rpartition("most recent call first")[2].splitlines()[1:4]]
        lines.append(f"    rank {rank}: " + ("; ".join(calls) or "did not answer (stopped, or stuck in the kernel)"))
    return RankError(
        "\n".join(
            (
                f"{stage.name}: no rank made progress for {machines[0]['seconds']:.0f} s, so they were stopped; "
                + (f"rank {', '.join(behind)} is behind the others" if behind else "all are equally far"),
                *lines,
            )
        ),
        where=f"whole stacks: {folder}/stack_*.txt",
        mend="look at the rank that is behind; where the work itself takes so long, raise hardware.hang_minutes; the "
        "same command goes on from the last checkpoint",
    )


def _spelled(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
