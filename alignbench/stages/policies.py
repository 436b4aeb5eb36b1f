"""Stages that make policies: base, sft, merge; prefer has a module of its own and is handed on from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from alignbench.architecture import parameter_count
from alignbench.config import ArchitectureConfig, LoraConfig, TrainConfig
from alignbench.engine.objectives import SftObjective
from alignbench.engine.runtime import derive_seed
from alignbench.jsonio import LATER, write_json
from alignbench.models import policy as policies
from alignbench.models.weights import check_vocabulary, describe, mend_weights
from alignbench.stages.prefer import PREFER, PreferSpec
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register
from alignbench.stages.tokens import TokenSpec, encode_demonstrations
from alignbench.stages.training import train_and_save, training_estimate

__all__ = [
    "BASE",
    "MERGE",
    "PREFER",
    "SFT",
    "BaseSpec",
    "MergeSpec",
    "PreferSpec",
    "SftSpec",
]


@dataclass(frozen=True)
class BaseSpec:
    """The base model: built from a shape and the data's own tokenizer, or brought in from a folder or hub.

    Attributes:
        architecture: Shape of a model built from nothing; None for one that is brought in.
        fingerprint: Content of a brought-in model; None builds one.
    """

    architecture: ArchitectureConfig | None
    fingerprint: str | None


def _base(ctx: Context) -> None:
    spec: BaseSpec = ctx.spec
    folder = ctx.out / "policy"
    if spec.fingerprint is not None:
        where = ctx.runtime.locations["model"]
        policies.bring_in(where.path, where.revision, folder)
        tokenizer = policies.load_tokenizer(folder)
        check_vocabulary(folder, tokenizer)
        zeroed = mend_weights(folder, where.not_finite)
        write_json(ctx.out / "report.json", describe(folder, tokenizer) | {"weights_set_to_zero": zeroed})
        return
    rows = ctx.inputs["data"].jsonl("demonstrations.jsonl")
    texts = [row[part] for row in rows for part in ("prompt", "response")]
    assert spec.architecture is not None  # a base is built or brought in
    tokenizer = policies.train_tokenizer(texts, spec.architecture.vocab_size)
    model = policies.build_llama(spec.architecture, tokenizer, derive_seed(ctx.seed, "base"))
    policies.save_policy(model, tokenizer, folder)


BASE = register(
    Stage(
        "base",
        1,
        "policy",
        BaseSpec,
        _base,
        lambda spec, inputs, runtime, hints: Estimate(
            Facts(parameters=parameter_count(hints["shape"]), shape=hints["shape"]), overhead_seconds=0.2
        ),
    )
)


@dataclass(frozen=True)
class SftSpec:
    """Supervised fine-tuning on (prompt, response) rows."""

    train: TrainConfig
    lora: LoraConfig
    tokens: TokenSpec
    dtype: str
    optimizer: str = field(default="adamw", metadata={LATER: True})


def _sft(ctx: Context) -> None:
    spec: SftSpec = ctx.spec
    folder = ctx.inputs["start"].path("policy")
    tokenizer = policies.load_tokenizer(folder)
    rows, report = encode_demonstrations(ctx.inputs["data"].jsonl("demonstrations.jsonl"), tokenizer, spec.tokens)
    write_json(ctx.out / "truncation.json", report.to_dict())
    train_and_save(ctx, folder, tokenizer, SftObjective(rows), None)


def _sft_estimate(spec: SftSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]) -> Estimate:
    return training_estimate(spec, inputs["start"], inputs["data"], runtime, hints, sequences=1)


SFT = register(Stage("sft", 1, "policy", SftSpec, _sft, _sft_estimate, parallel=True))


@dataclass(frozen=True)
class MergeSpec:
    """Linear combination of policies; weights belong to inputs policy_0, policy_1, ... and sum to one."""

    weights: tuple[float, ...]


def _merge(ctx: Context) -> None:
    folders = [ctx.inputs[f"policy_{i}"].path("policy") for i in range(len(ctx.spec.weights))]
    merged = policies.merge_policies(list(zip(folders, ctx.spec.weights, strict=True)))
    policies.save_policy(merged, policies.load_tokenizer(folders[0]), ctx.out / "policy")


MERGE = register(
    Stage(
        "merge",
        1,
        "policy",
        MergeSpec,
        _merge,
        lambda spec, inputs, runtime, hints: Estimate(
            inputs["policy_0"], memory_bytes=4 * (len(inputs) + 1) * inputs["policy_0"].parameters, on_host=True
        ),
    )
)
