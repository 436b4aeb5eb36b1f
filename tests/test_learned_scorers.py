"""A run that needs no downloaded scorer trains a reward and a cost model, uses them, and says what they are worth."""

import numpy as np
import pytest
import torch
from tiny_runs import plan, run

from alignbench.models import score_models as models
from alignbench.models.policy import load_tokenizer

# a few passes in small steps: what is learned here is little, but something
SETTINGS = (
    "experiment=learned/mocan",
    "method.multipliers=[0.5]",
    "method.dual.samples=4",
    "scorers.learned.train.batch_size=8",
    "scorers.learned.train.epochs=4",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    return run(folder / "store", folder / "out", *SETTINGS)


def test_the_graph_trains_on_labelled_pairs_from_the_reference(tmp_path):
    _, _, _, nodes = plan(tmp_path, *SETTINGS)
    reward, cost = nodes["reward model learned for reward"], nodes["cost model learned for safety"]
    for node, objective in ((reward, "reward"), (cost, "safety")):
        assert node.inputs == {"start": nodes["sft"], "pairs": nodes["label pairs"]}
        assert node.identity.spec.objective == objective
        assert (node.identity.spec.tokens.template, node.identity.spec.tokens.append_eos) == ("plain", True)
    bank = nodes["score sample bank"]
    assert list(bank.inputs.values()) == [nodes["sample bank"], reward, cost]
    assert [(c.name, c.larger_is) for c in bank.identity.spec.columns] == [("reward", "better"), ("safety", "worse")]
    assert nodes["bernoulli labels for mocan"].inputs["scores"] is nodes["score pairs with learned"]
    # gold stays the judge
    assert nodes["score mocan"].identity.spec.scorer == "gold"


def by_hand(folder, rows):
    """Scores of (prompt, response) texts from the folder's tensors, one at a time, without the packed engine."""
    model, tokenizer = models.load_score_model(folder, torch.float32, torch.device("cpu")), load_tokenizer(folder)
    found = []
    for prompt, response in rows:
        ids = [*tokenizer(f"{prompt}\n{response}")["input_ids"], tokenizer.eos_token_id][:112]  # the model's max_length
        with torch.no_grad():
            found.append(float(model.score_head(model.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0]))
    return np.array(found)


def test_the_columns_are_the_trained_models_scores_and_minus_costs(done):
    pairs = done.artifact("label pairs").jsonl("pairs.jsonl")
    scores = done.artifact("score pairs with learned").jsonl("scores.jsonl")
    texts = [(row["prompt"], row[f"response_{k}"]) for row in pairs for k in (0, 1)]
    reward = by_hand(done.artifact("reward model learned for reward").path("scorer"), texts)
    cost = by_hand(done.artifact("cost model learned for safety").path("scorer"), texts)
    np.testing.assert_allclose(np.array([row["reward"] for row in scores]).reshape(-1), reward, atol=1e-5)
    np.testing.assert_allclose(np.array([row["safety"] for row in scores]).reshape(-1), -cost, atol=1e-5)
    assert reward.std() > 1e-3
    assert cost.std() > 1e-3


def test_validation_pairs_train_nothing_and_are_reported(done):
    pairs = done.artifact("label pairs").jsonl("pairs.jsonl")
    counts = {split: sum(row["split"] == split for row in pairs) for split in ("train", "validation")}
    for label in ("reward model learned for reward", "cost model learned for safety"):
        assert done.record["data"][f"{label}: truncation"]["n"] == counts["train"]
        log = done.artifact(label).jsonl("log.jsonl")
        assert "validation_accuracy" in log[-1]
    found = done.record["scorers"]["learned"]
    assert list(found) == ["reward", "safety"]
    for split, count in counts.items():
        assert found["reward"][split]["pairs"] == found["safety"][split]["pairs"] == count
    assert "sign_accuracy" in found["safety"]["validation"]
    last = done.artifact("cost model learned for safety").jsonl("log.jsonl")[-1]
    assert last["validation_sign_accuracy"] == pytest.approx(found["safety"]["validation"]["sign_accuracy"]["mean"])
    assert last["validation_accuracy"] == pytest.approx(found["safety"]["validation"]["accuracy"]["mean"])


def test_one_model_is_in_memory_while_one_is_trained(done):
    assert done.record["cost"]["models_in_memory_while_training"] == 1


def test_proxy_and_gold_gains_stand_side_by_side(done):
    course = done.record["over_optimisation"]["learned"]
    assert list(course) == ["sft", "mocan"]
    start, end = course["sft"], course["mocan"]
    assert start["kl"]["mean"] == 0
    for column in ("reward", "safety"):
        assert (
            start["columns"][column]["proxy"]["gain"]["mean"] == start["columns"][column]["gold"]["gain"]["mean"] == 0
        )
        row = done.record["rows"]["mocan"]["metrics"]
        assert end["columns"][column]["gold"]["mean"]["mean"] == pytest.approx(row[column]["mean"])
        assert end["columns"][column]["gold"]["gain"]["mean"] == pytest.approx(row[f"{column}_gain"]["mean"])
    scores = done.artifact("score mocan by learned").jsonl("scores.jsonl")
    assert end["columns"]["safety"]["proxy"]["mean"]["mean"] == pytest.approx(np.mean([s["safety"] for s in scores]))
    assert end["kl"]["mean"] == pytest.approx(done.record["rows"]["mocan"]["metrics"]["kl"]["mean"])
    assert {"calibration.png", "over_optimisation.png"} <= {path.name for path in done.folder.iterdir()}


def test_evaluating_by_what_was_learned_computes_only_that(done, tmp_path):
    store = done.copied(tmp_path / "store")
    again = run(store, tmp_path / "out", *SETTINGS, "evaluate=learned")
    assert set(again.built) == {"evaluate sft", "evaluate mocan"}
    assert again.record["over_optimisation"] == done.record["over_optimisation"]
    proxy = done.record["over_optimisation"]["learned"]["mocan"]["columns"]["reward"]["proxy"]["mean"]["mean"]
    assert again.record["rows"]["mocan"]["metrics"]["reward"]["mean"] == pytest.approx(proxy)


def test_a_run_by_gold_alone_has_none_of_it(tmp_path):
    _, _, _, nodes = plan(tmp_path, "method=mocan", "method.dual.samples=4")
    assert not [label for label in nodes if "learned" in label]


@pytest.mark.slow
def test_two_ranks_train_and_score_the_same(done, tmp_path):
    scored = ("score sample bank", "score pairs with learned")
    again = ("reward model learned for reward", "cost model learned for safety", *scored)
    store = done.copied(tmp_path / "store", without=again)
    two = run(store, tmp_path / "out", *SETTINGS, "hardware.processes=2")
    assert set(again) <= set(two.built)
    for label in scored:
        ours, theirs = (
            np.array([[*np.ravel(list(row.values()))] for row in r.artifact(label).jsonl("scores.jsonl")])
            for r in (two, done)
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
