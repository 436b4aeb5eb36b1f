"""sweeps/*.sh: what a script would run is planned as it stands; one of them runs at a small size."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from own_files import save_model
from tiny_runs import TOP, environment

from alignbench.record import read_records

# those whose every line is one multirun
SWEEPS = ("sacpo_beta_over_lambda", "p_sacpo_q", "can_multipliers", "caid_thresholds", "pd_dpo_rounds", "thresholds")


def started(folder: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TOP / "sweeps" / f"{name}.sh"), *arguments, f"store_dir={folder}/store"],
        env=environment(PYTHON=sys.executable, OUT=str(folder / "out"), **variables),
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


def test_plans_of_two_lanes_come_one_after_the_other(tmp_path: Path) -> None:
    done = started(tmp_path, "head_to_head", "plan=true", "seed=0", "constraint.thresholds=[0.1]", "debug=tiny")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"Launching|plan of the sweep", done.stdout)
    assert said == ["Launching", "plan of the sweep"] * 6
    assert not (tmp_path / "out").exists() or not read_records(tmp_path / "out")  # and no report of nothing
    assert "compare" not in done.stdout
    assert "minutes" in (TOP / "sweeps" / "head_to_head.sh").read_text()


def test_two_lanes_run_every_method_once_and_report(tmp_path: Path) -> None:
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(f'#!/bin/sh\nsleep 0.1\necho "$@" >> {log}\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(TOP / "sweeps" / "head_to_head.sh")],
        env=environment(PYTHON=str(stub), OUT="out", TMPDIR=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    called = log.read_text().splitlines()
    methods = [name for line in called for name in re.findall(r"method=(\S+)", line)]
    once = "dpo_helpful dpo_safe mocaid mocan naive_merge p_sacpo pd_dpo pecaid pecan sacpo sft"
    assert " ".join(sorted(",".join(methods).split(","))) == once
    assert {line.split()[2] for line in called[-3:]} == {"compare", "plots", "dashboard"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "python"]  # what the lanes agreed on is gone


@pytest.mark.slow
def test_a_ready_sweep_runs(tmp_path: Path) -> None:
    small = ("debug=tiny", "hardware.threads=1", "seed=0", "method.multipliers=[0.5]", "tracking=disabled")
    done = started(tmp_path, "can_multipliers", *small)
    assert done.returncode == 0, done.stderr
    assert "sweep: 2 run(s) finished, 0 failed" in done.stdout
    records = read_records(tmp_path / "out")
    assert {record["method"] for record in records} == {"mocan", "pecan"}
    assert all(record["outcome"]["multipliers"] == {"safety": 0.5} for record in records)


@pytest.mark.parametrize("name", ["head_to_head", "claims"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_a_script_that_is_stopped_stops_both_of_its_sweeps_and_starts_nothing_more(
    tmp_path: Path, name: str, sent: signal.Signals
) -> None:
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"  # not killed by it: a run saves, and then ends
        f"open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)\n"
    )
    stub.chmod(0o755)
    process = subprocess.Popen(
        ["bash", str(TOP / "sweeps" / f"{name}.sh")],
        env=environment(PYTHON=str(stub), OUT=str(tmp_path / "out")), start_new_session=True,
        # tests that run in a background hear no Ctrl-C, and neither would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip

    def begun() -> list[int]:
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    until = time.monotonic() + 60
    while len(begun()) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    both = begun()
    os.killpg(process.pid, sent)  # as a terminal does, or a batch system: to the script and what runs in its foreground
    assert process.wait(60) == 128 + sent
    while any(map(psutil.pid_exists, both)) and time.monotonic() < until:
        time.sleep(0.05)
    assert begun() == both
    assert len(both) == 2
    assert not any(map(psutil.pid_exists, both))


def truthfulqa(folder: Path) -> Path:
    """Questions with four answers each, in the two files' own format."""
    folder.mkdir()
    cells = list(itertools.product(range(30), (True, False), (True, False)))
    for name, title, which in (("truth", "True", 1), ("info", "Helpful", 2)):
        lines = [
            {
                "prompt": f"Q: Is {cell[0]} large?\nA: {'Yes' if cell[1] else 'No'}{', very' * cell[2]}.\n{title}:",
                "completion": " yes" if cell[which] else " no",
            }
            for cell in cells
        ]
        (folder / f"finetune_{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_the_chain_on_truthfulqa_runs(tmp_path: Path) -> None:
    """From a policy with a chat template and answers with two labels to the table, as on the real ones."""
    from transformers import AutoTokenizer

    model, data = save_model(tmp_path / "model"), truthfulqa(tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    tokenizer.save_pretrained(model)
    small = (
        "dataset.files.most_prompts=24", "evaluate.sampling.max_new_tokens=8", "evaluate.resamples=200",
        "hardware.threads=1", "hardware.flops_per_second=6.0e+10", "tracking=disabled",
    )  # fmt: skip
    done = started(tmp_path, "truthfulqa", *small, MODEL=str(model), DATA=str(data))
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "out")
    assert [record["method"] for record in records] == ["mocan", "pd_dpo", "sacpo"]
    for record in records:
        assert record["data"]["data: report"]["drawn"]["prompts"] == "24 of 30"
        assert {"reward", "truthful"} <= set(record["rows"][record["method"]]["metrics"])
    assert (tmp_path / "out" / "compare.md").is_file()
    assert (tmp_path / "out" / "dashboard.html").is_file()
