"""A tiny policy, pairs and reference log-probs as artifacts: what the tests of single stages on pairs share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from safetensors.numpy import save_file

from alignbench.config import LoraConfig
from alignbench.jsonio import write_json, write_jsonl
from alignbench.stages import LOGPROBS, PREFER, Context, Runtime, Stage
from alignbench.stages.measure import LogProbsSpec
from alignbench.stages.policies import PreferSpec
from alignbench.stages.tokens import TokenSpec
from alignbench.store import Artifact, Identity, Store

TOKENS = TokenSpec("plain", 60, 20)
PROMPTS = ("the quick brown fox", "a small kettle", "jumps over", "on the stove")
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "a", "small", "kettle", "whistles", "stove")


def pair_table(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random words; the last quarter is validation."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS, size=int(rng.integers(1, 6))))

    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "response_0": text() + " one",
            "response_1": text() + " two",
            "better_response_id": int(rng.integers(2)),
            "split": "train" if i < 3 * count // 4 else "validation",
        }
        for i in range(count)
    ]


def given(store: Store, kind: str, write: Any, inputs: dict[str, Artifact] | None = None, name: str = "") -> Artifact:
    """An artifact whose files `write(out)` makes; `inputs` is the lineage its manifest will state."""
    keys = {role: artifact.key for role, artifact in (inputs or {}).items()}
    identity = Identity(f"given-{kind}", 1, kind, {"name": name}, keys, 0)
    return store.obtain(identity, lambda workspace: write(workspace.out))[0]


def stage(store: Store, what: Stage, spec: Any, inputs: dict[str, Artifact], seed: int = 0) -> Artifact:
    """Run a stage through the store."""
    identity = Identity(what.name, what.version, what.kind, spec, {r: a.key for r, a in inputs.items()}, seed)

    def produce(workspace: Any) -> None:
        what.run(
            Context(
                spec=spec,
                inputs=inputs,
                seed=seed,
                out=workspace.out,
                work=workspace.work,
                cost=workspace.cost,
                runtime=Runtime(tiny.hardware()),
                on_metrics=lambda step, metrics: None,
            )
        )

    return store.obtain(identity, produce)[0]


class Chain:
    """A store with a reference policy, pairs and the reference's log-probs of them."""

    def __init__(self, root: Path, rows: list[dict[str, Any]] | None = None, *, mismatched: bool = False) -> None:
        self.store = Store(root)
        self.rows = pair_table() if rows is None else rows
        self.policy = given(self.store, "policy", lambda out: tiny.save(tiny.llama(), out / "policy"))
        self.pairs = self.table(self.rows)
        self.cached = self.logprobs(self.policy, mismatched=mismatched)

    def on(self, pairs: Artifact) -> Chain:
        """The same policy with another table of pairs."""
        other = copy.copy(self)
        other.rows, other.pairs = pairs.jsonl("pairs.jsonl"), pairs
        other.cached = other.logprobs(other.policy)
        return other

    def table(self, rows: list[dict[str, Any]]) -> Artifact:
        return given(self.store, "pairs", lambda out: write_jsonl(out / "pairs.jsonl", rows), name=str(rows))

    def logprobs(self, policy: Artifact, *, mismatched: bool = False) -> Artifact:
        spec = LogProbsSpec("pairs", TOKENS, "fp32", mismatched=mismatched)
        return stage(self.store, LOGPROBS, spec, {"policy": policy, "rows": self.pairs})

    def labels(self, probability: np.ndarray, preferred: np.ndarray, **lineage: Artifact) -> Artifact:
        columns = {"preferred": preferred.astype(np.int64), "probability": probability.astype(np.float64)}
        name = f"{probability.tolist()} {preferred.tolist()}"
        inputs = lineage or {"pairs": self.pairs}
        return given(self.store, "labels", lambda out: save_file(columns, out / "labels.safetensors"), inputs, name)

    def bonus(self, values: np.ndarray) -> Artifact:
        columns = {f"bonus_{k}": np.ascontiguousarray(values[:, k]) for k in (0, 1)}
        write = lambda out: save_file(columns, out / "bonus.safetensors")  # noqa: E731
        return given(self.store, "bonus", write, {"pairs": self.pairs}, str(values.tolist()))

    def multipliers(self, **values: float) -> Artifact:
        def write(out: Path) -> None:
            write_json(out / "multipliers.json", {"multipliers": values})

        return given(self.store, "multipliers", write, name=str(values))

    def prefer(self, roles: dict[str, Artifact] | None = None, **changes: Any) -> Artifact:
        """Two steps of preference training; `roles` adds or replaces inputs, `changes` fields of the spec."""
        values = {
            "objective": "reward",
            "loss": "dpo",
            "beta": 0.5,
            "train": tiny.settings(2, 9, batch_size=9),
            "lora": LoraConfig(rank=0),
            "tokens": TOKENS,
            "dtype": "fp32",
        }
        inputs = {
            "start": self.policy,
            "reference": self.policy,
            "pairs": self.pairs,
            "reference_logprobs": self.cached,
        }
        return stage(self.store, PREFER, PreferSpec(**(values | changes)), inputs | (roles or {}))


def weights(artifact: Artifact) -> bytes:
    """The safetensors of a policy."""
    return artifact.path("policy/model.safetensors").read_bytes()
