"""Gradient accumulation: eight micro-batches of one are one micro-batch of eight.

The optimiser runs in its linear regime (a huge epsilon), where weights follow the gradient's size; Adam's usual
step would hide a gradient that is off by a factor.
"""

import numpy as np
import pytest
import tiny

LINEAR = {"adam_eps": 1e3, "learning_rate": 30.0, "adam_beta1": 0.0, "adam_beta2": 0.0}
CASES = {
    "sft": lambda reference: tiny.sft(count=16, seed=4, response=(1, 50)),
    "dpo": lambda reference: tiny.preference("dpo", reference),
    "kto": lambda reference: tiny.preference("kto", reference),
}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_batch_1_x_accumulate_8_is_batch_8_x_1(policy_folder, tmp_path, name, stage):
    goal = CASES[name](tiny.load(policy_folder))
    results = []
    for micro in (1, 2, 8):
        job = tiny.job(
            tiny.load(policy_folder),
            goal,
            tmp_path / str(micro),
            steps=6,
            machine={"micro_batch": micro, "zero_stage": stage},
            train_settings=LINEAR,
        )
        results.append(tiny.run(job))
    whole, state = results[-1]
    assert abs(tiny.losses(whole)[-1] - tiny.losses(whole)[0]) > 1e-2
    for result, weights in results[:-1]:
        np.testing.assert_allclose(tiny.losses(result), tiny.losses(whole), atol=1e-5)
        assert tiny.distance(weights, state) < 1e-5
    if name == "kto":
        kl = [[entry["kl_estimate"] for entry in result.log] for result, _ in results]
        assert max(kl[-1]) > 1e-3
        np.testing.assert_allclose(kl[0], kl[-1], atol=1e-5)


def test_sft_weighs_tokens_not_sequences(policy_folder, tmp_path):
    goal = tiny.sft(count=8, seed=4, response=(1, 50))
    lengths = np.array([row.response_length for row in goal.examples])
    assert lengths.max() > 8 * lengths.min()
    nll = -tiny.logprobs(tiny.load(policy_folder), goal.examples)
    result, _ = tiny.run(tiny.job(tiny.load(policy_folder), goal, tmp_path, steps=1, machine={"micro_batch": 1}))
    assert result.log[0]["loss"] == pytest.approx(nll.sum() / lengths.sum(), abs=1e-5)
    assert abs((nll / lengths).mean() - nll.sum() / lengths.sum()) > 1e-3


def test_cost_counts_every_trained_token(policy_folder, tmp_path):
    from alignbench.engine.train import train

    goal, cost = tiny.sft(count=8), {}
    train(tiny.job(tiny.load(policy_folder), goal, tmp_path, steps=3), cost, lambda step, metrics: None)
    assert cost["trained_tokens"] == 3 * sum(len(row.ids) for row in goal.examples)
    assert cost["optimizer_steps"] == 3
    assert cost["peak_rss_bytes"] > 0
