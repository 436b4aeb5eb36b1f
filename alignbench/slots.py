"""GPUs or cores of one machine, given to the runs that share it: each gets some of its own, or waits.

Every GPU (or core) is a lock file in a folder of this machine; the kernel frees a lock when its holder dies. A run that
needs several takes them one by one while it alone holds the gate, so two runs can never wait for each other's, and a
large run is not starved by small ones that came later.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from alignbench.config import HardwareConfig
from alignbench.errors import ConfigError

log = logging.getLogger(__name__)
POLL = 0.2
REMIND = 30.0


def folder() -> Path:
    """Where this user's slots of this machine are; ALIGNBENCH_SLOTS names another place."""
    given = os.environ.get("ALIGNBENCH_SLOTS")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"alignbench-slots-{os.getuid()}"


def units(hardware: HardwareConfig) -> list[str]:
    """Names of the GPUs or cores that this process may use."""
    if hardware.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            return [name.strip() for name in visible.split(",") if name.strip()]
        # not torch.cuda.device_count(): it would fix the devices before this run has its own
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [str(core) for core in sorted(os.sched_getaffinity(0))]


def wanted(hardware: HardwareConfig, there: int) -> int:
    """How many of them a run needs: one GPU, or `threads` cores (0: all), for each process."""
    if hardware.device == "cuda":
        return hardware.processes
    return hardware.processes * hardware.threads if hardware.threads else there


@contextmanager
def taken(hardware: HardwareConfig, label: str) -> Iterator[list[str]]:
    """Hold as many GPUs or cores as the run needs; this process and its children use no others meanwhile.

    Args:
        hardware: Device, processes and threads.
        label: The run's name, for others who wait.

    Yields:
        Names of the GPUs or cores.

    Raises:
        ConfigError: the machine has fewer than the run needs.
    """
    kind = "GPU" if hardware.device == "cuda" else "core"
    there = units(hardware)
    count = wanted(hardware, len(there))
    if count > len(there):
        raise ConfigError(
            f"the run needs {count} {kind}s, this machine has {len(there)} for it",
            where="hardware.processes, hardware.threads",
            mend="fewer processes or threads, or hardware.share_node=false",
        )
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with ExitStack() as turn:
            _take_turn(turn, place, kind)
            chosen = _collect(held, place, kind, there, count)
        for name in chosen:
            told = _told(place, kind, name)
            told.write_text(json.dumps({"pid": os.getpid(), "run": label}), encoding="utf-8")
            held.callback(told.unlink, missing_ok=True)
        with _restricted(hardware, chosen):
            log.info("%s %s of this machine for %s", kind, ", ".join(chosen), label)
            yield chosen


def _take_turn(turn: ExitStack, place: Path, kind: str) -> None:
    gate = _lock(place / "gate.lock")
    try:
        gate.acquire(timeout=1.0)
    except filelock.Timeout:
        log.warning("waiting behind another run that waits for %ss of this machine", kind)
        gate.acquire()
    turn.callback(gate.release)


def _lock(path: Path) -> filelock.BaseFileLock:
    # filelock's soft locks are mere files: one left by a killed run would block for ever
    return filelock.FileLock(path, fallback_to_soft=False)


def _told(place: Path, kind: str, name: str) -> Path:
    return place / f"{kind}-{name}.json"


def _collect(held: ExitStack, place: Path, kind: str, there: Sequence[str], count: int) -> list[str]:
    """Take free units until there are enough; one that becomes free meanwhile is this run's."""
    chosen: list[str] = []
    due = time.monotonic()
    while True:
        for name in there:
            if name in chosen or len(chosen) == count:
                continue
            lock = _lock(place / f"{kind}-{name}.lock")
            with suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                held.callback(lock.release)
                chosen.append(name)
        if len(chosen) == count:
            return chosen
        if time.monotonic() >= due:
            others = [_told(place, kind, name) for name in there if name not in chosen]
            log.warning("waiting for %d %s(s): %s", count - len(chosen), kind, _holders(others))
            due = time.monotonic() + REMIND
        time.sleep(POLL)


def _holders(paths: Sequence[Path]) -> str:
    found = set()
    for path in paths:
        with suppress(OSError, ValueError, KeyError):
            told = json.loads(path.read_text(encoding="utf-8"))
            found.add(f"{told['run']} (pid {told['pid']})")
    return "; ".join(sorted(found)) or "their holders have not said who they are"


@contextmanager
def _restricted(hardware: HardwareConfig, chosen: Sequence[str]) -> Iterator[None]:
    if hardware.device == "cuda":
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        try:
            yield
        finally:
            if before is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = before
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(name) for name in chosen})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
