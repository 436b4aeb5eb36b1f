"""The summary of a hyper-parameter search: what was varied, what was chosen, and on which prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from record_files import folder_of

from alignbench.report.search import defaults_of, main

RATE = "method.step.train.learning_rate"


def point(method: str, rate: float, reward: float, kl: float, split: str = "validation") -> dict[str, Any]:
    metrics = {"reward_gain": {"mean": reward}, "kl": {"mean": kl, "n": 64}}
    return {
        "run_id": f"{method}-{rate:g}",
        "method": method,
        "commit": "abc",
        "config": {
            "method": {"name": method, "step": {"train": {"learning_rate": rate, "epochs": 1.0}}},
            "model": {"name": "handbook_llama"},
            "dataset": {"name": "handbook"},
            "constraint": {"beta": 0.5},
            "evaluate": {"split": split},
        },
        "outcome": {"reported": "policy"},
        "rows": {"sft": {"metrics": {}}, "policy": {"metrics": metrics}},
    }


def test_rows_are_ordered_by_the_problem_s_own_objective(tmp_path: Path) -> None:
    made = [
        point("mocan", 1e-4, 0.1, 0.1),
        point("dpo_helpful", 1e-3, 1.0, 1.8),  # the larger reward, and the smaller objective
        point("dpo_helpful", 1e-4, 0.5, 0.2),
    ]
    folder_of(made, tmp_path / "runs")
    assert main([str(tmp_path / "runs"), str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(row["run_id"], row["objective_gain"]) for row in found["rows"]] == [
        ("dpo_helpful-0.0001", 0.4), ("dpo_helpful-0.001", 0.1), ("mocan-0.0001", 0.05),
    ]  # fmt: skip
    # of one run of a method nothing was varied
    assert [row["settings"] for row in found["rows"]] == [{RATE: 1e-4}, {RATE: 1e-3}, {}]
    assert found["chosen"] == {"dpo_helpful": {RATE: 1e-4}, "mocan": {}}
    assert found["commits"] == ["abc"]


def test_what_was_chosen_is_read_off_the_configuration_that_was_searched() -> None:
    assert defaults_of("mocan", [RATE]) == {RATE: 2e-4}
    assert defaults_of("mocan", [RATE], ["model=handbook_llama_lora"]) == {RATE: 1e-3}
    assert defaults_of("dpo_helpful", [RATE, "model.lora.targets"], ["model=handbook_llama_lora", f"{RATE}=0.5"]) == {
        RATE: 0.5, "model.lora.targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip


def test_test_prompts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of([point("mocan", 1e-4, 0.1, 0.1, split="test")], tmp_path / "runs")
    assert main([str(tmp_path / "runs"), str(tmp_path / "out.json")]) == 2
    assert "mocan-0.0001" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_no_record_and_no_arguments_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out.json")]) == 2
    assert "run the search first" in capsys.readouterr().err
    assert main([]) == 2
    assert "OUT.json" in capsys.readouterr().err
