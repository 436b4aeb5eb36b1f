"""A sweep through submitit on a real SLURM, where there is one: jobs queue, run, and go on after a requeue."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY, TOP, environment

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


def test_jobs_run_on_the_cluster_and_one_goes_on_after_a_requeue(tmp_path: Path, partition: str) -> None:
    launched = sweep(
        tmp_path, partition, "method=sft,dpo_helpful", "model.sft.epochs=1500", "hardware.checkpoint_every=20"
    )
    try:
        until = time.monotonic() + PATIENCE_S
        while not (markers := list((tmp_path / "store").glob("building/*/work/checkpoints/COMPLETE.json"))):
            assert launched.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        # the job that holds the stage, by the name that submitit gave its log folder
        running = [line.split() for line in slurm("squeue", "-h", "-o", "%i %T %Z").splitlines()]
        mine = [job for job, state, where in running if state == "RUNNING" and where.startswith(str(tmp_path))]
        assert mine, running
        assert markers
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
