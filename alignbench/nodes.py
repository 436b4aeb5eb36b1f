"""Several machines for one run: machine 0 runs `main.py`, every other one a helper that takes part in its stages.

    python -m alignbench.nodes HOST:PORT [--scratch FOLDER]      (on every machine but the first)

Under SLURM nobody starts helpers: where a job has one task per machine, all but the first task become helpers by
themselves. HOST:PORT (`hardware.rendezvous`) is a mailbox on machine 0, open while its run lasts. Machines may share
the store's folder; one that does not gets a stage's inputs from rank 0, and keeps its own ranks' checkpoints in FOLDER.

Whoever reaches HOST:PORT can start programs here, as with torchrun's own rendezvous: keep it on a private network.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from alignbench.agent import PARENT, Start, environment, free_port
from alignbench.errors import ConfigError, RankError
from alignbench.hardware import HardwareConfig

log = logging.getLogger(__name__)

#: Seconds between two looks into the mailbox.
POLL = 0.2
#: Seconds until someone who waits says so again.
REMIND = 30.0
#: Seconds that machine 0 waits for the others before a stage.
PATIENCE = 900.0
#: Seconds that a shared folder may take to show a new file (NFS caches directories).
VISIBLE = 60.0
#: What a helper hands over of its ranks' logs, bytes each.
LOG_TAIL = 50_000
_NOTES = ("failed_*.json", "agent_*.json", "hung_*.json", "rank_*.log")
JOB = "job.pickle"

_heads: dict[str, Head] = {}


def rendezvous(hardware: HardwareConfig) -> str:
    """HOST:PORT of machine 0's mailbox: as configured, or of this SLURM job.

    Raises:
        ConfigError: neither says one.
    """
    if hardware.rendezvous:
        return hardware.rendezvous
    nodes, job = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_JOB_ID")
    if nodes and job:
        names = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
        return f"{names.stdout.split()[0]}:{20000 + int(job) % 20000}"
    raise ConfigError(
        f"hardware.nodes={hardware.nodes}, and nothing says where the machines meet",
        where="hardware.rendezvous",
        mend="hardware.rendezvous=HOST:PORT of this machine as the others reach it, and on each of them "
        "`python -m alignbench.nodes HOST:PORT`; under SLURM one task per machine is enough",
    )


def is_helper(hardware: HardwareConfig) -> bool:
    """Whether this process is a SLURM task other than the first of a job over several machines."""
    return hardware.nodes > 1 and int(os.environ.get("SLURM_PROCID", "0")) > 0


def head_for(hardware: HardwareConfig) -> Head:
    """The mailbox of this process, opened at first use and closed when the process ends."""
    address = rendezvous(hardware)
    if address not in _heads:
        _heads[address] = Head(address)
        atexit.register(_heads[address].close)
    return _heads[address]


def _connect(address: str, *, master: bool, seconds: float) -> Any:
    from torch.distributed import TCPStore

    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=master, wait_for_workers=False, timeout=timedelta(seconds=seconds))


class Head:
    """Machine 0's side of the mailbox."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            with socket.create_server((host, int(port))):  # torch would wait for minutes
                pass
            self._mail = _connect(address, master=True, seconds=60)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the machines cannot meet at {address} ({str(error).splitlines()[0]})",
                where="hardware.rendezvous",
                mend="HOST must be a name or address of this machine that the others reach, PORT one that is free",
            ) from error
        self._address = address
        self._number = 0
        self._helpers = 0

    def invite(self, folder: Path, store_root: Path, start: Start) -> Start:
        """Announce a job and wait until every other machine takes part.

        Args:
            folder: The job's folder, with the frozen job in it.
            store_root: A folder that machines with shared storage have in common.
            start: What machine 0 starts; the others get the same with their own number.

        Returns:
            `start` with the place where the ranks meet.

        Raises:
            RankError: a machine did not come.
        """
        self._number += 1
        start = replace(start, endpoint=f"{self._address.rpartition(':')[0]}:{free_port()}")
        token = store_root / f".shared-{secrets.token_hex(6)}"
        token.touch()
        try:
            job = {"folder": str(folder), "token": str(token), "start": start.json()}
            self._mail.set(f"{self._number}/frozen", (folder / JOB).read_bytes())
            self._mail.set(f"{self._number}/job", json.dumps(job))
            self._mail.set("current", str(self._number))
            self._await_machines(start.nodes - 1)
        finally:
            token.unlink(missing_ok=True)
        return start

    def _await_machines(self, wanted: int) -> None:
        began = due = time.monotonic()
        while (ready := self._mail.add(f"{self._number}/ready", 0)) < wanted:
            if time.monotonic() - began > PATIENCE:
                raise RankError(
                    f"{wanted - ready} of {wanted} other machines did not come within {PATIENCE:.0f} s",
                    where="hardware.nodes, hardware.rendezvous",
                    mend=f"on each of them: python -m alignbench.nodes {self._address}; then the same command again",
                )
            if time.monotonic() > due:
                log.warning(
                    "waiting for %d other machine(s): python -m alignbench.nodes %s", wanted - ready, self._address
                )
                due = time.monotonic() + REMIND
            time.sleep(POLL)
        self._helpers = max(self._helpers, wanted)

    def collect(self, folder: Path, nodes: int, seconds: float = 30.0) -> None:
        """Put what the other machines' ranks left (notes of failures, logs) into the job's folder."""
        until = time.monotonic() + seconds
        for node in range(1, nodes):
            name = f"{self._number}/left/{node}"
            while not self._mail.check([name]):
                if time.monotonic() > until:
                    log.warning("machine %d has not said how its ranks ended", node)
                    break
                time.sleep(POLL)
            else:
                for file, text in json.loads(self._mail.get(name)).items():
                    if not (folder / file).exists():
                        (folder / file).write_text(text, encoding="utf-8")

    def stop(self) -> None:
        """Have the other machines stop the current job's ranks."""
        self._mail.set(f"{self._number}/stop", "1")

    def close(self) -> None:
        """Send the helpers home: the mailbox ends with this process."""
        self._mail.set("current", "end")
        until = time.monotonic() + 5
        while self._mail.add("gone", 0) < self._helpers and time.monotonic() < until:
            time.sleep(POLL)


# ---------------------------------------------------------------- the other machines


def helper(address: str, scratch: Path) -> int:
    """Take part in the stages of the run at `address` until it ends.

    Args:
        address: HOST:PORT of its mailbox.
        scratch: Folder for what this machine keeps if it does not share the store: inputs, checkpoints, logs.

    Returns:
        Exit status: 0 when the run is over, 1 when it vanished.
    """
    mail = _reach(address)
    log.info("taking part in the run at %s; files of this machine: %s", address, scratch)
    done = 0
    try:
        while True:
            current = mail.get("current").decode() if mail.check(["current"]) else "0"
            if current == "end":
                mail.add("gone", 1)
                return 0
            if int(current) > done:
                done = int(current)
                _take_part(mail, current, scratch)
            time.sleep(POLL)
    except Exception as error:
        # torch has no error type for a mailbox whose machine is gone that all its releases share
        if not isinstance(error, RuntimeError):
            raise
        log.error("the run at %s is gone (%s)", address, str(error).splitlines()[0])
        return 1


def _reach(address: str) -> Any:
    due = time.monotonic()
    while True:
        try:
            return _connect(address, master=False, seconds=5)
        except RuntimeError:  # torch's DistError: nobody there yet
            if time.monotonic() >= due:
                log.warning("waiting for a run at %s", address)
                due = time.monotonic() + REMIND


def _take_part(mail: Any, number: str, scratch: Path) -> None:
    """Run this machine's ranks of one job."""
    job = json.loads(mail.get(f"{number}/job"))
    node = mail.add(f"{number}/joined", 1)
    start = Start(**json.loads(job["start"]))
    if node >= start.nodes:
        log.info("job %s has machines enough", number)
        return
    start = replace(start, node=node)
    folder = Path(job["folder"])
    if _is_visible(Path(job["token"]), 5.0):
        if not _is_visible(folder / JOB, VISIBLE):
            raise RankError(f"{folder} is not visible within {VISIBLE:.0f} s", where="shared storage", mend="check it")
    else:
        folder = scratch / "jobs" / number
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / JOB).write_bytes(mail.get(f"{number}/frozen"))
    mail.add(f"{number}/ready", 1)
    log.info("job %s: %d rank(s) as machine %d; logs: %s", number, start.processes, node, folder)
    command = [sys.executable, "-m", "alignbench.agent", str(folder), start.json()]
    process = subprocess.Popen(
        command, env=environment(start.processes), start_new_session=True, stdin=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            time.sleep(POLL)
            if mail.check([f"{number}/stop"]):  # raises if machine 0 is gone
                break
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    mail.set(f"{number}/left/{node}", json.dumps(_left(folder)))


def _is_visible(path: Path, seconds: float) -> bool:
    """Whether a file of another machine shows up here; listing its folders makes network file systems look again."""
    until = time.monotonic() + seconds
    while path.parent.parent.exists() and time.monotonic() < until:
        for folder in reversed(path.parents):
            try:
                os.listdir(folder)
            except OSError:
                break
        if path.exists():
            return True
        time.sleep(POLL)
    return path.exists()


def _left(folder: Path) -> dict[str, str]:
    """What the ranks of this machine wrote that machine 0 may not see."""
    found = {}
    for pattern in _NOTES:
        for path in folder.glob(pattern):
            found[path.name] = path.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line of a helper."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.nodes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("address", metavar="HOST:PORT", help="hardware.rendezvous of the run")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()) / "alignbench-node",
        help="folder for this machine's files where the store is not shared; keep it to continue a killed run",
    )
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s")
    if not given.address.rpartition(":")[2].isdigit():
        parser.error(f"{given.address} is not HOST:PORT")
    os.environ.setdefault(PARENT, str(os.getpid()))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's own stack traces while nobody is there yet
    return helper(given.address, given.scratch.absolute())


if __name__ == "__main__":
    sys.exit(main())
