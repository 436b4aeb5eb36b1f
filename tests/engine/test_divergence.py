"""Training that leaves the finite numbers: it stops, says where, and keeps the last checkpoint with good weights."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from alignbench.engine.batching import example_order
from alignbench.engine.objectives import PairObjective
from alignbench.engine.train import trained_state
from alignbench.errors import InvariantError
from alignbench.jsonio import read_json

STEPS = 6
AT = 3  # the step (from 1) that meets the bad example


class Poisoned(PairObjective):
    """The gradient of one example is NaN while its loss is finite: what a square root or a norm at zero does."""

    poison = -1

    def loss(self, logprobs, indices, context):
        values, metrics = super().loss(logprobs, indices, context)
        if self.poison in indices:
            own = torch.tensor(indices == self.poison)
            values = values + own * torch.sqrt(logprobs[own].sum() * 0.0).float()
        return values, metrics


def pairs(folder, poison=False):
    goal = tiny.preference("dpo", tiny.load(folder), count=STEPS * 8)
    goal = Poisoned(goal.chosen, goal.rejected, goal.reference, goal.name, goal.beta)
    if poison:
        goal.poison = met(folder, goal, 5)
    return goal


def met(folder, goal, place):
    """The example at a place of the step `AT`."""
    a_job = job(folder, goal, None)
    return int(example_order(len(goal), STEPS, a_job.settings.batch_size, a_job.seed)[AT - 1][place])


def job(folder, goal, work, stage=0, rate=3e-3, clip=0.0):
    return tiny.job(
        tiny.load(folder),
        goal,
        work,
        steps=STEPS,
        machine={"zero_stage": stage, "checkpoint_every": 1},
        train_settings={"learning_rate": rate, "max_grad_norm": clip},
    )


def stopped(a_job):
    seen = []
    with pytest.raises(InvariantError) as caught:
        tiny.run(a_job, lambda step, metrics: seen.append((step, metrics)))
    return caught.value, seen


def checkpoint(work):
    return read_json(work / "checkpoints/COMPLETE.json")["step"]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_stops_before_it_reaches_weights_or_checkpoint(
    policy_folder, tmp_path, stage, clip
):
    goal = pairs(policy_folder, poison=True)
    whole, expected = tiny.run(job(policy_folder, pairs(policy_folder), tmp_path / "whole", stage, clip=clip))
    bad = job(policy_folder, goal, tmp_path / "bad", stage, clip=clip)
    error, seen = stopped(bad)
    assert f"the gradient norm of optimiser step {AT} is" in error.what
    assert "every single loss is finite" in error.where
    assert str(goal.poison) in error.where
    assert f"the checkpoint of step {AT - 1} is kept" in error.mend
    assert [step for step, _ in seen] == list(range(1, AT))
    assert checkpoint(tmp_path / "bad") == AT - 1
    assert all(torch.isfinite(values).all() for values in trained_state(bad).values())
    # the same again fails at the same place, from the kept checkpoint
    again, seen = stopped(job(policy_folder, goal, tmp_path / "bad", stage, clip=clip))
    assert str(again) == str(error)
    assert seen == []
    # and what was kept is good: with the example mended it ends where an undisturbed training does
    resumed, state = tiny.run(job(policy_folder, pairs(policy_folder), tmp_path / "bad", stage, clip=clip))
    assert resumed.resumed_at == AT - 1
    assert resumed.log == whole.log
    assert tiny.same_bits(state, expected)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_is_not_finite_names_its_examples(policy_folder, tmp_path, stage):
    goal = pairs(policy_folder)
    guilty = met(policy_folder, goal, 2)
    goal.reference[guilty, 1] = np.nan  # after the check of the cached values
    error, _ = stopped(job(policy_folder, goal, tmp_path, stage))
    assert error.what == f"the loss of optimiser step {AT} is nan"
    assert f"the loss of 1 is not finite (training rows, from 0: {guilty})" in error.where
    assert checkpoint(tmp_path) == AT - 1


@pytest.mark.parametrize("stage", range(4))
def test_a_learning_rate_far_too_high_stops_and_a_lower_one_does_not(policy_folder, tmp_path, stage):
    error, _ = stopped(job(policy_folder, pairs(policy_folder), tmp_path / "high", stage, rate=1e30))
    assert "of optimiser step 2 is" in error.what
    assert "lower the learning rate" in error.mend
    assert checkpoint(tmp_path / "high") == 1
    result, _ = tiny.run(job(policy_folder, pairs(policy_folder), tmp_path / "low", stage, rate=1e-3))
    assert result.log[-1]["step"] == STEPS


@pytest.mark.parametrize("every", [1, 1000])
@pytest.mark.parametrize("stage", range(4))
def test_weights_that_are_not_finite_reach_neither_a_checkpoint_nor_a_result(policy_folder, tmp_path, stage, every):
    # the loss and the gradient of the step are good; its decay of the weights by 3e40 is beyond fp32
    goal = tiny.preference("dpo", tiny.load(policy_folder), count=8)
    settings = {"learning_rate": 3e37, "weight_decay": 1e3}
    machine = {"zero_stage": stage, "checkpoint_every": every}
    only = tiny.job(
        tiny.load(policy_folder), goal, tmp_path, steps=2 if every == 1 else 1, machine=machine, train_settings=settings
    )
    error, _ = stopped(only)
    assert "weight tensors are not finite after optimiser step 1" in error.what
    assert "there is no checkpoint" in error.mend
    assert not (tmp_path / "checkpoints/COMPLETE.json").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_stops_too(policy_folder, tmp_path, stage):
    goal = pairs(policy_folder, poison=True)
    a_job = tiny.job(
        tiny.load(policy_folder, None, torch.bfloat16),
        goal,
        tmp_path,
        steps=STEPS,
        machine={"zero_stage": stage, "checkpoint_every": 1, "dtype": "bf16"},
        starts_at_reference=False,
    )
    error, _ = stopped(a_job)
    assert f"the gradient norm of optimiser step {AT} is" in error.what
    assert checkpoint(tmp_path) == AT - 1


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_a_broken_reference_log_prob_is_refused_before_anything_trains(policy_folder, name):
    goal = tiny.preference(name, tiny.load(policy_folder))
    goal.reference[3] = -np.inf
    with pytest.raises(
        InvariantError, match=r"1 of \d+ examples have a reference log-prob that is not finite"
    ) as found:
        type(goal)(**vars(goal))
    assert "[3]" in found.value.where


def test_a_policy_of_nan_has_no_log_probs(policy_folder):
    model = tiny.load(policy_folder)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(InvariantError, match="log-probs are not finite") as found:
        tiny.logprobs(model, tiny.rows(4, 0))
    assert "test, sequences (from 0): [0, 1, 2, 3]" in found.value.where


def test_a_validation_loss_that_is_not_finite_stops(policy_folder, tmp_path):
    held_out = tiny.preference("dpo", tiny.load(policy_folder), count=4)
    held_out.reference[2] = np.inf
    a_job = tiny.job(tiny.load(policy_folder), pairs(policy_folder), tmp_path, steps=2, validation=held_out)
    error, _ = stopped(a_job)
    assert "the validation loss is" in error.what
    assert "1 of 4 validation rows (from 0): [2]" in error.where
