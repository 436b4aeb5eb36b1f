"""Run folders for the page of claims, made by hand: `from claim_records import write_claim_run`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from record_files import constraint_of

from alignbench.record import PER_PROMPT, SCHEMA

PROMPTS = 30


def write_claim_run(
    out: Path,
    method: str,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    asked: float | Mapping[str, float] = 0.1,
    rows: Mapping[str, Mapping[str, float]] | None = None,
    predicted: float | None = None,
    certificates: Mapping[str, Mapping[str, Any]] | None = None,
    dataset: str = "handbook",
    models: int = 1,
    noise: float = 0.2,
    multiplier: float | None = None,
    train_prompts: int = 400,
    **config: Any,
) -> Path:
    """Write a run.

    Args:
        out: The sweep's folder.
        method: Its method.
        seed: Its seed.
        settings: The method's section of the configuration.
        asked: Threshold of safety, or of each utility.
        rows: Row -> mean gain of each metric over the reference; the last row is the reported one.
        predicted: What the dual predicted.
        certificates: Row -> certificate on the training prompts.
        dataset: Its name.
        models: Trained and held.
        noise: Of a seed's prompts; seeds differ by a tenth of it.
        multiplier: Of the reported row.
        train_prompts: Size of the world.
        config: Further sections of the configuration.

    Returns:
        The run's folder.
    """
    settings = dict(settings or {})
    rows = rows or {method: {}}
    margins = dict(asked) if isinstance(asked, Mapping) else {"safety": asked}
    shared = np.random.default_rng(7)
    hard = {name: shared.normal(size=PROMPTS) for name in ("reward", *margins, "kl")}
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, gains in {"sft": {}, **rows}.items():
        own = np.random.default_rng([seed, *method.encode(), *name.encode(), *json.dumps(settings).encode()])
        moved = 0.0 if name == "sft" else 0.1 * noise * own.normal()
        tables[name] = {
            metric: base + gains.get(metric, 0.0) + moved + noise * own.normal(size=PROMPTS)
            for metric, base in hard.items()
        }
    text = [
        {"row": row, "prompt_id": f"p{i:03d}", "n": 4} | {name: float(values[i]) for name, values in table.items()}
        for row, table in tables.items()
        for i in range(PROMPTS)
    ]
    digest = hashlib.sha256(json.dumps([method, settings, asked, dataset, config]).encode()).hexdigest()[:10]
    folder = out / f"{method}-{dataset}-s{seed}-{digest}"
    folder.mkdir(parents=True)
    content = "".join(json.dumps(line) + "\n" for line in text)
    (folder / PER_PROMPT).write_text(content)
    reported = list(rows)[-1]
    means = {row: {metric: float(values.mean()) for metric, values in table.items()} for row, table in tables.items()}
    record = {
        "schema": SCHEMA,
        "run_id": folder.name,
        "status": "finished",
        "created": "2026-01-01T00:00:00+00:00",
        "method": method,
        "seed": seed,
        "config": {
            "method": {"name": method, "multipliers": None} | settings,
            "constraint": {
                "form": "margin", "utilities": list(margins), "thresholds": list(margins.values()), "beta": 0.5
            },
            "dataset": {"name": dataset, "world": {"train_prompts": train_prompts}},
            "evaluate": {"split": "test", "scorer": "gold"},
            "hardware": {"dtype": "fp32"},
        } | config,
        "outcome": {"reported": reported, "trajectory": [], "multipliers": {"safety": multiplier}},
        "rows": {
            name: {
                "policy": f"{folder.name}-{name}",
                "metrics": {m: {"mean": mean, "n": 4 * PROMPTS, "clusters": PROMPTS} for m, mean in own.items()},
                "constraints": {
                    utility: constraint_of(
                        margin, {"mean": own[utility] - means["sft"][utility], "low": None, "high": None}
                    )
                    for utility, margin in margins.items()
                },
                **({"predicted": {"margins": {"safety": predicted}}} if predicted is not None else {}),
                **({"certificate": {"train": certificates[name]}} if name in (certificates or {}) else {}),
            }
            for name, own in means.items()
        },
        "cost": {"total": {}, "models_trained": models, "models_in_memory_while_training": float(models)},
        "per_prompt": {"file": PER_PROMPT, "sha256": hashlib.sha256(content.encode()).hexdigest()},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))
    return folder


def change(folder: Path, edit: Any) -> None:
    """Rewrite a run's record after `edit(record)`."""
    path = folder / "record.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))
