"""A sweep through submitit on a real SLURM, where there is one: jobs queue, run, go on after a requeue or scancel."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_runs import TINY, TOP, environment, only_record, science

pytestmark = pytest.mark.slow
# a requeued job may start again after two minutes only
PATIENCE_S = 600.0


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture
def partition() -> str:
    """An idle partition of a cluster that this machine can submit to."""
    if shutil.which("sinfo") is None:
        pytest.skip("no SLURM here: sinfo is not installed")
    try:
        found = slurm("sinfo", "-h", "-t", "idle,mixed,allocated", "-o", "%R").split()
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"no SLURM here: {error}")
    if not found:
        pytest.skip("no SLURM here: it has no partition that is up")
    return found[0]


def sweep(folder: Path, partition: str, *overrides: str) -> subprocess.Popen[bytes]:
    """A multirun whose jobs SLURM runs; its output goes to folder/output."""
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [
                sys.executable,
                str(TOP / "main.py"),
                "-m",
                *TINY,
                "hydra/launcher=submitit_slurm",
                f"hydra.launcher.partition={partition}",
                "hydra.launcher.cpus_per_task=1",
                "hydra.launcher.mem_gb=4",
                "hydra.launcher.timeout_min=30",
                "tracking=disabled",
                *overrides,
                f"output_dir={folder}/out",
                f"store_dir={folder}/store",
            ],
            env=environment(),
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def when_a_checkpoint_is_there(launched: subprocess.Popen[bytes], folder: Path) -> list[str]:
    """Wait for a job's first checkpoint; the running jobs of this sweep."""
    until = time.monotonic() + PATIENCE_S
    while not list((folder / "store").glob("building/*/work/checkpoints/COMPLETE.json")):
        assert launched.poll() is None, (folder / "output").read_text()
        assert time.monotonic() < until
        time.sleep(0.2)
    # by the folder that submitit gave the job
    running = [line.split() for line in slurm("squeue", "-h", "-o", "%i %T %Z").splitlines()]
    mine = [job for job, state, where in running if state == "RUNNING" and where.startswith(str(folder))]
    assert mine, running
    return mine


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that belong to this sweep, but for its launcher."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(folder) in line and f"{TOP}/main.py -m" not in line:
                found.append(line)
    return found


def test_jobs_run_on_the_cluster_and_one_goes_on_after_a_requeue(tmp_path: Path, partition: str) -> None:
    launched = sweep(
        tmp_path, partition, "method=sft,dpo_helpful", "model.sft.epochs=1500", "hardware.checkpoint_every=20"
    )
    try:
        mine = when_a_checkpoint_is_there(launched, tmp_path)
        for job in mine:
            slurm("scontrol", "requeue", job)
        assert launched.wait(PATIENCE_S) == 0, (tmp_path / "output").read_text()
    finally:
        if launched.poll() is None:
            launched.kill()
    told = (tmp_path / "output").read_text()
    assert "sweep: 2 run(s) finished, 0 failed" in told
    assert len(list((tmp_path / "out").glob("*/record.json"))) == 2
    logs = "".join(path.read_text() for path in (tmp_path / "out").glob("*/alignbench.log"))
    steps = [int(step) for step in re.findall(r"sft: continuing at step (\d+) of", logs)]
    assert steps
    assert min(steps) >= 20


def test_a_run_on_two_machines_is_one_job_with_a_task_on_each(tmp_path: Path, partition: str) -> None:
    # a cluster of one machine gives both tasks to it; what matters is that the second becomes the first one's helper
    launched = sweep(
        tmp_path,
        partition,
        "method=sft",
        "hydra.launcher.tasks_per_node=2",
        "hardware.nodes=2",
        "hardware.processes=2",
        "hardware.zero_stage=2",
    )
    assert launched.wait(PATIENCE_S) == 0, (tmp_path / "output").read_text()
    assert "sweep: 1 run(s) finished, 0 failed" in (tmp_path / "output").read_text()
    logs = "".join(path.read_text() for path in tmp_path.rglob("*_log.*"))
    assert "as machine 1" in logs
    assert "taking part in the run at" in logs


def test_a_cancelled_job_leaves_no_process_and_the_same_command_goes_on(tmp_path: Path, partition: str) -> None:
    # longer than SLURM's KillWait (30 s): a run that ends within it was not cancelled
    settings = ("method=sft", "model.sft.epochs=1000", "hardware.checkpoint_every=20")
    for name in ("cancelled", "calm"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "cancelled"
    launched = sweep(folder, partition, *settings)
    try:
        (job,) = when_a_checkpoint_is_there(launched, folder)
        assert processes_of(folder)
        slurm("scancel", job)
        # submitit passes SIGTERM by, so that SLURM waits for its KillWait (30 s) before it ends the job
        until = time.monotonic() + PATIENCE_S
        while (left := processes_of(folder)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left
    finally:
        # where SLURM keeps no accounts (sacct) submitit cannot tell a cancelled job from one that waits
        if launched.poll() is None:
            launched.terminate()
        launched.wait(PATIENCE_S)
    assert not list((folder / "out").glob("*/record.json"))
    for place in (folder, tmp_path / "calm"):
        again = sweep(place, partition, *settings)
        try:
            assert again.wait(PATIENCE_S) == 0, (place / "output").read_text()
        finally:
            if again.poll() is None:
                again.kill()
    logs = "".join(path.read_text() for path in (folder / "out").glob("*/alignbench.log"))
    (step,) = re.findall(r"sft: continuing at step (\d+) of", logs)
    assert int(step) >= 20
    assert science(only_record(folder / "out")) == science(only_record(tmp_path / "calm" / "out"))
