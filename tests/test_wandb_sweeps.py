"""sweeps/wandb: what an agent would start is composed, planned and run, as far as that goes without a server."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import TOP, compose, environment

from alignbench.config import resolve, validate
from alignbench.record import read_records

SWEEPS = sorted((TOP / "sweeps/wandb").glob("*.yaml"))


def expanded(sweep: dict[str, Any]) -> list[list[str]]:
    """Arguments of every run of a grid; of a search those at the ends of each range."""
    choices = []
    for name, given in sweep["parameters"].items():
        values = given.get("values") or [given[key] for key in ("value", "min", "max") if key in given]
        choices.append([f"{name}={value}" for value in values])
    return [list(arguments) for arguments in itertools.product(*choices)]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_is_a_valid_configuration(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert (TOP / sweep["program"]).is_file()
    assert sweep["command"][1:3] == ["${interpreter}", "${program}"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    own = [word for word in sweep["command"] if "=" in word]
    assert sweep["metric"]["name"].startswith("reported/")
    runs = expanded(sweep)
    assert runs
    for arguments in runs:
        config, settings = resolve(compose(*own, *arguments))
        validate(config, settings)
        assert config.tracking.mode == "online"
    if sweep["method"] != "grid":
        # a search must not look at the prompts that results are reported on
        assert config.evaluate.split == "validation"


@pytest.mark.slow
def test_a_run_that_an_agent_starts_goes_by_the_agent_s_name(tmp_path: Path) -> None:
    sweep = yaml.safe_load((TOP / "sweeps/wandb/sacpo_beta_over_lambda.yaml").read_text())
    done = subprocess.run(
        [
            sys.executable,
            str(TOP / sweep["program"]),
            *expanded(sweep)[0],
            "debug=tiny",
            "hardware.threads=1",
            "tracking.mode=offline",
            f"output_dir={tmp_path}/out",
            f"store_dir={tmp_path}/store",
        ],
        env=environment(WANDB_SWEEP_ID="abc123", WANDB_RUN_ID="agentsrun"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "W&B stopped" not in done.stderr
    (record,) = read_records(tmp_path / "out")
    assert record["method"] == "sacpo"
    (mirrored,) = (tmp_path / "out" / record["run_id"]).glob("wandb/offline-run-*")
    assert mirrored.name.endswith("-agentsrun")
    (file,) = mirrored.glob("*.wandb")
    assert b"reported/" in file.read_bytes()
