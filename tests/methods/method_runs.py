"""What the tests of the dual methods share: runs that are made once in a session, and numbers computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import softmax
from tiny_runs import Run, run, shared_tiny

from alignbench.lab import Node
from alignbench.models.scorers import find_scorer
from alignbench.store import Artifact, Store

BANK = "method.dual.samples=8"
TWO = ("constraint.utilities=[safety,politeness]", "constraint.thresholds=[0.1,0.02]")

_RUNS: dict[tuple[str, ...], Run] = {}
_STORE: list[Path] = []


def once(factory: pytest.TempPathFactory, *overrides: str) -> Run:
    """The run of that configuration, on one store for all of them. Read only."""
    if not _STORE:
        _STORE.append(shared_tiny(factory).copied(factory.mktemp("methods") / "store"))
    if overrides not in _RUNS:
        _RUNS[overrides] = run(_STORE[0], factory.mktemp("out"), *overrides)
    return _RUNS[overrides]


def entry(done: Run, label: str) -> dict[str, Any]:
    """The record's entry of a stage."""
    (found,) = [stage for stage in done.record["stages"] if stage["label"] == label]
    return dict(found)


def needed(done: Run, label: str, role: str) -> Artifact:
    """The artifact that the stage `label` had in a role."""
    found = Store(done.store).find(entry(done, label)["inputs"][role])
    assert found is not None
    return found


def labels_of(artifact: Artifact) -> tuple[np.ndarray, np.ndarray]:
    """(preferred, probability) of pseudo-preferences."""
    found = load_file(artifact.path("labels.safetensors"))
    return found["preferred"], found["probability"]


def gold_of_pairs(done: Run) -> dict[str, np.ndarray]:
    """The world's own scores of both responses of every pair, (pairs, 2), from their texts."""
    rows = done.artifact("label pairs").jsonl("pairs.jsonl")
    sides = [find_scorer("gold")([r["prompt"] for r in rows], [r[f"response_{k}"] for r in rows]) for k in (0, 1)]
    return {name: np.stack([side[name] for side in sides], 1) for name in sides[0]}


def table(responses: Artifact, scores: Artifact, names: Sequence[str]) -> np.ndarray:
    """Scores as (prompts, responses per prompt, names)."""
    rows, scored = responses.jsonl("responses.jsonl"), scores.jsonl("scores.jsonl")
    found: dict[str, list[list[float]]] = {}
    for row, score in zip(rows, scored, strict=True):
        found.setdefault(row["prompt_id"], []).append([score[name] for name in names])
    return np.array(list(found.values()))


def bank_of(done: Run, label: str, names: Sequence[str], prefix: str = "") -> np.ndarray:
    """The scored responses of a stage on a bank: reward first, then the utilities."""
    return table(needed(done, label, f"{prefix}responses"), needed(done, label, f"{prefix}scores"), ("reward", *names))


def tilted(bank: np.ndarray, beta: float, multipliers: Sequence[float]) -> np.ndarray:
    """Weights of every prompt's responses under ref exp((r + <lambda, g>) / beta)."""
    return np.asarray(softmax((bank[..., 0] + bank[..., 1:] @ np.asarray(multipliers)) / beta, axis=1))


def margins_of(bank: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Margin of every utility over the bank's own mean."""
    return np.asarray((weights[..., None] * bank[..., 1:]).sum(1).mean(0) - bank[..., 1:].mean((0, 1)))


def hessian_of(bank: np.ndarray, beta: float, multipliers: Sequence[float]) -> np.ndarray:
    """The dual's second derivative: the mean over prompts of the utilities' covariance, over beta."""
    weights = tilted(bank, beta, multipliers)
    found = [
        np.cov(g.T, aweights=w, ddof=0).reshape(g.shape[1], -1) for g, w in zip(bank[..., 1:], weights, strict=True)
    ]
    return np.asarray(np.mean(found, 0) / beta)


def ancestors(node: Node) -> dict[str, Node]:
    """Everything that a node was made from, by label."""
    found: dict[str, Node] = {}
    for source in node.inputs.values():
        found |= {source.label: source} | ancestors(source)
    return found
