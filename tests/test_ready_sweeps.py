"""sweeps/*.sh: what a script would run is planned as it stands; one of them runs at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TOP, environment

from alignbench.record import read_records

# those whose every line is one multirun
SWEEPS = ("sacpo_beta_over_lambda", "p_sacpo_q", "can_multipliers", "caid_thresholds", "pd_dpo_rounds", "thresholds")


def started(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TOP / "sweeps" / f"{name}.sh"), *arguments, f"store_dir={folder}/store"],
        env=environment(PYTHON=sys.executable, OUT=str(folder / "out")),
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", SWEEPS)
def test_a_ready_sweep_plans_as_it_stands(tmp_path: Path, name: str) -> None:
    script = (TOP / "sweeps" / f"{name}.sh").read_text()
    # one seed: the others differ in nothing, and composing 72 configurations takes a minute
    done = started(tmp_path, name, "plan=true", "seed=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("plan of the sweep: ") == script.count("main.py -m")
    assert "raised" not in done.stderr
    assert "minutes" in script or "hours" in script  # its cost stands in its head


@pytest.mark.slow
def test_a_ready_sweep_runs(tmp_path: Path) -> None:
    small = ("debug=tiny", "hardware.threads=1", "seed=0", "method.multipliers=[0.5]", "tracking=disabled")
    done = started(tmp_path, "can_multipliers", *small)
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 run(s) finished, 0 failed" in done.stdout
    records = read_records(tmp_path / "out")
    assert {record["method"] for record in records} == {"mocan", "pecan"}
    assert all(record["outcome"]["multipliers"] == {"safety": 0.5} for record in records)
