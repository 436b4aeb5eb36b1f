"""Stages that make policies: base, sft, prefer, merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.config import ArchitectureConfig, LoraConfig, TrainConfig
from alignbench.data.schema import label_column
from alignbench.engine.batching import total_steps
from alignbench.engine.objectives import KtoObjective, Objective, PairObjective, SftObjective
from alignbench.engine.runtime import derive_seed, device_of, dtype_of
from alignbench.engine.train import TrainJob, train, trained_state
from alignbench.errors import DataError, InvariantError
from alignbench.losses import pair_loss
from alignbench.models import policy as policies
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register, training_cost
from alignbench.stages.tokens import TokenSpec, encode_demonstrations, encode_pairs, mismatched_rows
from alignbench.store import Artifact, write_json, write_jsonl


@dataclass(frozen=True)
class BaseSpec:
    """The base model: built from a shape and the data's own tokenizer, or brought in from a folder or hub.

    Attributes:
        architecture: Shape of a model built from nothing; None for one that is brought in.
        fingerprint: Content of a brought-in model; None builds one.
    """

    architecture: ArchitectureConfig | None
    fingerprint: str | None


def parameter_count(shape: ArchitectureConfig) -> float:
    """Weights of a Llama-shaped model."""
    head = shape.hidden_size // shape.heads
    attention = shape.hidden_size * head * (2 * shape.heads + 2 * shape.kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return float(shape.layers * layer + embeddings + shape.hidden_size)


def lora_parameter_count(shape: ArchitectureConfig, lora: LoraConfig) -> float:
    """Weights of the adapters, for Llama's module names; unknown names count as hidden x hidden."""
    head = shape.hidden_size // shape.heads
    sizes = {
        "k_proj": shape.hidden_size + head * shape.kv_heads,
        "v_proj": shape.hidden_size + head * shape.kv_heads,
        "gate_proj": shape.hidden_size + shape.intermediate_size,
        "up_proj": shape.hidden_size + shape.intermediate_size,
        "down_proj": shape.hidden_size + shape.intermediate_size,
    }
    return float(sum(sizes.get(t, 2 * shape.hidden_size) for t in lora.targets) * lora.rank * shape.layers)


def _base(ctx: Context) -> None:
    spec: BaseSpec = ctx.spec
    folder = ctx.out / "policy"
    if spec.fingerprint is not None:
        where = ctx.runtime.locations["model"]
        policies.bring_in(where.path, where.revision, folder)
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
        lambda spec, inputs, runtime, hints: Estimate(Facts(parameters=hints["parameters"]), overhead_seconds=1.0),
    )
)


@dataclass(frozen=True)
class SftSpec:
    """Supervised fine-tuning on (prompt, response) rows."""

    train: TrainConfig
    lora: LoraConfig
    tokens: TokenSpec
    dtype: str


def _sft(ctx: Context) -> None:
    spec: SftSpec = ctx.spec
    folder = ctx.inputs["start"].path("policy")
    tokenizer = policies.load_tokenizer(folder)
    rows, report = encode_demonstrations(ctx.inputs["data"].jsonl("demonstrations.jsonl"), tokenizer, spec.tokens)
    write_json(ctx.out / "truncation.json", report.to_dict())
    _train_and_save(ctx, folder, tokenizer, SftObjective(rows), None)


def _sft_estimate(spec: SftSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]) -> Estimate:
    return _training_estimate(spec, inputs["start"], inputs["data"], runtime, hints)


SFT = register(Stage("sft", 1, "policy", SftSpec, _sft, _sft_estimate))


@dataclass(frozen=True)
class PreferSpec:
    """Preference training against a stated reference.

    Attributes:
        objective: "reward" or a utility: which label column decides.
        loss: "dpo", "ipo" or "kto".
        beta: KL weight of this stage.
        train: Optimiser settings.
        lora: Fresh adapters on the start policy, or rank 0 for all weights.
        tokens: Template and lengths.
        dtype: Parameter dtype.
        kto_labels: "preferred" (chosen desirable, other undesirable) or "is_safe" (each response's own flag).
        kto_balance: Weight undesirable examples by n_desirable / n_undesirable (released SACPO code).
    """

    objective: str
    loss: str
    beta: float
    train: TrainConfig
    lora: LoraConfig
    tokens: TokenSpec
    dtype: str
    kto_labels: str = "preferred"
    kto_balance: bool = True


def _prefer(ctx: Context) -> None:
    spec: PreferSpec = ctx.spec
    start, cached = ctx.inputs["start"], ctx.inputs["reference_logprobs"]
    _check_cache(ctx)
    folder = start.path("policy")
    tokenizer = policies.load_tokenizer(folder)
    rows = ctx.inputs["pairs"].jsonl("pairs.jsonl")
    objectives = {split: _objective(spec, rows, split, tokenizer, cached, ctx) for split in ("train", "validation")}
    if objectives["train"] is None:
        raise DataError("there is no training pair", where="the pairs' split column", mend="lower the held-out shares")
    _train_and_save(ctx, folder, tokenizer, objectives["train"], objectives["validation"])


def _check_cache(ctx: Context) -> None:
    """The cached log-probs must be the reference's, on these pairs, tokenised this way."""
    manifest = ctx.inputs["reference_logprobs"].manifest
    expected = {"policy": ctx.inputs["reference"].key, "rows": ctx.inputs["pairs"].key}
    if manifest["inputs"] != expected:
        raise InvariantError(
            f"reference log-probs were computed for {manifest['inputs']}, not for {expected}",
            where="prefer",
            mend="pass the log-probs of this stage's own reference on these pairs",
        )


def _objective(
    spec: PreferSpec,
    rows: list[dict[str, Any]],
    split: str,
    tokenizer: Any,
    cached: Artifact,
    ctx: Context,
) -> Objective | None:
    from safetensors.numpy import load_file

    wanted = [i for i, row in enumerate(rows) if row["split"] == split]
    if not wanted:
        return None
    pairs = encode_pairs(rows, wanted, tokenizer, spec.tokens)
    if split == "train":
        write_json(ctx.out / "truncation.json", pairs.report.to_dict())
    saved = load_file(cached.path(f"{split}.safetensors"))
    if not np.array_equal(saved["index"], pairs.index):
        raise InvariantError(
            "cached reference log-probs and tokenised pairs are not the same rows",
            where=f"prefer, split {split}",
            mend="template and lengths of both must agree; remove the cached log-probs if they were edited",
        )
    reference = np.stack([saved["response_0"], saved["response_1"]], 1)
    preferred = np.array([rows[i][label_column(spec.objective)] for i in pairs.index])
    if pair_loss(spec.loss).paired:
        each = range(len(preferred))
        return PairObjective(
            chosen=[pairs.responses[preferred[n]][n] for n in each],
            rejected=[pairs.responses[1 - preferred[n]][n] for n in each],
            reference=np.stack([reference[each, preferred], reference[each, 1 - preferred]], 1),
            name=spec.loss,
            beta=spec.beta,
        )
    desirable = _desirable(spec, rows, pairs.index, preferred)
    bad = int((~desirable).sum())
    return KtoObjective(
        examples=[*pairs.responses[0], *pairs.responses[1]],
        desirable=desirable,
        reference=reference.T.reshape(-1),
        mismatched=[
            row for side in pairs.responses for row in mismatched_rows(side, saved["partner"], spec.tokens.max_length)
        ],
        mismatched_reference=np.concatenate([saved["mismatched_0"], saved["mismatched_1"]]),
        beta=spec.beta,
        undesirable_weight=float(desirable.sum() / bad) if spec.kto_balance and bad else 1.0,
    )


def _desirable(spec: PreferSpec, rows: list[dict[str, Any]], index: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """KTO's labels, response 0 of every pair first, then response 1."""
    if spec.kto_labels == "preferred":
        return np.concatenate([preferred == 0, preferred == 1])
    flags = [[rows[i].get(f"is_response_{k}_safe") for i in index] for k in (0, 1)]
    if any(flag is None for side in flags for flag in side):
        raise DataError(
            "kto_labels=is_safe needs is_response_0_safe and is_response_1_safe in every pair",
            where="pairs",
            mend="set kto_labels=preferred, or add the flags",
        )
    return np.array(flags, dtype=bool).reshape(-1)


def _prefer_estimate(
    spec: PreferSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    return _training_estimate(spec, inputs["start"], inputs["pairs"], runtime, hints)


PREFER = register(Stage("prefer", 1, "policy", PreferSpec, _prefer, _prefer_estimate))


def _train_and_save(
    ctx: Context, folder: Path, tokenizer: Any, objective: Objective, validation: Objective | None
) -> None:
    spec = ctx.spec
    lora = spec.lora if spec.lora.rank > 0 else None
    hardware = ctx.runtime.hardware
    model = policies.load_policy(folder, dtype_of(hardware), device_of(hardware))
    if lora is not None:
        model = policies.add_lora(model, lora, derive_seed(ctx.seed, "lora"))
    job = TrainJob(
        policy=model,
        objective=objective,
        settings=spec.train,
        hardware=hardware,
        seed=derive_seed(ctx.seed, "order"),
        pad_id=policies.pad_id(tokenizer),
        work=ctx.work,
        lora=lora is not None,
        starts_at_reference="reference" not in ctx.inputs or ctx.inputs["reference"].key == ctx.inputs["start"].key,
        validation=validation,
        evaluate_every=ctx.runtime.evaluate_every,
    )
    result = train(job, ctx.cost, ctx.on_metrics)
    trained = policies.restore_weights(folder, trained_state(job), lora)
    policies.save_policy(trained, tokenizer, ctx.out / "policy")
    write_jsonl(ctx.out / "log.jsonl", result.log)


def _training_estimate(
    spec: SftSpec | PreferSpec, start: Facts, data: Facts, runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    batch = int(min(spec.train.batch_size, max(1, data.rows)))
    tokens = total_steps(int(max(data.rows, 1)), spec.train.epochs, batch) * batch * data.tokens
    flops, memory = training_cost(
        parameters=start.parameters,
        trainable=hints.get("trainable") or start.parameters,
        tokens=tokens,
        row_tokens=data.tokens,
        rows=min(runtime.hardware.micro_batch, batch),
        runtime=runtime,
    )
    return Estimate(
        Facts(parameters=start.parameters),
        trained_tokens=tokens,
        flops=flops,
        memory_bytes=memory,
        overhead_seconds=2.0,
    )


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
            inputs["policy_0"], memory_bytes=4 * (len(inputs) + 1) * inputs["policy_0"].parameters
        ),
    )
)
