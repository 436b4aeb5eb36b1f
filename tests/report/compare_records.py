"""Run folders made by hand, with values per prompt: `from compare_records import write_run`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.record import PER_PROMPT, SCHEMA

PROMPTS = 40
SAMPLES = 4


def write_run(
    out: Path,
    method: str = "mocan",
    *,
    seed: int = 0,
    asked: tuple[float, ...] = (0.2,),
    reward: float = 0.0,
    safety: float = 0.0,
    beta: float = 0.5,
    form: str = "margin",
    utilities: tuple[str, ...] = ("safety",),
    noise: float = 0.3,
    folder: str | None = None,
    prompts: int = PROMPTS,
    **changes: Any,
) -> dict[str, Any]:
    """Write a record and its values per prompt; `reward` and `safety` are the means' gains over the reference."""
    rng = np.random.default_rng([seed, *method.encode(), *(int(100 * a) & 255 for a in asked), int(10 * beta)])
    shared = np.random.default_rng(99)  # prompts are hard or easy for every method
    hard = {name: shared.normal(size=prompts) for name in ("reward", *utilities)}
    gains = {"reward": reward} | dict.fromkeys(utilities, safety)
    tables: dict[str, dict[str, np.ndarray]] = {"sft": {}, method: {}}
    of_seed = np.random.default_rng(seed)
    for name, base in hard.items():
        tables["sft"][name] = base + noise * of_seed.normal(size=prompts)
        own = base + noise * rng.normal(size=prompts)
        tables[method][name] = own - own.mean() + tables["sft"][name].mean() + gains[name]
    for table in tables.values():
        table |= {"kl": np.full(prompts, 0.5), "length": np.full(prompts, 20.0)}
    rows = [
        {"row": row, "prompt_id": f"p{i:03d}", "n": SAMPLES} | {name: float(v[i]) for name, v in table.items()}
        for row, table in tables.items()
        for i in range(prompts)
    ]
    run_id = f"{method}-{seed}-{'_'.join(map(str, asked))}-{beta}"
    target = out / (folder or run_id)
    target.mkdir(parents=True, exist_ok=True)
    (target / PER_PROMPT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = hashlib.sha256((target / PER_PROMPT).read_bytes()).hexdigest()
    constraints = {
        u: {
            "requested_margin": b,
            "achieved_margin": {"mean": safety, "low": safety - 0.1, "high": safety + 0.1},
            "violation": {"mean": max(0.0, b - safety), "low": max(0.0, b - safety - 0.1), "high": b - safety + 0.1},
            "satisfied": safety >= b,
            "satisfied_with_confidence": safety - 0.1 >= b,
        }
        for u, b in zip(utilities, asked, strict=True)
    }
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": run_id,
        "status": "finished",
        "created": "2026-01-01T00:00:00+00:00",
        "alignbench": "0.1.0",
        "commit": "a" * 40,
        "versions": {"torch": "2"},
        "method": method,
        "seed": seed,
        "config": {
            "method": {"name": method},
            "constraint": {"form": form, "utilities": list(utilities), "thresholds": list(asked), "beta": beta},
            "dataset": {"name": "handbook"},
            "evaluate": {"split": "test", "scorer": "gold"},
            "hardware": {"dtype": "fp32"},
            "seed": seed,
        },
        "outcome": {"reported": method},
        "rows": {
            name: {
                "policy": f"{name}-{seed}",
                "metrics": {
                    metric: {"mean": float(values.mean()), "n": SAMPLES * prompts, "clusters": prompts, "level": 0.95}
                    for metric, values in table.items()
                },
                "constraints": constraints,
            }
            for name, table in tables.items()
        },
        "cost": {
            "total": {"trained_tokens": 1000.0, "generated_tokens": 500.0, "scored_tokens": 250.0, "seconds": 12.5},
            "peak": {"peak_rss_bytes": 2.0**30},
            "policies_trained": 2,
            "models_trained": 1,
            "models_in_memory_while_training": 1.0,
        },
        "per_prompt": {"file": PER_PROMPT, "sha256": digest},
    }
    record |= changes
    (target / "record.json").write_text(json.dumps(record))
    return record
