"""One stage run in place or on ranks, outside the store, and what must be equal between the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from pair_chain import TOKENS, Chain
from safetensors.numpy import load_file

from alignbench.config import LoraConfig
from alignbench.jsonio import read_jsonl
from alignbench.launch import run_on_ranks
from alignbench.stages import PREFER, Context, Runtime, Stage
from alignbench.stages.policies import PreferSpec
from alignbench.stopping import SIGNALS, Requests
from alignbench.store import Artifact

TOLERANCE = 1e-5


class Made:
    """One run of a stage outside the store: its files, cost and metrics."""

    def __init__(
        self,
        folder: Path,
        stage: Stage,
        spec: Any,
        inputs: dict[str, Artifact],
        processes: int = 1,
        requests: Requests = SIGNALS,
        seen: list[int] | None = None,
        **machine: Any,
    ) -> None:
        self.out, self.cost, self.metrics = folder / "out", dict[str, float](), list[tuple[int, dict[str, float]]]()
        self.out.mkdir(parents=True, exist_ok=True)
        work = folder / "work"
        work.mkdir(exist_ok=True)

        def hear(step: int, metrics: Mapping[str, float]) -> None:
            self.metrics.append((step, dict(metrics)))
            if seen is not None:
                seen.append(step)

        context = Context(
            spec=spec,
            inputs=inputs,
            seed=0,
            out=self.out,
            work=work,
            cost=self.cost,
            runtime=Runtime(tiny.hardware(processes=processes, **machine), 5),
            on_metrics=hear,
            requests=requests,
        )
        if processes > 1:
            run_on_ranks(stage, context)
        else:
            stage.run(context)


def training(chain: Chain, lora: int = 0, loss: str = "dpo") -> tuple[Stage, PreferSpec, dict[str, Artifact]]:
    """Twenty steps with everything that could depend on the number of ranks: clipping, decay, a schedule."""
    settings = replace(
        tiny.settings(20, 9, batch_size=6), schedule="cosine", warmup_ratio=0.2, weight_decay=0.1, max_grad_norm=1.0
    )
    spec = PreferSpec("reward", loss, 0.5, settings, LoraConfig(lora, 16.0, 0.0, ["q_proj", "v_proj"]), TOKENS, "fp32")
    inputs = {
        "start": chain.policy,
        "reference": chain.policy,
        "pairs": chain.pairs,
        "reference_logprobs": chain.cached,
    }
    return PREFER, spec, inputs


def assert_same_training(one: Made, two: Made, steps: int = 20) -> None:
    first, second = (read_jsonl(made.out / "log.jsonl") for made in (one, two))
    assert [entry["step"] for entry in first] == [entry["step"] for entry in second] == list(range(1, steps + 1))
    # accuracies count signs of numbers that may be zero but for rounding
    for name in {name for entry in first for name in entry if "accuracy" not in name}:
        found = [[entry.get(name, 0.0) for entry in log] for log in (first, second)]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=TOLERANCE, err_msg=name)
    assert first[-1]["loss"] < first[0]["loss"] - 0.02  # it does train
    states = [load_file(made.out / "policy/model.safetensors") for made in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert max(float(np.abs(states[0][name] - states[1][name]).max()) for name in states[0]) < 1e-4
    assert two.cost["trained_tokens"] == one.cost["trained_tokens"]
    assert two.cost["policies_in_memory"] == 1
