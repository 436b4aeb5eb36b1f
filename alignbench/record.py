"""The record: one JSON file per run, from which every table, plot and mirror is made."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignbench import __version__
from alignbench.errors import StoreError
from alignbench.jsonio import atomic_write_json, atomic_write_jsonl, read_json
from alignbench.lab import Node, spec_of
from alignbench.methods import Outcome
from alignbench.report.calibration import reliability

SCHEMA = 1
_BINS = 10
_COSTS = ("trained_tokens", "generated_tokens", "scored_tokens", "optimizer_steps", "binary_labels", "seconds")
_PEAKS = ("peak_rss_bytes", "peak_gpu_bytes")


def make_record(
    *,
    run_id: str,
    config: dict[str, Any],
    outcome: Outcome,
    evaluations: dict[str, Node],
    certificates: dict[str, dict[str, Node]],
    nodes: dict[str, Node],
    versions: dict[str, Any],
    tuned_by: dict[str, Any] | None,
    scorers: dict[str, Node] | None = None,
    proxies: dict[str, dict[str, Node]] | None = None,
    geometries: list[Node] | None = None,
    experiments: Sequence[str] = (),
) -> dict[str, Any]:
    """Assemble a run's record; no absolute path and no secret goes in.

    Args:
        run_id: The run's name.
        config: Resolved configuration, without folders of this machine.
        outcome: What the recipe returned.
        evaluations: Evaluation node of each row, the reference's first.
        certificates: Certificate node of each row by split; empty where answers are not listed.
        nodes: Every stage used, in order.
        versions: Package versions.
        tuned_by: The hyper-parameter search behind the settings, if the configuration names one.
        scorers: Assessment of each scorer that the run trained itself.
        proxies: By scorer and row, gains by that scorer and by gold.
        geometries: What pictures show of each dual that was solved.
        experiments: Presets under which this run was asked for (`experiments_of`).
    """
    further: dict[str, Any] = {}
    if scorers:
        further["scorers"] = {name: node.result.json("metrics.json") for name, node in scorers.items()}
    if proxies:
        further["over_optimisation"] = {
            name: {row: node.result.json("metrics.json") for row, node in rows.items()}
            for name, rows in proxies.items()
        }
    if geometries:
        further["duals"] = [{"label": n.label, "artifact": n.key} | n.result.json("geometry.json") for n in geometries]
    drawn = {node.label: label_calibration(node) for node in nodes.values() if node.stage.name == "relabel"}
    if drawn:
        further["labels"] = drawn
    return {
        "schema": SCHEMA,
        "run_id": run_id,
        "status": "finished",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "alignbench": __version__,
        "commit": git_commit(),
        "versions": versions,
        "config": config,
        "experiments": list(experiments),
        "method": config["method"]["name"],
        "seed": config["seed"],
        "outcome": {
            "reported": outcome.reported,
            "policies": {name: node.key for name, node in outcome.policies.items()},
            "multipliers": multipliers_of(outcome, outcome.reported),
            "trajectory": outcome.trajectory,
            "diagnostics": outcome.diagnostics,
        },
        "rows": {
            name: {
                "policy": node.inputs["logprobs"].source("policy").key,
                **node.result.json("metrics.json"),
                **_foresight(outcome, name),
                **_exact(certificates.get(name, {})),
            }
            for name, node in evaluations.items()
        },
        "data": data_statistics(nodes),
        "cost": cost(nodes, outcome),
        "stages": [_stage(node) for node in nodes.values()],
        "tuned_by": tuned_by,
        **further,
    }


def experiments_of(folder: Path, experiment: str | None) -> list[str]:
    """Presets under which the run of a folder was asked for: this one, and those of the record that is there.

    Twins of two papers' presets can be one run, and then stand in one folder.
    """
    try:
        earlier = read_json(folder / "record.json").get("experiments", [])
    except (OSError, StoreError):  # none, or a damaged one, which is about to be replaced
        earlier = []
    return sorted({*earlier, *([experiment] if experiment else [])})


def multipliers_of(outcome: Outcome, row: str) -> dict[str, float]:
    """The multiplier of a row's policy: stated by the settings, solved, or stepped to; empty where there is none."""
    if row in outcome.duals:
        return dict(outcome.duals[row].result.json("multipliers.json")["multipliers"])
    return dict(outcome.multipliers) if row == outcome.reported else {}


def _foresight(outcome: Outcome, row: str) -> dict[str, Any]:
    """A row's multiplier, and what the bank predicted for it before anything was trained."""
    found: dict[str, Any] = {}
    multipliers = multipliers_of(outcome, row)
    if multipliers:
        found["multipliers"] = multipliers
    if row in outcome.predictions:
        prediction = outcome.predictions[row].result.json("prediction.json")
        kept = ("margins", "intervals", "reward", "kl", "ess_mean", "ess_low")
        found["predicted"] = {name: prediction[name] for name in kept}
    return found


def _exact(certificates: dict[str, Node]) -> dict[str, Any]:
    """A row's certificate by split, where answers are listed."""
    found = {split: node.result.json("certificate.json") for split, node in certificates.items()}
    return {"certificate": found} if found else {}


def portable(value: Any) -> Any:
    """A configuration without folders of this machine: of an absolute path only the last name stays."""
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def label_calibration(node: Node) -> dict[str, Any]:
    """The preference model behind a run's own labels: its probabilities against the labels that were used."""
    from safetensors.numpy import load_file

    found = load_file(node.result.path("labels.safetensors"))
    probability, preferred = found["probability"], found["preferred"]
    return {
        "objective": node.identity.spec.objective,
        "kind": node.identity.spec.kind,
        "pairs": len(preferred),
        **reliability(probability, preferred == 1, _BINS),
    }


def data_statistics(nodes: dict[str, Node]) -> dict[str, Any]:
    """What validation and truncation counted, by stage."""
    found: dict[str, Any] = {}
    for node in nodes.values():
        files = node.result.manifest["files"]
        for name in ("report.json", "truncation.json"):
            if name in files:
                found[f"{node.label}: {name.removesuffix('.json')}"] = node.result.json(name)
    return found


def cost(nodes: dict[str, Node], outcome: Outcome) -> dict[str, Any]:
    """Cost of making the result from nothing, and what this run itself spent.

    `total` adds up the stages' own records, cached or not, so that a method's cost does not depend on what
    another run computed before it.
    """
    total = dict.fromkeys(_COSTS, 0.0)
    peaks = dict.fromkeys(_PEAKS, 0.0)
    for node in nodes.values():
        spent = node.result.manifest["cost"]
        for name in _COSTS:
            total[name] += spent.get(name, 0.0)
        for name in _PEAKS:
            peaks[name] = max(peaks[name], spent.get(name, 0.0))
    return {
        "total": total,
        "peak": {name: value for name, value in peaks.items() if value},
        "policies_trained": sum(node.stage.name in ("sft", "prefer") for node in nodes.values()),
        "models_trained": len(outcome.models),
        "models": list(outcome.models),
        "models_in_memory_while_training": max(
            (node.result.manifest["cost"].get("policies_in_memory", 0.0) for node in nodes.values()), default=0.0
        ),
        "stages": len(nodes),
        "stages_built_now": sum(node.built for node in nodes.values()),
        "seconds_now": sum(node.seconds for node in nodes.values()),
    }


def _stage(node: Node) -> dict[str, Any]:
    return {
        "label": node.label,
        "stage": node.stage.name,
        "key": node.key,
        "inputs": dict(node.identity.inputs),
        "seed": node.identity.seed,
        "spec": spec_of(node),
        "cost": node.result.manifest["cost"],
        "built": node.built,
    }


def git_commit() -> str | None:
    """Commit of the code, with "+changes" when the work tree differs from it; None outside a checkout."""
    top = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=top, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


PER_PROMPT = "per_prompt.jsonl"


def write_per_prompt(folder: Path, evaluations: dict[str, Node]) -> dict[str, str]:
    """Write every row's means per prompt beside the record: what comparisons between runs are paired on.

    Returns:
        File name and sha256, for the record: a table of another run is told by it.
    """
    rows = [
        {"row": name} | values for name, node in evaluations.items() for values in node.result.jsonl("per_prompt.jsonl")
    ]
    atomic_write_jsonl(folder / PER_PROMPT, rows)
    return {"file": PER_PROMPT, "sha256": hashlib.sha256((folder / PER_PROMPT).read_bytes()).hexdigest()}


TRAINING = "training.jsonl"
_MOST_STEPS = 200


def write_training(folder: Path, nodes: dict[str, Node]) -> dict[str, str]:
    """Write every training stage's curve beside the record: `{stage, step, loss, ...}` per line.

    A long curve is thinned to about 200 evenly spaced steps; its last step and all that were validated stay.

    Returns:
        File name and sha256, for the record.
    """
    rows: list[dict[str, Any]] = []
    for node in nodes.values():
        if "log.jsonl" in node.result.manifest["files"]:
            log = node.result.jsonl("log.jsonl")
            every = max(1, len(log) // _MOST_STEPS)
            kept = [r for i, r in enumerate(log, 1) if i % every == 0 or i == len(log) or "validation_loss" in r]
            rows += [{"stage": node.label} | row for row in kept]
    atomic_write_jsonl(folder / TRAINING, rows)
    return {"file": TRAINING, "sha256": hashlib.sha256((folder / TRAINING).read_bytes()).hexdigest()}


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Write `record.json` in a run's folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    atomic_write_json(path, record)
    return path


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record below a folder, in the order of its run id."""
    return [read_json(path) for path in sorted(folder.rglob("record.json"))]
