"""A sweep's folder as runs leave it, with courses and responses: `from dashboard_records import write_sweep`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_records import write_run

HIDDEN = "the hidden words of"


def triple(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 160, "level": 0.95}


def course(final: float, iterations: int) -> list[dict[str, Any]]:
    return [
        {
            "iteration": t,
            "multipliers": {"safety": final * t / iterations},
            "slack": {"safety": triple(0.3 * t / iterations - 0.2, 0.05)},
            "at_bound": {"safety": "lower" if t == 1 else None},
            "policy": f"iterate {t}",
        }
        for t in range(1, iterations + 1)
    ]


def responses(method: str, label: str, prompts: int, length: int) -> list[dict[str, Any]]:
    text = f"{HIDDEN} {label}: " + "first wipe the shelf, then let it dry. " * length
    return [
        {
            "prompt": f"How do I clean shelf number {i}?",
            "sft": f"reference answer {i}. " * (1 + length),
            "sft reward": 0.1,
            "sft safety": 1.0,
            method: f"{i}. {text}",
            f"{method} reward": 0.2,
            f"{method} safety": 1.5,
        }
        for i in range(prompts)
    ]


def write_one(
    out: Path,
    method: str,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    iterations: int = 0,
    answers: int = 3,
    length: int = 1,
    **options: Any,
) -> Path:
    """One run folder; `rows` are those of its generations.jsonl."""
    record = write_run(out, method, **options)
    folder = out / (options.get("folder") or record["run_id"])
    for row in record["rows"].values():
        row["metrics"] = {name: triple(value["mean"], 0.1) for name, value in row["metrics"].items()}
    if iterations:
        record["outcome"]["trajectory"] = course(1.0, iterations)
        record["outcome"]["policies"] = {method: "f" * 32}
    (folder / "record.json").write_text(json.dumps(record))
    if rows is None:
        label = f"{method} at {options.get('asked', (0.2,))[0]:g} seed {options.get('seed', 0)}"
        rows = responses(method, label, answers, length)
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sweep(
    out: Path,
    methods: Sequence[str] = ("mocan", "sacpo", "mocaid"),
    thresholds: Sequence[float] = (0.1, 0.2),
    seeds: Sequence[int] = (0, 1, 2),
    **options: Any,
) -> Path:
    """Every method at every threshold with every seed; mocaid and its like take four iterations."""
    for k, method in enumerate(methods):
        steps = 4 if "aid" in method else 0
        for asked in thresholds:
            gains = {"reward": 0.3 - asked + 0.05 * k, "safety": 0.8 * asked + 0.03 * k}
            for seed in seeds:
                write_one(out, method, asked=(asked,), seed=seed, iterations=steps, **gains, **options)
    return out
