"""The dual without an alignment, banks of some prompts only, and the merge of two policies that were aligned apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from method_runs import BANK, entry, once
from safetensors.numpy import load_file
from tiny_runs import Run, plan, run

from alignbench.errors import ConfigError

FEW = "method.dual.prompts=5"
# what eight responses to five prompts reach
WITHIN = "constraint.thresholds=[0.0]"


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return once(tmp_path_factory, "method=dual", BANK, WITHIN, FEW)


def asked(done: Run, label: str) -> set[str]:
    return {row["prompt"] for row in done.artifact(label).jsonl("responses.jsonl")}


def test_the_dual_alone_trains_nothing_and_reports_lambda_and_its_prediction(dual: Run) -> None:
    assert "prefer" not in {stage["stage"] for stage in dual.record["stages"]}
    assert list(dual.record["rows"]) == ["sft"]
    found = dual.artifact("dual").json("multipliers.json")["multipliers"]
    assert found["safety"] >= 0
    assert dual.record["outcome"]["diagnostics"]["dual"] == dual.artifact("dual").json("dual.json")


def test_the_record_has_the_duals_course_and_the_labels_calibration(
    dual: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    solution = dual.artifact("dual").json("dual.json")["solution"]
    (found,) = dual.record["duals"]
    assert found["artifact"] == dual.key("geometry of dual")
    assert found["value"] == pytest.approx(solution["value"], rel=1e-9)
    course = found["course"]["safety"]
    assert min(course["value"]) == pytest.approx(solution["value"], rel=1e-9)
    assert course["multiplier"][int(np.argmin(course["value"]))] == pytest.approx(solution["multipliers"][0])
    (entry_,) = found["sample_effect"]  # four of eight responses
    assert (entry_["responses"], entry_["draws"]) == (4, 16)
    assert "labels" not in dual.record
    mocan = once(tmp_path_factory, "method=mocan", BANK, WITHIN, FEW)
    assert mocan.record["duals"] == dual.record["duals"]
    ((label, calibration),) = mocan.record["labels"].items()
    drawn = load_file(mocan.artifact(label).path("labels.safetensors"))
    assert sum(b["n"] for b in calibration["bins"]) == calibration["pairs"] == len(drawn["preferred"])
    observed = sum(b["n"] * b["observed"] for b in calibration["bins"])
    assert observed == pytest.approx(float((drawn["preferred"] == 1).sum()))


def test_mocan_solves_the_same_dual(dual: Run, tmp_path_factory: pytest.TempPathFactory) -> None:
    mocan = once(tmp_path_factory, "method=mocan", BANK, WITHIN, FEW)
    assert mocan.key("dual") == dual.key("dual")
    assert mocan.record["rows"]["mocan"]["multipliers"] == dual.artifact("dual").json("multipliers.json")["multipliers"]


def test_a_bank_has_as_many_prompts_as_asked_and_more_prompts_keep_those_of_fewer(
    dual: Run, tmp_path_factory: pytest.TempPathFactory
) -> None:
    few = asked(dual, "sample bank")
    more = asked(once(tmp_path_factory, "method=dual", BANK, WITHIN, "method.dual.prompts=8"), "sample bank")
    every = asked(once(tmp_path_factory, "method=dual", BANK, WITHIN), "sample bank")
    assert (len(few), len(more), len(every)) == (5, 8, 12)
    assert few < more < every
    train = {row["prompt"] for row in dual.artifact("world").jsonl("prompts.jsonl") if row["split"] == "train"}
    assert every == train


def test_seeds_share_the_prompts_of_a_bank(tmp_path: Path) -> None:
    keys = [plan(tmp_path, "method=dual", FEW, f"seed={seed}")[3]["5 prompts, train"].key for seed in (0, 1)]
    assert keys[0] == keys[1]


def test_a_plan_counts_the_prompts_that_are_asked_for(tmp_path: Path) -> None:
    lab, _, _, nodes = plan(tmp_path, "method=dual", FEW, BANK)
    assert lab.estimates[nodes["sample bank"].key].facts.rows == 5 * 8
    lab, _, _, nodes = plan(tmp_path, "method=dual", "method.dual.prompts=1000", BANK)
    assert lab.estimates[nodes["sample bank"].key].facts.rows == 12 * 8  # there are no more


def test_results_may_be_reported_on_some_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = once(tmp_path_factory, "method=sft", "evaluate.prompts=3")
    assert len(asked(done, "sample sft")) == 3
    assert done.record["rows"]["sft"]["metrics"]["reward"]["n"] == 6  # two samples each


@pytest.mark.parametrize("key", ["method.dual.prompts", "evaluate.prompts"])
def test_a_number_of_prompts_that_draws_none_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "store", tmp_path / "out", "method=mocan", f"{key}=0")
    assert caught.value.where == key
    with pytest.raises(ConfigError, match="all prompts are used"):
        run(tmp_path / "store", tmp_path / "out", "method=mocan", f"{key}=3", "dataset.world.answers=8")


def test_a_naive_merge_averages_two_policies_that_start_from_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    done = once(tmp_path_factory, "method=naive_merge", "method.beta_safe=0.2")
    weights = {
        name: load_file(done.artifact(label).path("policy/model.safetensors"))
        for name, label in (("r", "prefer reward"), ("s", "prefer safety"), ("q", "merge q=0.25"))
    }
    for name, merged in weights["q"].items():
        expected = 0.75 * weights["r"][name].astype(np.float64) + 0.25 * weights["s"][name].astype(np.float64)
        np.testing.assert_array_equal(merged, expected.astype(np.float32))  # rounded once, at the end
    reference = done.key("sft")
    for label, beta in (("prefer reward", 0.5), ("prefer safety", 0.2)):
        stage = entry(done, label)
        assert stage["inputs"]["start"] == stage["inputs"]["reference"] == reference
        assert stage["spec"]["beta"] == beta
    assert done.record["outcome"]["reported"] == "naive_merge q=0.5"
    assert {"step reward", "step safety", "naive_merge q=0.25", "naive_merge q=0.75"} <= set(done.record["rows"])


@pytest.mark.parametrize("override", ["method.q=[1.5]", "method.reported_q=0.3", "method.beta_safe=0"])
def test_a_naive_merge_that_is_none_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"q =|beta_safe ="):
        run(tmp_path / "store", tmp_path / "out", "method=naive_merge", override)
