"""A small sweep made by hand, with everything that pictures read: `from sweep_records import write_sweep`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from compare_records import write_run

from alignbench import dual, dual_geometry
from alignbench.lab_judge import rated
from alignbench.report.calibration import reliability

METHODS = ("mocan", "mocaid", "sacpo")
ASKED = (0.1, 0.3)
SEEDS = (0, 1)


def a_bank(seed: int = 0, prompts: int = 30, responses: int = 16) -> dual.Bank:
    """Normal scores in conflict: what is rewarded is unsafe."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, responses))
    safety = -0.5 * reward + rng.normal(size=(prompts, responses))
    weights = np.full((prompts, responses), -np.log(responses))
    return dual.Bank(tuple(map(str, range(prompts))), ("safety",), reward, safety[..., None], weights)


def geometry(seed: int, asked: float) -> dict[str, Any]:
    """What the stage writes, of `a_bank`."""
    bank = a_bank(seed)
    solution = dual.solve(bank, 0.5, [asked])
    return {
        "label": "dual",
        "artifact": f"dual-{seed}-{asked}",
        "beta": 0.5,
        "prompts": 30,
        "responses": 480,
        "requested_margin": {"safety": asked},
        "multipliers": solution.named(),
        "value": solution.value,
        "standard_errors": {"safety": float(solution.standard_errors[0])},
        "course": dual_geometry.course(bank, solution, points=9),
        "sample_effect": dual_geometry.sample_effect(bank, solution, seed=0, draws=4),
    }


def write_sweep(out: Path) -> list[dict[str, Any]]:
    """Three methods at two thresholds with two seeds, in folders below `out`; MoCAID iterates."""
    found = []
    for k, method in enumerate(METHODS):
        for asked in ASKED:
            for seed in SEEDS:
                achieved = asked - 0.1 * k + 0.02 * seed
                made = write_run(out, method, seed=seed, asked=(asked,), reward=0.3 - asked + 0.1 * k, safety=achieved)
                found.append(_completed(made, out / made["run_id"], method, asked, seed, achieved))
    return found


def _completed(
    record: dict[str, Any], folder: Path, method: str, asked: float, seed: int, achieved: float
) -> dict[str, Any]:
    solved = geometry(seed, asked)
    for row in record["rows"].values():
        short = max(0.0, asked - achieved)
        row["constraints"]["safety"]["violation"] = {"mean": short, "low": short, "high": short + 0.1}
        row["metrics"] = {name: {**v, "low": v["mean"] - 0.1, "high": v["mean"] + 0.1, "n": 160, "clusters": 40}
                          for name, v in row["metrics"].items()}  # fmt: skip
    record["rows"][method]["policy"] = f"{method}-{asked}-{seed}"
    record["rows"][method]["predicted"] = {"margins": {"safety": asked}, "intervals": {"safety": [asked, asked]}}
    record["config"]["evaluate"]["level"] = 0.95
    record["outcome"] |= {
        "multipliers": solved["multipliers"],
        "trajectory": [],
        "diagnostics": {"dual": {"solver": "newton"}},
    }
    if method == "mocaid":
        record["outcome"]["trajectory"] = [
            {
                "iteration": t,
                "policy": f"iterate {t}",
                "multipliers": {"safety": 1.0 + 0.2 * t},
                "slack": {"safety": {"mean": slack, "low": slack - 0.05, "high": slack + 0.05}},
            }
            for t in (1, 2, 3)
            for slack in [0.1 * t - asked]
        ]
    inputs = {"responses": f"bank-{seed}", "scores": f"scores-{seed}"}
    record["stages"] = [{"label": "geometry of dual", "key": solved["artifact"], "inputs": inputs}]
    record["duals"] = [solved]
    record["labels"] = {f"labels for {method}": _labels(seed)}
    record["judging"] = _judging(method, asked, seed)
    rows = [
        {"stage": stage, "step": float(t), "loss": 0.7 - 0.01 * t * (1 + seed)} | extra
        for stage in ("sft", f"prefer {method}")
        for t in range(1, 9)
        for extra in [{"validation_loss": 0.69} if t % 4 == 0 else {}]
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "training.jsonl").write_bytes(content)
    record["training"] = {"file": "training.jsonl", "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "record.json").write_text(json.dumps(record))
    return record


def _labels(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    probability = rng.random(200)
    found = reliability(probability, rng.random(200) < probability, 10)
    return {"objective": "lagrangian", "kind": "bernoulli", "pairs": 200, **found}


def _judging(method: str, asked: float, seed: int) -> dict[str, Any]:
    contests = []
    for criterion, wins in (("helpfulness", 11 - int(20 * asked)), ("safety", 9 + int(20 * asked))):
        triples = [[1.0, 0.0, 0.0]] * wins + [[0.0, 0.0, 1.0]] * (20 - wins)
        contests.append(
            {
                "row": method, "opponent": "sft", "criterion": criterion, "artifact": f"{method}-{asked}-{seed}",
                "win_rate": {"mean": wins / 20},
                "per_prompt": {"prompt_id": [f"p{i}" for i in range(20)], "verdicts": triples, "games": triples},
                "gold": {"calibration": reliability(np.array([0.0, 0.5, 1.0]), np.array([False, True, True]), 10)},
            }
        )  # fmt: skip
    return {
        "judge": "learned",
        "protocol": {"name": "choice"},
        "contests": contests,
        "ratings": {
            c["criterion"]: rated([c], c["criterion"], level=0.95, resamples=50, seed=0, elo=False) for c in contests
        },
    }
