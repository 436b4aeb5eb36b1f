"""`python -m alignbench.retry`: the failed jobs of a sweep, and only those, run again and complete it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from tiny_runs import PATIENCE_S, TINY, TOP, compose, environment

from alignbench.config import run_id
from alignbench.errors import ConfigError, DataError
from alignbench.jsonio import read_json, write_json
from alignbench.retry import jobs_of, main
from alignbench.sweep import SweepTable


def called(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(PYTHONPATH=str(TOP)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.slow
def test_a_failed_job_is_retried_through_another_launcher_and_completes_the_sweep(tmp_path: Path) -> None:
    folders = (f"output_dir={tmp_path}/out", f"store_dir={tmp_path}/store")
    failing = run_id(compose(*TINY, *folders, "method=dpo_helpful"))
    # the job does all of its work, and cannot write its record
    (tmp_path / "out" / failing / "record.json").mkdir(parents=True)
    done = called(tmp_path, str(TOP / "main.py"), "-m", *TINY, *folders, "method=sft,dpo_helpful")
    assert done.returncode == 1
    assert "sweep: 1 run(s) finished, 1 failed\n" in done.stdout
    (path,) = tmp_path.glob("out/sweep-*/sweep.json")
    assert read_json(path)["failed"][0]["overrides"][-1] == "method=dpo_helpful"
    (tmp_path / "out" / failing / "record.json").rmdir()
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("retry:")]
    words = shlex.split(line.partition("python ")[2])

    again = called(tmp_path, *words, "hydra/launcher=submitit_local", "tracking.tags=[again]")

    assert again.returncode == 0, again.stderr
    assert "sweep: 2 run(s) finished, 0 failed\n" in again.stdout
    summary = read_json(path)
    assert summary["complete"]
    assert summary["failed"] == []
    assert summary["missing"] == 0
    assert summary["runs"][-1] == failing
    assert len(summary["runs"]) == 2
    assert list(tmp_path.glob("out/sweep-*")) == [path.parent]
    table = (path.parent / "requested_achieved.md").read_text()
    assert [table.count(f"\n| {method} |") for method in ("sft", "dpo_helpful")] == [1, 1]
    record = read_json(tmp_path / "out" / failing / "record.json")
    assert record["config"]["tracking"]["tags"] == ["again"]
    assert not any(stage["built"] for stage in record["stages"])  # the first attempt's work was kept
    nothing = called(tmp_path, *words)
    assert nothing.returncode == 2
    assert "no job of this sweep failed" in nothing.stderr


# ---------------------------------------------------------------- which jobs


def summary_of(folder: Path, *failed: list[str], runs: tuple[str, ...] = ()) -> Path:
    path = folder / "sweep-x" / "sweep.json"
    path.parent.mkdir(exist_ok=True)
    jobs = [{"overrides": overrides, "error": "E: it fell"} for overrides in failed]
    write_json(path, {"complete": False, "missing": 0, "runs": list(runs), "failed": jobs, "stages": {}})
    return path


def test_extra_overrides_are_added_and_replace_a_job_s_own(tmp_path: Path) -> None:
    path = summary_of(tmp_path, ["method=sft", "hardware=cpu_2"], ["constraint.thresholds=[0.1,0.2]"])
    assert jobs_of(path, []) == [("method=sft", "hardware=cpu_2"), ("constraint.thresholds=[0.1,0.2]",)]
    assert jobs_of(path, ["hardware=cpu", "seed=1"]) == [
        ("method=sft", "hardware=cpu", "seed=1"),
        ("constraint.thresholds=[0.1,0.2]", "hardware=cpu", "seed=1"),
    ]
    with pytest.raises(ConfigError, match="starts no others"):
        jobs_of(path, ["seed=1,2"])


def test_what_is_no_sweep_is_refused_before_hydra_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, fault in (("[]", "TypeError"), ("{}", "KeyError"), ("{", "StoreError")):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(DataError, match=fault):
            jobs_of(tmp_path / "sweep.json", [])
    assert main([str(tmp_path / "none" / "sweep.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main([]) == 2
    assert "SWEEP.json" in capsys.readouterr().err


# ---------------------------------------------------------------- the summary of a retry


def ended(seed: int, folder: Path, error: Exception | None = None) -> JobReturn:
    """A job of a retry; one that went well leaves a record."""
    made = JobReturn(
        overrides=[f"seed={seed}"],
        cfg=compose(*TINY, f"seed={seed}"),
        status=JobStatus.FAILED if error else JobStatus.COMPLETED,
        _return_value=error or 0.0,
    )
    if error is None:
        record_of(run_id(made.cfg), folder)
    return made


def record_of(run: str, folder: Path) -> None:
    made = {"rows": {"sacpo": {"policy": "p", "metrics": {}}}, "outcome": {"reported": "sacpo"}, "stages": []}
    config = {"constraint": {"utilities": ["safety"], "thresholds": [0.5]}}
    (folder / run).mkdir()
    write_json(folder / run / "record.json", made | {"run_id": run, "method": "sacpo", "seed": 0, "config": config})


def test_what_a_retry_did_not_finish_stays_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = summary_of(tmp_path, ["seed=1"], ["seed=2"], ["seed=3"], runs=("kept", "vanished"))
    record_of("kept", tmp_path)
    config = OmegaConf.create(
        {
            "plan": False,
            "output_dir": str(tmp_path),
            "hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"task": []}, "sweeper": {"of": str(path)}},
        }
    )
    callback = SweepTable()
    callback.on_multirun_start(config)
    for number, error in enumerate((None, ValueError("it fell again"))):  # the third was never started
        job = ended(number + 1, tmp_path, error)
        callback.on_job_end(OmegaConf.merge(config, {"hydra": {"job": {"num": number}}}), job)
    callback.on_multirun_end(config)
    summary = read_json(path)
    assert [job["overrides"] for job in summary["failed"]] == [["seed=2"], ["seed=3"]]
    assert summary["failed"][0]["error"] == "ValueError: it fell again"
    assert len(summary["runs"]) == 2
    assert summary["missing"] == 1  # the run whose record is gone
    assert not summary["complete"]
    text = capsys.readouterr().out
    assert "sweep: 2 run(s) finished, 2 failed; 1 never ran to an end\n" in text
    assert "retry:   python -m alignbench.retry" in text
    assert "missing: repeat the sweep's own command" in text
