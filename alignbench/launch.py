"""Running one stage on several processes.

The caller is never a rank: it freezes the job, has torchrun's agent (this module's `main`, in a process of its own)
start the ranks, passes their metrics on, and tells what the first failing rank said.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignbench import errors
from alignbench.config import HardwareConfig
from alignbench.errors import AlignbenchError, ConfigError, RankError
from alignbench.jsonio import atomic_write_json, read_json
from alignbench.stages.stage import Context, Stage

log = logging.getLogger(__name__)

JOB, METRICS, COST, AGENT = "job.pickle", "metrics.jsonl", "cost.json", "agent.json"
#: Tells a process who started it.
PARENT = "ALIGNBENCH_PARENT"
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
    """Run a stage on `hardware.processes` ranks of this machine.

    Args:
        stage: A stage that divides its work (`stage.parallel`).
        context: What it would get in place; `out` and `cost` are filled as if it had run there.

    Raises:
        AlignbenchError: of the type that the first failing rank raised; RankError if it was another one, or if a rank
            died without a word.
    """
    processes = context.runtime.hardware.processes
    check_devices(context.runtime.hardware)
    folder = context.work / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    frozen = replace(context, on_metrics=_nowhere, cost={}, out=context.out.absolute(), work=context.work.absolute())
    (folder / JOB).write_bytes(pickle.dumps((stage.name, frozen)))
    command = [sys.executable, "-m", "alignbench.launch", str(folder.absolute()), str(processes)]
    log.info("%s on %d processes; logs: %s", stage.name, processes, folder)
    seen = 0
    with _started(command, _environment(context, processes)) as process:
        while process.poll() is None:
            time.sleep(POLL)
            seen = _pass_on(folder, seen, context)
    _pass_on(folder, seen, context)
    if process.returncode or not (folder / COST).exists():
        raise _failure(stage, folder, process.returncode)
    context.cost.update(read_json(folder / COST))


def check_devices(hardware: HardwareConfig) -> None:
    """Refuse more processes than there are GPUs; a CPU takes any number."""
    import torch

    if hardware.device == "cuda" and torch.cuda.device_count() < hardware.processes:
        raise ConfigError(
            f"{hardware.processes} processes want a GPU each, and torch sees {torch.cuda.device_count()}",
            where="hardware.processes",
            mend="hardware.processes as many as GPUs (see nvidia-smi, CUDA_VISIBLE_DEVICES), or hardware=cpu_2",
        )


def _nowhere(step: int, metrics: Any) -> None:
    """Metrics of a frozen job: a rank replaces it."""


def _environment(context: Context, processes: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = context.runtime.hardware.threads or max(1, cores // processes)
    own = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (own, os.environ.get("PYTHONPATH", "")) if part)
    # torchrun's own log lines (rendezvous, restarts) are of no use to anybody here; failures are told below
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": path,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        PARENT: str(os.getpid()),
    }


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
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies: ranks of a killed run must not go on (Linux only).

    Args:
        parent: Its pid; if it has died before this call, the process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


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
    exits = read_json(folder / AGENT)["exits"] if (folder / AGENT).exists() else {}
    killed = [k for k, code in exits.items() if code < 0 and code != -signal.SIGTERM]
    said = [read_json(path) for path in folder.glob("failed_*.json")]
    if killed or not said:  # a killed rank has no words; what others say is that it is gone
        who = f"rank {', '.join(killed)} was killed" if killed else "the ranks' launcher died"
        codes = ", ".join(f"rank {k}: {_spelled(code)}" for k, code in exits.items()) or f"exit status {status}"
        return RankError(
            f"{stage.name}: {who} ({codes})",
            where=f"logs: {folder}",
            mend="look for the out-of-memory killer (dmesg) or a batch system's limit, then run the same command "
            "again: the stage goes on from its last checkpoint",
        )
    first = min(said, key=lambda one: one["time"])
    kind = getattr(errors, first["type"], None)
    where = f"rank {first['rank']}, log: {log_file(folder, first['rank'])}"
    if isinstance(kind, type) and issubclass(kind, AlignbenchError):
        return kind(first["what"], where="; ".join(filter(None, (first["where"], where))), mend=first["mend"])
    place = [line.strip() for line in first["traceback"].splitlines() if line.startswith("  File")]
    return RankError(f"{first['type']}: {first['what']}", where="; ".join((*place[-1:], where)), mend=first["mend"])


def _spelled(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def main(arguments: list[str] | None = None) -> int:
    """Torchrun's agent for the ranks of one job: it finds a free port, starts them, and stops all if one fails."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what it would say of a failed rank the caller says in one message, with the rank's own words
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    folder, processes = sys.argv[1:] if arguments is None else arguments
    die_with_parent(int(os.environ[PARENT]))
    os.environ[PARENT] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(processes), run_id=Path(folder).parent.name,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "alignbench.worker", folder)
    except ChildFailedError as error:
        atomic_write_json(
            Path(folder) / AGENT, {"exits": {str(rank): one.exitcode for rank, one in error.failures.items()}}
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
