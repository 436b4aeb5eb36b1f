"""Reward and cost models: their losses are Safe RLHF's, packed training is padded training, and they learn."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_packing import FAMILIES, groups

from alignbench import losses
from alignbench.engine import packing
from alignbench.engine.attention import PADDED, SDPA
from alignbench.engine.batching import Row
from alignbench.engine.objectives import StepContext
from alignbench.engine.score_objectives import ScoreObjective
from alignbench.engine.scores import EndScores, sequence_scores
from alignbench.errors import ConfigError, InvariantError
from alignbench.models import policy as policies
from alignbench.models import score_models as models

FINITE = st.floats(-30, 30)


def objective(kind="cost", count=16, seed=0, regularization=0.001, shared=True):
    """Pairs of random rows with random safety flags; `shared=False` says of no row that it has a prompt."""
    chosen, rejected = tiny.pair_rows(count, seed)
    if not shared:
        chosen, rejected = ([Row(row.ids, 0) for row in rows] for rows in (chosen, rejected))
    unsafe = np.random.default_rng(seed).random((count, 2)) < 0.5 if kind == "cost" else None
    return ScoreObjective(chosen, rejected, unsafe, regularization, kind)


def fresh(folder, kind="cost", scale=0.3):
    """A score model with an opinion."""
    model = models.fresh_score_model(folder, torch.float32, tiny.CPU, kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(model.score_head.weight, std=scale)
        torch.nn.init.normal_(model.score_head.bias, std=scale)
    return model


def job(model, goal, work, *, starts_at_reference=False, **changes):
    return tiny.job(model, goal, work, reads=EndScores, starts_at_reference=starts_at_reference, **changes)


# ---------------------------------------------------------------- the losses


@given(FINITE, FINITE, st.booleans(), st.booleans(), st.floats(0, 1))
def test_the_losses_are_safe_rlhf_s(preferred, other, unsafe_preferred, unsafe_other, weight):
    row = [Row([5, 6], 1)]
    scores = torch.tensor([[preferred, other]], dtype=torch.float64)

    def loss(unsafe):
        goal = ScoreObjective(row, row, unsafe, weight)
        return float(goal.loss(scores, np.array([0]), StepContext())[0])

    def minus_log_sigmoid(x):
        return math.log1p(math.exp(-x)) if x > -30 else -x

    preferred, other = np.float32(preferred), np.float32(other)
    squares = weight * (float(preferred) ** 2 + float(other) ** 2) / 2
    assert loss(None) == pytest.approx(minus_log_sigmoid(float(preferred) - float(other)) + squares, rel=1e-5, abs=1e-5)
    signs = [1 if unsafe else -1 for unsafe in (unsafe_preferred, unsafe_other)]
    cost = (
        minus_log_sigmoid(float(other) - float(preferred))
        + minus_log_sigmoid(signs[0] * float(preferred))
        + minus_log_sigmoid(signs[1] * float(other))
    )
    assert loss(np.array([[unsafe_preferred, unsafe_other]])) == pytest.approx(cost + squares, rel=1e-5, abs=1e-5)


def test_the_sign_loss_wants_unsafe_above_zero():
    cost = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    losses.unsafe_sign(cost, torch.tensor([True, True])).sum().backward()
    assert cost.grad.tolist() == pytest.approx([-1 / (1 + math.exp(2)), -1 / (1 + math.exp(-2))])


def test_metrics_are_shares_of_right_orders_and_signs():
    row = [Row([5, 6], 1)] * 3
    unsafe = np.array([[False, True], [True, True], [False, False]])
    scores = torch.tensor([[-1.0, 2.0], [3.0, 1.0], [0.0, 0.0]])
    _, cost = ScoreObjective(row, row, unsafe).loss(scores, np.arange(3), StepContext())
    assert cost["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert cost["sign_accuracy"].tolist() == [1.0, 1.0, 0.5]
    _, reward = ScoreObjective(row, row).loss(scores, np.arange(3), StepContext())
    assert reward["accuracy"].tolist() == [0.0, 1.0, 0.5]
    assert "sign_accuracy" not in reward


def test_flags_of_another_shape_are_refused():
    with pytest.raises(ConfigError, match="one flag per response"):
        ScoreObjective([Row([5, 6], 1)], [Row([5, 7], 1)], np.array([True]))


@pytest.mark.parametrize(("kind", "value"), [("reward", math.log(2)), ("cost", 3 * math.log(2))])
def test_without_an_opinion_the_loss_is_that_of_a_coin(policy_folder, kind, value):
    model = models.fresh_score_model(policy_folder, torch.float32, tiny.CPU, kind)
    goal = objective(kind)
    work = packing.prepare([row for i in range(16) for row in goal.rows(i)], tiny.PAD, SDPA)
    scores = EndScores(model, tiny.hardware())(work).view(16, 2)
    found, _ = goal.loss(scores, np.arange(16), StepContext())
    np.testing.assert_allclose(found.detach(), value, rtol=1e-6)


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize(("kind", "value"), [("reward", math.log(2)), ("cost", 3 * math.log(2))])
@pytest.mark.usefixtures("split_parameters")
def test_training_starts_from_no_opinion_or_not_at_all(policy_folder, tmp_path, kind, value, stage, lora):
    def start(bias, weight=0.0):
        model = models.fresh_score_model(policy_folder, torch.float32, tiny.CPU, kind)
        torch.nn.init.constant_(model.score_head.weight, weight)
        torch.nn.init.constant_(model.score_head.bias, bias)
        model = model if lora is None else policies.add_lora(model, lora, seed=5)
        machine = {"zero_stage": stage}
        work = tmp_path / f"{bias}-{weight}"
        return job(model, objective(kind), work, starts_at_reference=True, steps=1, lora=lora, machine=machine)

    result, _ = tiny.run(start(0.0))
    assert result.log[0]["loss"] == pytest.approx(value, abs=1e-6)
    with pytest.raises(InvariantError, match=rf"theory demands {value:.8f}"):
        tiny.run(start(0.0, weight=0.01))
    if kind == "cost":  # a reward's loss knows no level
        with pytest.raises(InvariantError, match="step-0 loss"):
            tiny.run(start(0.05))


# ---------------------------------------------------------------- packed, padded, shared, separate


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_shared_scores_are_padded_and_separate_ones(name, tmp_path):
    model = models.fresh_score_model(tiny.save(FAMILIES[name](), tmp_path / "p"), torch.float32, tiny.CPU, "cost")
    torch.nn.init.normal_(model.score_head.weight)
    rows = groups(6, 1)
    apart = [Row(row.ids, 0) for row in rows]
    found = []
    for attention, sequences in ((PADDED, rows), (SDPA, rows), (SDPA, apart)):
        machine = tiny.hardware(attention=attention, eval_batch=7)
        found.append(
            sequence_scores(
                EndScores(model, machine), sequences, pad_id=tiny.PAD, hardware=machine, device=tiny.CPU, label="x"
            )
        )
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)
    assert found[0].std() > 1


def loss_and_gradients(model, goal, kind):
    model = copy.deepcopy(model)
    work = packing.prepare([row for i in range(len(goal)) for row in goal.rows(i)], tiny.PAD, kind)
    scores = EndScores(model, tiny.hardware(attention=kind))(work).view(len(goal), 2)
    values, _ = goal.loss(scores, np.arange(len(goal)), StepContext())
    values.mean().backward()
    return values.detach().numpy(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["reward", "cost"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_shared_is_padded_and_separate_in_loss_and_gradients(name, kind, tmp_path):
    model = fresh(tiny.save(FAMILIES[name](), tmp_path / "p"), kind)
    padded = loss_and_gradients(model, objective(kind), PADDED)
    for goal in (objective(kind), objective(kind, shared=False)):
        found = loss_and_gradients(model, goal, SDPA)
        np.testing.assert_allclose(found[0], padded[0], atol=1e-5, rtol=1e-5)
        assert found[1].keys() == padded[1].keys()
        for key, gradient in padded[1].items():
            scale = float(gradient.abs().max())
            # a reward's loss knows no level, so the head's bias gets rounding alone
            if key == "score_head.bias" and kind == "reward":
                continue
            assert scale > 0, key
            assert float((gradient - found[1][key]).abs().max()) <= 1e-4 * scale, key
    assert np.std(padded[0]) > 0.1


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_micro_batches_and_layouts_train_the_same_model(policy_folder, tmp_path, lora):
    states = []
    for k, machine in enumerate(({"micro_batch": 8}, {"micro_batch": 1}, {"attention": "padded", "micro_batch": 3})):
        model = fresh(policy_folder)
        model = model if lora is None else policies.add_lora(model, lora, seed=5)
        _, state = tiny.run(job(model, objective(), tmp_path / str(k), machine=machine, lora=lora))
        states.append(state)
    assert max(tiny.distance(states[0], other) for other in states[1:]) < 2e-5
    start = dict((fresh(policy_folder) if lora is None else model).named_parameters())
    if lora is None:
        assert tiny.distance(states[0], {n: p.detach() for n, p in start.items()}) > 1e-3
    else:
        assert {n.split(".modules_to_save")[0] for n in states[0] if "score_head" in n} == {
            "base_model.model.score_head"
        }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.usefixtures("split_parameters")
def test_zero_stages_train_the_same_model(policy_folder, tmp_path, stage):
    found = [
        tiny.run(job(fresh(policy_folder), objective(), tmp_path / str(k), machine={"zero_stage": k}))[1]
        for k in (0, stage)
    ]
    assert tiny.distance(*found) < 2e-5


@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_what_is_saved_is_what_was_trained(policy_folder, tmp_path, lora):
    """Trained, put back together and loaded from a folder, it gives the scores of the model in memory."""

    def load(folder, dtype, device):
        return models.fresh_score_model(folder, dtype, device, "cost")

    model = load(policy_folder, torch.float32, tiny.CPU)
    model = model if lora is None else policies.add_lora(model, lora, seed=5)
    goal = objective()
    _, state = tiny.run(job(model, goal, tmp_path / "work", lora=lora))
    rows = [row for i in range(16) for row in goal.rows(i)]
    work = packing.prepare(rows, tiny.PAD, SDPA)
    with torch.inference_mode():
        wanted = EndScores(model.eval(), tiny.hardware())(work)
        policies.save_policy(
            policies.restore_weights(policy_folder, state, lora, load), tiny.tokenizer(), tmp_path / "s"
        )
        models.check_format(tmp_path / "s", "beaver", "x")
        found = EndScores(models.load_score_model(tmp_path / "s", torch.float32, tiny.CPU), tiny.hardware())(work)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert wanted.std() > 1e-3


def test_a_killed_training_continues_to_the_same_bits(policy_folder, tmp_path):
    machine = {"checkpoint_every": 2}
    _, whole = tiny.run(job(fresh(policy_folder), objective(), tmp_path / "a", steps=6, machine=machine))

    def die(step, metrics):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.run(job(fresh(policy_folder), objective(), tmp_path / "b", steps=6, machine=machine), die)
    result, resumed = tiny.run(job(fresh(policy_folder), objective(), tmp_path / "b", steps=6, machine=machine))
    assert result.resumed_at == 4
    assert tiny.same_bits(whole, resumed)


def test_a_cost_model_learns_what_is_unsafe(policy_folder, tmp_path):
    """Responses with one token are unsafe, and less so the earlier they end: orders and signs are both learned."""
    rng = np.random.default_rng(0)

    def row(prompt, unsafe):
        body = rng.integers(20, 60, 4).tolist()
        return Row([*prompt, *body, 9 if unsafe else 8, tiny.EOS], len(prompt))

    prompts = [rng.integers(100, 200, 3).tolist() for _ in range(48)]
    safer = rng.random(48) < 0.5
    flags = np.array([[False, True] if mixed else [True, True] for mixed in safer])
    goal = ScoreObjective(
        [row(p, f[0]) for p, f in zip(prompts, flags, strict=True)],
        [row(p, f[1]) for p, f in zip(prompts, flags, strict=True)],
        flags,
        name="cost",
    )
    model = models.fresh_score_model(policy_folder, torch.float32, tiny.CPU, "cost")
    result, _ = tiny.run(job(model, goal, tmp_path, starts_at_reference=True, steps=60, validation=goal, batch_size=16))
    last = result.log[-1]
    assert result.log[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-6)
    assert last["validation_sign_accuracy"] > 0.97
    assert last["validation_loss"] < 1.0
