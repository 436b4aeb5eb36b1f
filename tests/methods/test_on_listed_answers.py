"""Methods where every answer is listed: exact banks, draws, and a certificate that is recomputed here by plain sums."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from method_runs import needed
from safetensors.numpy import load_file
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from tiny_runs import Run, plan, run

LISTED = (
    "debug=tiny",
    "hardware.threads=1",
    "dataset.world.answers=8",
    "dataset.world.demonstrations=1200",
    "model.sft.epochs=3",
    "model.sft.learning_rate=1e-2",
)
BETA, MARGIN = 0.3, 0.2


@pytest.fixture(scope="module")
def mocan(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("listed")
    return run(folder / "store", folder / "out", "experiment=certificate/mocan", base=LISTED)


def table(made: Run, split: str, policy: str) -> dict[str, np.ndarray]:
    """Reward, safety and log-probs renormalised on the list, (prompts, 8 answers)."""
    scores = made.artifact(f"score list answers, {split}").jsonl("scores.jsonl")
    raw = load_file(made.artifact(f"log-probs of {policy} on the list, {split}").path("responses.safetensors"))
    logprobs = raw["response"].reshape(-1, 8)
    found = {name: np.array([row[name] for row in scores]).reshape(-1, 8) for name in ("reward", "safety")}
    mass = logsumexp(logprobs, axis=1, keepdims=True)
    return found | {"log": logprobs - mass, "mass": np.exp(mass)}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_certificate_is_what_plain_sums_say(mocan: Run, split: str) -> None:
    # the reference's log-probs on the training list are the bank's
    base = table(mocan, split, "bank" if split == "train" else "sft")
    own = table(mocan, split, "mocan")
    found = mocan.record["rows"]["mocan"]["certificate"][split]

    def mean(log: np.ndarray, name: str) -> float:
        return float((np.exp(log) * base[name]).sum(1).mean())

    kl = float((np.exp(own["log"]) * (own["log"] - base["log"])).sum(1).mean())
    assert found["kl"] == pytest.approx(kl, abs=1e-9)
    assert found["reward"] == pytest.approx(mean(own["log"], "reward"), abs=1e-9)
    assert found["margins"]["safety"] == pytest.approx(mean(own["log"], "safety") - mean(base["log"], "safety"))
    assert found["objective"] == pytest.approx(mean(own["log"], "reward") - BETA * kl)
    assert found["mass"]["mean"] == pytest.approx(own["mass"].mean())

    floor = mean(base["log"], "safety") + MARGIN

    def dual(lam: float) -> float:
        inner = logsumexp(base["log"] + (base["reward"] + lam * base["safety"]) / BETA, axis=1).mean()
        return float(BETA * inner - lam * floor)

    best = minimize_scalar(dual, bounds=(0, 100), method="bounded", options={"xatol": 1e-10})
    assert best.x > 0.01
    assert found["optimum_multipliers"]["safety"] == pytest.approx(best.x, abs=1e-5)
    assert found["optimum_objective"] == pytest.approx(best.fun, abs=1e-9)
    assert found["optimality_gap"] == pytest.approx(best.fun - found["objective"], abs=1e-9)
    given = mocan.record["rows"]["mocan"]["multipliers"]["safety"]
    assert found["primal_dual_gap"] == pytest.approx(dual(given) - found["objective"], abs=1e-9)
    assert found["lambda_error"]["safety"] == pytest.approx(abs(given - best.x), abs=1e-5)


@pytest.mark.slow
def test_on_its_own_prompts_the_dual_is_exact(mocan: Run) -> None:
    """No sampling stands between the bank and the optimum: lambda* of the training prompts is the method's lambda."""
    assert mocan.record["rows"]["mocan"]["certificate"]["train"]["lambda_error"]["safety"] < 1e-8
    assert "sample bank" not in mocan.labels


def test_every_policy_gets_a_certificate_on_both_splits(tmp_path: Path) -> None:
    _, _, evaluations, nodes = plan(tmp_path, "experiment=certificate/mocaid", base=LISTED)
    certified = {label for label in nodes if label.startswith("certify")}
    assert certified == {f"certify {row}, {split}" for row in evaluations for split in ("train", "test")}
    bank = nodes["dual"].inputs
    assert bank["weights"].inputs["policy"] is nodes["sft"]
    assert bank["responses"] is bank["weights"].inputs["rows"] is nodes["list answers, train"]
    # what an iterate is measured on is its own exact distribution, on the same answers
    slack = nodes["slack mocaid 2"].inputs
    assert slack["weights"].inputs["policy"] is nodes["prefer mocaid 2"]
    assert slack["responses"] is slack["reference_responses"] is bank["responses"]
    assert slack["reference_weights"] is bank["weights"]


@pytest.mark.slow
def test_offline_pairs_leave_out_what_is_uncovered_and_online_ones_find_it(tmp_path: Path) -> None:
    made = run(
        tmp_path / "store",
        tmp_path / "out",
        "experiment=certificate/online",
        "dataset.world.uncovered=[caution]",
        "method.rounds=2",
        base=LISTED,
    )
    listed = made.artifact("list answers, train and validation").jsonl("responses.jsonl")
    careful = {row["response"] for row in listed if "caution" in row["features"]}
    offline = made.artifact("label pairs").jsonl("pairs.jsonl")
    fresh = made.artifact("label online 1").jsonl("pairs.jsonl")
    texts = [{row[f"response_{k}"] for row in rows for k in (0, 1)} for rows in (offline, fresh)]
    assert careful
    assert not careful & texts[0]
    assert careful & texts[1]
    joined = made.artifact("join online 1").jsonl("pairs.jsonl")
    assert len(joined) == len(offline) + len(fresh)
    # the preset draws from the tilted policy: what it kept is among the candidates, and less known than they are
    tilt = made.artifact("tilt online 1")
    candidates = {(row["prompt"], row["response"]) for row in needed(made, "tilt online 1", "responses").jsonl(
        "responses.jsonl"
    )}  # fmt: skip
    assert {(row["prompt"], row["response_0"]) for row in fresh} <= candidates
    assert tilt.json("summary.json")["mean_bonus_kept"] > tilt.json("summary.json")["mean_bonus"]
    assert made.record["cost"]["models_in_memory_while_training"] == 1
