"""One machine's part of a stage on several processes: starts its ranks, watches them, and stops them together.

    python -m alignbench.agent FOLDER START      (by `alignbench.launch` and `alignbench.nodes`, never by hand)

The ranks are started by torchrun's elastic agent or by DeepSpeed's launcher. Whoever started this process can kill it:
its ranks die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from alignbench.jsonio import atomic_write_json

#: Tells a process who started it.
PARENT = "ALIGNBENCH_PARENT"
_PASSED_ON = ("OMP_", "TORCH_", "GLOO_", "NCCL_", "DS_ACCELERATOR", "TOKENIZERS_", "HF_", "TRANSFORMERS_")
#: Seconds that hung ranks have to write down where they are.
LAST_WORDS = 3.0


@dataclass(frozen=True)
class Start:
    """How ranks are started on one machine.

    Attributes:
        processes: Ranks on this machine.
        nodes: Machines.
        node: This machine's number; rank 0 is on machine 0.
        endpoint: HOST:PORT of machine 0 where ranks meet; "" picks a free port (one machine).
        launcher: torchrun or deepspeed.
        hostfile: For DeepSpeed's launcher: lines `HOST slots=N`.
        hang_seconds: Ranks that make no progress for so long are stopped; 0 never.
    """

    processes: int
    nodes: int = 1
    node: int = 0
    endpoint: str = ""
    launcher: str = "torchrun"
    hostfile: str | None = None
    hang_seconds: float = 0.0

    def json(self) -> str:
        """As one argument of a command line."""
        return json.dumps(dataclasses.asdict(self))


def agent_file(folder: Path, node: int) -> Path:
    """Where an agent says how its ranks ended."""
    return folder / f"agent_{node}.json"


def hung_file(folder: Path, node: int) -> Path:
    """Where an agent says that its ranks hung."""
    return folder / f"hung_{node}.json"


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank counts its progress."""
    return folder / f"beat_{rank}"


def stack_file(folder: Path, rank: int) -> Path:
    """Where a hung rank writes the stacks of its threads."""
    return folder / f"stack_{rank}.txt"


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies: ranks of a killed run must not go on (Linux only).

    Args:
        parent: Its pid; if it has died before this call, the process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def environment(processes: int, threads: int = 0) -> dict[str, str]:
    """The environment of an agent: this process's, with `threads` per rank (0: this machine's cores shared out)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(part for part in (own, os.environ.get("PYTHONPATH", "")) if part)
    # torchrun's own log lines (rendezvous, restarts) are of no use to anybody here; failures are told by the caller
    return os.environ | {
        "OMP_NUM_THREADS": str(threads or max(1, cores // processes)),
        "PYTHONPATH": path,
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        PARENT: str(os.getpid()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Start the ranks of one job and wait for them; the exit status says whether all of them succeeded."""
    given, text = sys.argv[1:] if arguments is None else arguments
    folder, start = Path(given), Start(**json.loads(text))
    die_with_parent(int(os.environ[PARENT]))
    os.environ[PARENT] = str(os.getpid())
    # a batch system sends it to every process of a job; here only the run itself decides what it means
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if start.hang_seconds:
        threading.Thread(target=watch, args=(folder, start.node, start.hang_seconds), daemon=True).start()
    if start.launcher == "deepspeed":
        return _deepspeed(folder, start)
    exits = _torchrun(folder, start)
    atomic_write_json(agent_file(folder, start.node), {"exits": {str(rank): code for rank, code in exits.items()}})
    return int(bool(exits))


def _torchrun(folder: Path, start: Start) -> dict[int, int]:
    """Run the ranks under torchrun's elastic agent; returns the exit status of every rank that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what it would say of a failed rank the caller says in one message, with the rank's own words
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    several = start.nodes > 1
    config = LaunchConfig(
        min_nodes=start.nodes,
        max_nodes=start.nodes,
        nproc_per_node=start.processes,
        run_id="alignbench",
        # static: machine 0 has rank 0, which writes the artifact
        rdzv_backend="static" if several else "c10d",
        rdzv_endpoint=start.endpoint if several else "localhost:0",
        rdzv_configs={"rank": start.node} if several else {},
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGINT",
        shutdown_timeout=5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "alignbench.worker", str(folder))
    except ChildFailedError as error:
        return {rank: one.exitcode for rank, one in error.failures.items()}
    return {}


def _deepspeed(folder: Path, start: Start) -> int:
    """Run the ranks under DeepSpeed's launcher, which reaches other machines by ssh; returns its exit status."""
    # without a hostfile it must not find the one that it looks for by default
    where = ["--hostfile", start.hostfile or str(folder / "none")]
    if start.hostfile is None:
        where += ["--num_gpus", str(start.processes)]
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *where,
        *("--master_port", str(free_port()), "--no_local_rank", "--module", "alignbench.worker", str(folder)),
    ]
    # on machines that it reaches by ssh the launcher sets what this file lists, and little else
    listed = folder / "environment"
    lines = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(_PASSED_ON)]
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = os.environ | {"DS_ENV_FILE": str(listed)}
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL, env=given).returncode


def free_port() -> int:
    """A port that nothing on this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------- ranks that hang


class Beats:
    """A rank's side: counts its progress where the agent can see it, and answers where it is when asked."""

    def __init__(self, folder: Path, rank: int) -> None:
        import faulthandler

        self._count = 0
        self._stream = beat_file(folder, rank).open("wb", buffering=0)
        # written from the signal handler itself: also of a process stuck in a call that never returns
        self._stacks = stack_file(folder, rank).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self()

    def __call__(self) -> None:
        """One step further."""
        self._count += 1
        os.pwrite(self._stream.fileno(), f"{os.getpid():>12}{self._count:>16}".encode(), 0)


def _beats(folder: Path) -> dict[int, tuple[int, int]]:
    """By rank of this machine: pid and progress."""
    found = {}
    for path in folder.glob("beat_*"):
        words = path.read_bytes().split()
        if len(words) == 2 and _is_here(int(words[0]), folder):
            found[int(path.name.removeprefix("beat_"))] = (int(words[0]), int(words[1]))
    return found


def _is_here(pid: int, folder: Path) -> bool:
    """Whether that process is a rank of this job: on a shared folder other machines' ranks count, too."""
    try:
        return str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def watch(folder: Path, node: int, seconds: float) -> None:
    """Wait until the ranks of this machine make no progress for so long; then have them say where they are, and kill.

    A rank that hangs stops all others at their next collective, so nothing moves any more; the rank that is behind is
    the one to look at. The count of a living rank that is in a long piece of work stands still, too: choose `seconds`
    above the longest one (loading a model, writing a checkpoint).
    """
    last, since = _beats(folder), time.monotonic()
    while True:
        time.sleep(min(1.0, seconds / 10))
        now = _beats(folder)
        if now != last or not now:
            last, since = now, time.monotonic()
        if time.monotonic() - since < seconds:
            continue
        for pid, _ in now.values():
            _signal(pid, signal.SIGUSR1)
        time.sleep(LAST_WORDS)
        told = {
            str(rank): {"progress": count, "stack": stack_file(folder, rank).read_text(encoding="utf-8")}
            for rank, (_, count) in now.items()
        }
        atomic_write_json(hung_file(folder, node), {"seconds": seconds, "ranks": told})
        for pid, _ in now.values():
            _signal(pid, signal.SIGKILL)
        return


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
