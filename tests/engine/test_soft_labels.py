"""Soft labels and offsets in the pair objective: exact at the reference, refused where they mean nothing."""

import math

import numpy as np
import pytest
import tiny
import torch

from alignbench.engine.objectives import StepContext
from alignbench.errors import ConfigError, InvariantError

COUNT = 16


def goal(reference, name="dpo", **changes):
    made = tiny.preference(name, reference, count=COUNT)
    return type(made)(made.chosen, made.rejected, made.reference, made.name, made.beta, **changes)


def draws(seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 1, COUNT), rng.normal(0, 2, COUNT)


def softplus(x):
    return np.logaddexp(0.0, x)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_step_0_has_its_exact_value(policy_folder, tmp_path, soft, shifted):
    wrong, offset = draws()
    objective = goal(tiny.load(policy_folder), wrong=wrong if soft else None, offset=offset if shifted else None)
    w, o = wrong * soft, offset * shifted
    expected = (1 - w) * softplus(o) + w * softplus(-o)
    np.testing.assert_allclose(objective.reference_value(np.arange(COUNT)), expected, rtol=1e-12)
    result, _ = tiny.run(tiny.job(tiny.load(policy_folder), objective, tmp_path, steps=2, batch_size=COUNT))
    assert result.log[0]["loss"] == pytest.approx(expected.mean(), abs=1e-6)
    assert result.log[1]["loss"] < result.log[0]["loss"]
    if not shifted:
        assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_rows_of_another_order_are_still_refused(policy_folder, tmp_path):
    wrong, offset = draws()
    objective = goal(tiny.load(policy_folder), wrong=wrong, offset=offset)
    objective.reference = np.roll(objective.reference, 1, axis=0)
    with pytest.raises(InvariantError, match="step-0 loss"):
        tiny.run(tiny.job(tiny.load(policy_folder), objective, tmp_path))


def test_soft_losses_and_metrics_are_expectations_over_the_hard_ones(policy_folder):
    wrong, offset = draws(1)
    reference = tiny.load(policy_folder)
    soft = goal(reference, wrong=wrong, offset=offset)
    kept = goal(reference, offset=offset)
    swapped = type(kept)(kept.rejected, kept.chosen, kept.reference[:, ::-1], "dpo", kept.beta, offset=-offset)
    moved = tiny.llama(seed=3)
    logprobs = torch.as_tensor(
        np.stack([tiny.logprobs(moved, kept.chosen), tiny.logprobs(moved, kept.rejected)], 1), dtype=torch.float64
    )
    everything = np.arange(COUNT)
    value, metrics = soft.loss(logprobs, everything, StepContext())
    first, right = kept.loss(logprobs, everything, StepContext())
    second, reverse = swapped.loss(logprobs.flip(1), everything, StepContext())
    p = torch.as_tensor(wrong, dtype=torch.float32)
    torch.testing.assert_close(value, (1 - p) * first + p * second)
    for name in ("margin", "accuracy"):
        torch.testing.assert_close(metrics[name], (1 - p) * right[name] + p * reverse[name])
    assert right["accuracy"].sum() not in (0, COUNT)


def test_hard_probabilities_are_hard_labels(policy_folder):
    reference, moved = tiny.load(policy_folder), tiny.llama(seed=3)
    hard = goal(reference)
    soft = goal(reference, wrong=np.zeros(COUNT), offset=np.zeros(COUNT))
    logprobs = torch.as_tensor(np.stack([tiny.logprobs(moved, side) for side in (hard.chosen, hard.rejected)], 1))
    for one, other in zip(
        hard.loss(logprobs, np.arange(COUNT), StepContext()),
        soft.loss(logprobs, np.arange(COUNT), StepContext()),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "ipo", "wrong": np.zeros(COUNT)}, "wrong .soft labels. with the loss 'ipo'"),
        ({"name": "ipo", "offset": np.zeros(COUNT)}, "offset with the loss 'ipo'"),
        ({"wrong": np.zeros(COUNT - 1)}, "has shape"),
        ({"offset": np.zeros((COUNT, 1))}, "has shape"),
        ({"wrong": np.full(COUNT, 1.1)}, r"outside \[0, 1\]"),
        ({"wrong": np.full(COUNT, np.nan)}, "not finite"),
        ({"offset": np.full(COUNT, np.inf)}, "not finite"),
    ],
)
def test_what_makes_no_sense_is_refused(policy_folder, change, says):
    with pytest.raises(ConfigError, match=says):
        goal(tiny.load(policy_folder), **change)
