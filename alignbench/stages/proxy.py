"""A proxy score against gold: how far a policy has come by the one, and by the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.engine.runtime import derive_seed
from alignbench.errors import InvariantError
from alignbench.jsonio import write_json
from alignbench.report.stats import cluster_bootstrap, paired_difference
from alignbench.stages.stage import Context, Estimate, Facts, Stage, register


@dataclass(frozen=True)
class ProxySpec:
    """Over-optimisation of one policy: gains over the reference by a proxy and by gold, beside the distance gone.

    Inputs by role: responses, proxy, gold (scores of them), the same of the reference with the prefix reference_, and
    logprobs, reference_logprobs of the policy's responses.

    Attributes:
        columns: Scores that both have.
        level: Two-sided coverage.
        resamples: Bootstrap draws.
    """

    columns: tuple[str, ...]
    level: float
    resamples: int


def _proxy(ctx: Context) -> None:
    from safetensors.numpy import load_file

    spec: ProxySpec = ctx.spec
    options: dict[str, Any] = {
        "level": spec.level, "resamples": spec.resamples, "seed": derive_seed(ctx.seed, "bootstrap"),
    }  # fmt: skip
    own, base = (_prompts(ctx, prefix) for prefix in ("", "reference_"))
    logprobs = [
        load_file(ctx.inputs[name].path("responses.safetensors"))["response"]
        for name in ("logprobs", "reference_logprobs")
    ]
    columns = {}
    for name in spec.columns:
        found: dict[str, Any] = {}
        values = {}
        for who in ("proxy", "gold"):
            values[who] = _scores(ctx, who, name, len(own))
            reference = _scores(ctx, f"reference_{who}", name, len(base))
            found[who] = {
                "mean": cluster_bootstrap(values[who], own, **options).to_dict(),
                "gain": paired_difference(values[who], own, reference, base, **options).to_dict(),
            }
        spread = all(v.std() > 0 for v in values.values())
        found["correlation"] = float(np.corrcoef(values["proxy"], values["gold"])[0, 1]) if spread else None
        columns[name] = found
    kl = cluster_bootstrap(logprobs[0] - logprobs[1], own, **options).to_dict()
    write_json(ctx.out / "metrics.json", {"kl": kl, "columns": columns})


def _prompts(ctx: Context, prefix: str) -> np.ndarray:
    return np.array([row["prompt_id"] for row in ctx.inputs[f"{prefix}responses"].jsonl("responses.jsonl")])


def _scores(ctx: Context, role: str, name: str, count: int) -> np.ndarray:
    rows = ctx.inputs[role].jsonl("scores.jsonl")
    if len(rows) != count:
        raise InvariantError(
            f"{len(rows)} scores of {count} responses", where=f"proxy: {role}", mend="score these responses"
        )
    return np.array([row[name] for row in rows], dtype=np.float64)


PROXY = register(
    Stage(
        "proxy",
        2,
        "proxy",
        ProxySpec,
        _proxy,
        lambda spec, inputs, runtime, hints: Estimate(Facts(rows=inputs["responses"].rows), overhead_seconds=1.0),
    )
)
