"""What TrainConfig and HardwareConfig promise: schedule, clipping, decay, recomputation, bf16, validation."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny

from alignbench.config import TrainConfig
from alignbench.engine.train import STEP0_TOLERANCE, validated

pytestmark = pytest.mark.usefixtures("split_parameters")

# Adam without memory moves every weight by the learning rate, which so becomes visible.
SIGN = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_eps": 1e-15}
# With a huge epsilon and learning rate its step is the (clipped) gradient itself.
GRADIENT = SIGN | {"adam_eps": 1e6, "learning_rate": 1e6}


def closed_form(schedule, step, steps, warmup):
    """Learning-rate factor of optimiser step 0, 1, ...: linear warm-up, then decay that would be 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    return {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[schedule]


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(("schedule", "ratio"), [("cosine", 0.25), ("linear", 0.3), ("constant", 0.2), ("linear", 0.0)])
def test_weights_move_by_the_scheduled_learning_rate(tmp_path, schedule, ratio, stage):
    steps, rate, model = 10, 1e-2, tiny.llama()
    weight = model.model.layers[0].mlp.down_proj.weight
    seen = [weight.detach().clone()]
    job = tiny.job(
        model,
        tiny.sft(),
        tmp_path,
        steps=steps,
        machine={"zero_stage": stage},
        train_settings=SIGN | {"learning_rate": rate, "schedule": schedule, "warmup_ratio": ratio},
    )
    result, _ = tiny.run(job, lambda step, metrics: seen.append(weight.detach().clone()))
    moved = [float((b - a).abs().median()) for a, b in itertools.pairwise(seen)]
    expected = [rate * closed_form(schedule, step, steps, math.ceil(ratio * steps)) for step in range(steps)]
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose([entry["learning_rate"] for entry in result.log], expected, rtol=1e-12)


def gradient_of_one_step(work, stage, clip, micro=4):
    before = {name: p.detach().clone() for name, p in tiny.llama().named_parameters()}
    job = tiny.job(
        tiny.llama(),
        tiny.sft(),
        work,
        steps=1,
        machine={"zero_stage": stage, "micro_batch": micro},
        train_settings=GRADIENT | {"max_grad_norm": clip},
    )
    _, after = tiny.run(job)
    return {name: before[name].double() - after[name].double() for name in before}


def norm(state):
    return math.sqrt(sum(float(t.square().sum()) for t in state.values()))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_bounds_the_norm_of_the_whole_steps_gradient(tmp_path, stage):
    free = gradient_of_one_step(tmp_path / "free", stage, clip=0.0)
    assert norm(free) > 0.3
    loose = gradient_of_one_step(tmp_path / "loose", stage, clip=1e3)
    assert norm(loose) == pytest.approx(norm(free), rel=1e-3)
    clipped = gradient_of_one_step(tmp_path / "clipped", stage, clip=0.1)
    assert norm(clipped) == pytest.approx(0.1, rel=1e-2)
    cosine = sum(float((free[n] * clipped[n]).sum()) for n in free) / norm(free) / norm(clipped)
    assert cosine == pytest.approx(1, abs=1e-3)


def test_decay_is_for_matrices_only(tmp_path):
    rate, decay = 1e-2, 0.5
    start = {name: p.detach().clone() for name, p in tiny.llama().named_parameters()}
    states = []
    for value in (0.0, decay):
        changes = {"learning_rate": rate, "weight_decay": value}
        job = tiny.job(tiny.llama(), tiny.sft(), tmp_path / str(value), steps=1, train_settings=changes)
        states.append(tiny.run(job)[1])
    plain, decayed = states
    assert {t.ndim for t in start.values()} == {1, 2}
    for name, weight in start.items():
        expected = -rate * decay * weight if weight.ndim >= 2 else 0 * weight
        assert float((decayed[name] - plain[name] - expected).abs().max()) < 1e-6, name


@pytest.mark.parametrize("lora", [None, replace(tiny.LORA, dropout=0.2)], ids=["full", "lora-dropout"])
@pytest.mark.parametrize("stage", [0, 3])
def test_activation_checkpointing_changes_no_loss(policy_folder, tmp_path, lora, stage):
    curves = []
    for recompute in (False, True):
        model = tiny.load(policy_folder, lora)
        machine = {"activation_checkpointing": recompute, "zero_stage": stage}
        goal = tiny.preference("dpo", tiny.load(policy_folder))
        result, _ = tiny.run(tiny.job(model, goal, tmp_path / str(recompute), lora=lora, machine=machine))
        curves.append(tiny.losses(result))
        assert model.is_gradient_checkpointing is recompute
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-6)
    assert abs(curves[0][-1] - curves[0][0]) > 1e-3


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("lora", [None, tiny.LORA], ids=["full", "lora"])
def test_bf16_trains_and_starts_near_ln2(policy_folder, tmp_path, lora, stage):
    import torch

    half = tiny.load(policy_folder, dtype=torch.bfloat16)
    goal = tiny.preference("dpo", half)
    model = tiny.load(policy_folder, lora, dtype=torch.bfloat16)
    job = tiny.job(model, goal, tmp_path, steps=3, lora=lora, machine={"dtype": "bf16", "zero_stage": stage})
    result, state = tiny.run(job)
    assert result.log[0]["loss"] == pytest.approx(math.log(2), abs=STEP0_TOLERANCE["bf16"][0])
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("stage", range(4))
def test_bf16_keeps_fp32_master_weights(policy_folder, tmp_path, stage):
    """Each step is far below a bf16 weight's spacing: only a sum of 20 in fp32 can move it."""
    import torch

    start = tiny.load(policy_folder, dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in start.named_parameters()}
    train_settings = SIGN | {"learning_rate": 1e-4}
    machine = {"dtype": "bf16", "zero_stage": stage, "micro_batch": 8}
    job = tiny.job(start, tiny.sft(count=8), tmp_path, steps=20, machine=machine, train_settings=train_settings)
    _, after = tiny.run(job)
    large = {name: (p.abs() > 0.5) & (p.abs() < 0.9) for name, p in before.items()}  # spacing 2e-3 there
    moved = sum(int((after[name] != before[name])[mask].sum()) for name, mask in large.items())
    assert moved > 0.1 * sum(int(mask.sum()) for mask in large.values())


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_validation_moves_neither_order_nor_dropout(policy_folder, tmp_path, name, stage):
    lora = replace(tiny.LORA, dropout=0.3)
    logs, states = [], []
    for every in (0, 1):
        reference = tiny.load(policy_folder)
        changes = (
            {"validation": tiny.preference(name, reference, seed=70, count=5), "evaluate_every": 1} if every else {}
        )
        job = tiny.job(
            tiny.load(policy_folder, lora),
            tiny.preference(name, reference),
            tmp_path / str(every),
            lora=lora,
            machine={"zero_stage": stage},
            **changes,
        )
        result, state = tiny.run(job)
        logs.append(result.log)
        states.append(state)
    without = [{k: v for k, v in entry.items() if not k.startswith("validation_")} for entry in logs[1]]
    assert without == logs[0]
    assert tiny.same_bits(*states)
    values = [entry["validation_loss"] for entry in logs[1]]
    assert len(set(values)) == len(values) > 1


def test_validation_is_the_plain_mean_over_the_held_out_examples(policy_folder, tmp_path):
    held_out = tiny.sft(count=7, seed=80)
    job = tiny.job(tiny.load(policy_folder), tiny.sft(), tmp_path, steps=5, validation=held_out, evaluate_every=2)
    result, _ = tiny.run(job)
    assert [int(e["step"]) for e in result.log if "validation_loss" in e] == [2, 4, 5]
    nll = -tiny.logprobs(job.policy.eval(), held_out.examples).sum()
    assert result.log[-1]["validation_loss"] == pytest.approx(
        nll / sum(row.response_length for row in held_out.examples), abs=1e-5
    )


def test_validation_of_some_examples_is_of_the_same_ones_at_every_step(policy_folder, tmp_path):
    held_out = tiny.sft(count=40, seed=80)
    settings = {"validation": held_out, "evaluate_every": 2, "evaluate_examples": 9}
    job = tiny.job(tiny.load(policy_folder), tiny.sft(), tmp_path, steps=4, **settings)
    asked = []
    held_out.rows = lambda i, rows=held_out.rows: (asked.append(i), rows(i))[1]
    tiny.run(job)
    assert asked[:9] == asked[9:] == sorted(set(asked))
    assert len(asked) == 18
    assert max(asked) > 9, "drawn, not the first ones"


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(5, 2, {2, 4, 5}), (124, 60, {60, 124}), (151, 60, {60, 120, 151}), (120, 60, {60, 120}), (31, 60, {31}),
     (7, 0, {7}), (3, 1, {1, 2, 3})],
)  # fmt: skip
def test_the_last_validation_stands_for_one_shortly_before(steps, every, expected):
    assert validated(steps, every) == expected


def test_the_optimiser_is_the_configured_adamw(tmp_path):
    """Three steps equal torch's AdamW driven by hand on the same batches."""
    import torch

    from alignbench.engine.batching import example_order

    goal, config = tiny.sft(count=16), TrainConfig(3e-3, 1.5, 8, "constant", 0.0, 0.1, 0.0, 0.8, 0.95, 1e-6)
    job = replace(tiny.job(tiny.llama(), goal, tmp_path, steps=3), settings=config)
    result, state = tiny.run(job)
    model = tiny.llama()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    for step, indices in enumerate(example_order(16, 3, 8, 3)):
        examples = [goal.examples[i] for i in indices]
        loss = 0
        for row in examples:
            logprobs = torch.log_softmax(model(torch.tensor([list(row.ids)])).logits[0].double(), -1)
            loss = loss - sum(logprobs[t - 1, row.ids[t]] for t in range(row.prompt_length, len(row.ids)))
        loss = loss / sum(row.response_length for row in examples)
        assert result.log[step]["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert tiny.distance(state, {name: p.detach() for name, p in model.named_parameters()}) < 1e-4
