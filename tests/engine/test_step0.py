"""At policy = reference the loss has its theoretical value, in every mode; a wrong reference stops the run."""

import math

import numpy as np
import pytest
import tiny

from alignbench.engine.batching import Row
from alignbench.errors import InvariantError
from alignbench.models import policy as policies

pytestmark = pytest.mark.usefixtures("split_parameters")

EXPECTED = {"dpo": math.log(2), "ipo": 1 / (4 * 0.5**2)}
MODES = [
    pytest.param(lora, stage, id=f"{'lora' if lora else 'full'}-zero{stage}")
    for lora in (None, tiny.LORA)
    for stage in range(4)
]


def first_stage(base, lora, stage, work, steps=4):
    """Train from the folder `base`; returns (result, folder of the policy that training left)."""
    goal = tiny.preference("dpo", tiny.load(base))
    job = tiny.job(tiny.load(base, lora), goal, work / "1", steps=steps, lora=lora, machine={"zero_stage": stage})
    result, state = tiny.run(job)
    return result, tiny.save(policies.restore_weights(base, state, lora), work / "policy")


@pytest.mark.parametrize(("lora", "stage"), MODES)
def test_dpo_starts_at_ln2_in_both_sacpo_stages(policy_folder, tmp_path, lora, stage):
    result, folder = first_stage(policy_folder, lora, stage, tmp_path)
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(result.log[0]["margin"]) < 1e-5
    moved = tiny.logprobs(tiny.load(folder), tiny.rows(8, 9)) - tiny.logprobs(tiny.load(policy_folder), tiny.rows(8, 9))
    assert np.abs(moved).max() > 0.1  # stage 1 changed the policy: the check of stage 2 is not empty

    goal = tiny.preference("dpo", tiny.load(folder), seed=50, beta=0.2)
    job = tiny.job(tiny.load(folder, lora), goal, tmp_path / "2", steps=2, lora=lora, machine={"zero_stage": stage})
    second, _ = tiny.run(job)
    assert second.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second.log[1]["loss"] != second.log[0]["loss"]


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_second_stage_refuses_the_base_as_reference(policy_folder, tmp_path, lora):
    _, folder = first_stage(policy_folder, lora, 0, tmp_path)
    goal = tiny.preference("dpo", tiny.load(policy_folder))
    with pytest.raises(InvariantError, match="step-0 loss"):
        tiny.run(tiny.job(tiny.load(folder, lora), goal, tmp_path / "2", lora=lora))


@pytest.mark.parametrize("name", ["ipo", "kto"])
@pytest.mark.parametrize("stage", [0, 3])
def test_ipo_and_kto_start_at_their_own_values(policy_folder, tmp_path, name, stage):
    goal = tiny.preference(name, tiny.load(policy_folder))
    machine = {"zero_stage": stage}
    result, _ = tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path, batch_size=16, machine=machine))
    if name == "kto":  # half the mean weight: the first batch's mixture of desirable (1) and undesirable (0.75)
        from alignbench.engine.batching import example_order

        labels = goal.desirable[example_order(len(goal), 4, 16, 3)[0]]
        expected = 0.5 * np.where(labels, 1.0, 0.75).mean()
        assert 0 < labels.sum() < 16
        assert abs(result.log[0]["kl_estimate"]) < 1e-5
    else:
        expected = EXPECTED[name]
    assert result.log[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(result.log[-1]["loss"] - expected) > 1e-3


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_shifted_reference_rows_are_refused(policy_folder, tmp_path, name):
    goal = tiny.preference(name, tiny.load(policy_folder))
    goal.reference = np.roll(goal.reference, 1, axis=0)
    with pytest.raises(InvariantError, match="reference log-probs do not belong to this policy"):
        tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path))


def test_another_prompt_border_is_refused(policy_folder, tmp_path):
    goal = tiny.preference("dpo", tiny.load(policy_folder))
    goal.chosen = [Row(row.ids, max(0, row.prompt_length - 1)) for row in goal.chosen]
    with pytest.raises(InvariantError):
        tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path))


def test_reference_that_is_not_a_number_is_refused(policy_folder, tmp_path):
    goal = tiny.preference("dpo", tiny.load(policy_folder))
    goal.reference[:] = np.nan
    with pytest.raises(InvariantError, match="nan"):
        tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path))


def test_check_is_left_out_where_start_is_not_the_reference(policy_folder, tmp_path):
    goal = tiny.preference("dpo", tiny.llama(seed=8))
    with pytest.raises(InvariantError):
        tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path / "a"))
    job = tiny.job(tiny.load(policy_folder), goal, tmp_path / "b", starts_at_reference=False)
    assert abs(tiny.run(job)[0].log[0]["loss"] - math.log(2)) > 1e-3


def test_a_loss_that_is_not_finite_stops_training(policy_folder, tmp_path):
    goal = tiny.preference("dpo", tiny.load(policy_folder))
    goal.reference[:] = np.inf
    job = tiny.job(tiny.load(policy_folder), goal, tmp_path, starts_at_reference=False)
    with pytest.raises(InvariantError, match="the loss of optimiser step 1 is"):
        tiny.run(job)
