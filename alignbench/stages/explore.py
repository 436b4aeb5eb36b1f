"""Stages of online exploration: features of responses, bonuses from them, and pairs of several rounds as one table."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alignbench.data.tokenize import TruncationReport
from alignbench.engine.batching import Row, collate, length_sorted
from alignbench.engine.logprobs import progress
from alignbench.engine.runtime import derive_seed, device_of, dtype_of, peak_memory
from alignbench.errors import ConfigError, DataError, InvariantError
from alignbench.exploration import Precision
from alignbench.models import policy as policies
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, inference_memory, register
from alignbench.stages.tokens import TokenSpec, encode_pairs, encode_responses
from alignbench.store import Artifact, write_json, write_jsonl

log = logging.getLogger(__name__)

POOLINGS = ("last", "mean")
CENTRES = ("prompt", "all", "none")
LARGEST_DIMENSION = 256
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class FeaturesSpec:
    """Linear features of responses: hidden states of a frozen policy, centred, projected and scaled.

    Inputs by role: policy (the frozen reference), rows (pairs or responses). A bonus from these features is about
    differences of two responses to one prompt, in which whatever all responses to the prompt share cancels; left in,
    it only inflates the bonus of both. Hence the default centring. Where a prompt has a single pair it makes the two
    features opposite and their bonuses equal: then choose "all".

    Source: online PD-DPO (arXiv 2510.05703), linear scores <phi, theta>; phi as a projected hidden state is ours.

    Attributes:
        table: "pairs" (all splits) or "responses".
        dimension: d, 1 to 256; a policy with fewer hidden units keeps them all, unprojected.
        tokens: Template and lengths.
        dtype: Parameter dtype.
        pooling: "last": the state at the last response token; "mean": the mean over response tokens.
        centre: What is subtracted: "prompt" (mean over the table's responses to that prompt), "all" (mean over the
            table) or "none".
        projection_seed: Decides the projection, independent of the run's seed: rounds must share their features.
    """

    table: str
    dimension: int
    tokens: TokenSpec
    dtype: str
    pooling: str = "last"
    centre: str = "prompt"
    projection_seed: int = 0


def _features(ctx: Context) -> None:
    from safetensors.numpy import save_file

    spec: FeaturesSpec = ctx.spec
    _check_features_spec(spec)
    folder = ctx.inputs["policy"].path("policy")
    hardware, device = ctx.runtime.hardware, device_of(ctx.runtime.hardware)
    tokenizer = policies.load_tokenizer(folder)
    table = _pairs(ctx, tokenizer) if spec.table == "pairs" else _responses(ctx, tokenizer)
    started = time.perf_counter()
    with peak_memory(ctx.cost, device):
        states = pooled_states(
            policies.load_policy(folder, dtype_of(hardware), device),
            table.rows,
            pooling=spec.pooling,
            pad_id=policies.pad_id(tokenizer),
            batch=hardware.eval_batch,
            device=device,
        )
    if not np.isfinite(states).all():
        raise DataError(
            f"{int((~np.isfinite(states)).any(1).sum())} hidden state(s) are not finite",
            where=f"features of {spec.table}",
            mend="use hardware.dtype=fp32, or look at the policy's weights",
        )
    features, scale = reduce_states(states, table.prompts, spec)
    # dropped responses have all zeros: no bonus, and no part in any sum
    full = np.zeros((table.columns * table.count, features.shape[1]))
    full[table.index] = features
    parts = full.reshape(table.columns, table.count, -1)
    names = [f"response_{k}" for k in range(table.columns)] if spec.table == "pairs" else ["response"]
    save_file({name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}, ctx.out / _FEATURES)
    write_json(ctx.out / "truncation.json", table.report.to_dict())
    write_json(
        ctx.out / "summary.json",
        {
            "rows": table.count,
            "dropped": table.count - len(table.index) // table.columns,
            "hidden_size": states.shape[1],
            "dimension": features.shape[1],
            "scale": scale,
            "mean_norm": float(np.linalg.norm(features, axis=1).mean()),
        },
    )
    ctx.cost["scored_tokens"] = float(sum(len(row.ids) for row in table.rows))
    ctx.cost["seconds"] = time.perf_counter() - started


_FEATURES = "features.safetensors"


@dataclass(frozen=True)
class _Table:
    """Token rows of all usable responses, response 0 of every pair first.

    Attributes:
        rows: Token rows, n of them.
        prompts: Each one's prompt, n of them.
        index: (n,) position of each in the flattened (columns, count) table.
        columns: 2 for pairs, 1 for responses.
        count: Rows of the table on disk, dropped ones included.
        report: What truncation did.
    """

    rows: list[Row]
    prompts: list[str]
    index: np.ndarray
    columns: int
    count: int
    report: TruncationReport


def _pairs(ctx: Context, tokenizer: Any) -> _Table:
    rows = ctx.inputs["rows"].jsonl("pairs.jsonl")
    pairs = encode_pairs(rows, range(len(rows)), tokenizer, ctx.spec.tokens)
    prompts = [rows[i]["prompt"] for i in pairs.index]
    single = len(set(prompts)) == len(prompts)
    if single and ctx.spec.centre == "prompt":
        log.warning(
            "features: every prompt has one pair, so centring by prompt makes both bonuses of a pair equal and the "
            "bonus does nothing; sample more pairs per prompt, or set centre=all"
        )
    index = np.concatenate([pairs.index, len(rows) + pairs.index])
    return _Table([*pairs.responses[0], *pairs.responses[1]], prompts * 2, index, 2, len(rows), pairs.report)


def _responses(ctx: Context, tokenizer: Any) -> _Table:
    rows = ctx.inputs["rows"].jsonl("responses.jsonl")
    encoded = encode_responses(rows, tokenizer, ctx.spec.tokens)
    kept = [i for i, row in enumerate(encoded) if row.response_length > 0]
    if not kept:
        raise DataError(
            f"all {len(rows)} responses are empty", where="features of responses", mend="look at the policy's samples"
        )
    report = TruncationReport(n=len(rows), dropped=len(rows) - len(kept))
    prompts = [rows[i]["prompt_id"] for i in kept]
    return _Table([encoded[i] for i in kept], prompts, np.array(kept, dtype=np.int64), 1, len(rows), report)


def _check_features_spec(spec: FeaturesSpec) -> None:
    for name, value, known in (
        ("table", spec.table, ("pairs", "responses")),
        ("pooling", spec.pooling, POOLINGS),
        ("centre", spec.centre, CENTRES),
    ):
        if value not in known:
            raise ConfigError(f"{name} = {value!r}", where=f"features: {name}", mend=f"one of: {', '.join(known)}")
    if not 1 <= spec.dimension <= LARGEST_DIMENSION:
        raise ConfigError(
            f"dimension = {spec.dimension}",
            where="features: dimension",
            mend=f"1 to {LARGEST_DIMENSION}: the bonus keeps a dense matrix of dimension^2",
        )


def pooled_states(
    policy: Any, rows: Sequence[Row], *, pooling: str, pad_id: int, batch: int, device: torch.device
) -> np.ndarray:
    """One vector per sequence from the policy's last hidden layer (the one that its output head reads).

    Args:
        policy: A causal language model in evaluation mode.
        rows: Sequences with at least one response token each.
        pooling: "last" or "mean", see `FeaturesSpec`.
        pad_id: Any valid token id; padded positions are masked by length.
        batch: Sequences per forward pass.
        device: Where the policy is.

    Returns:
        float64 (len(rows), hidden), in the order of `rows`.
    """
    result: np.ndarray | None = None
    with torch.inference_mode(), progress(len(rows), "features", "seq") as bar:
        for indices in length_sorted(rows, batch):
            tensors = collate([rows[i] for i in indices], pad_id).to(device)
            # the backbone alone: the head's logits over the vocabulary would be thrown away
            states = policy.base_model(
                input_ids=tensors.input_ids, attention_mask=tensors.attention_mask, use_cache=False
            ).last_hidden_state.double()
            mask = tensors.response_mask
            if pooling == "last":
                mask = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
            pooled = torch.where(mask.unsqueeze(-1), states, 0.0).sum(1) / mask.sum(1, keepdim=True)
            if result is None:
                result = np.full((len(rows), pooled.shape[1]), np.nan)
            result[indices] = pooled.cpu().numpy()
            bar.update(len(indices))
    assert result is not None  # both tables refuse to be empty
    return result


def reduce_states(states: np.ndarray, prompts: Sequence[str], spec: FeaturesSpec) -> tuple[np.ndarray, float]:
    """Centre, project and scale hidden states.

    Args:
        states: float64 (n, hidden).
        prompts: Prompt of each row, (n,).
        spec: Centring, dimension and seed of the projection.

    Returns:
        Features, float64 (n, min(dimension, hidden)), the largest of norm 1 (or all zero), and the factor that
        scaled them.
    """
    features = states
    if spec.centre != "none":
        groups = prompts if spec.centre == "prompt" else ["all"] * len(prompts)
        _, group = np.unique(groups, return_inverse=True)
        sums = np.zeros((int(group.max()) + 1, states.shape[1]))
        np.add.at(sums, group, states)
        features = states - (sums / np.bincount(group)[:, None])[group]
    if spec.dimension < states.shape[1]:
        # An orthonormal basis of a random subspace. Its columns' signs, which differ between LAPACKs, change no bonus.
        rng = np.random.default_rng(derive_seed(spec.projection_seed, "features"))
        basis, _ = np.linalg.qr(rng.normal(size=(states.shape[1], spec.dimension)))
        features = features @ basis
    largest = float(np.linalg.norm(features, axis=1).max())
    scale = 1.0 / largest if largest > 0 else 1.0
    return features * scale, scale


def _features_estimate(
    spec: FeaturesSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    rows, parameters = inputs["rows"], inputs["policy"].parameters
    tokens = rows.rows * rows.tokens
    per_row = rows.tokens / 2 if spec.table == "pairs" else rows.tokens
    return Estimate(
        Facts(rows=rows.rows),
        scored_tokens=tokens,
        flops=2 * parameters * tokens,
        memory_bytes=inference_memory(parameters, runtime.hardware.eval_batch * per_row, runtime),
        overhead_seconds=1.0,
    )


FEATURES = register(Stage("features", 1, "features", FeaturesSpec, _features, _features_estimate))


# ---------------------------------------------------------------- bonuses


@dataclass(frozen=True)
class BonusSpec:
    """Exploration bonus ||phi||_{Sigma^-1} of both responses of every pair; its weight belongs to the prefer stage.

    Inputs by role: pairs, features (of these pairs). Sigma = ridge I + sum d d^T over the training split, d the
    difference of a pair's features.

    Source: online PD-DPO (arXiv 2510.05703), b = alpha ||phi||_{Sigma^-1}.

    Attributes:
        ridge: gamma > 0. Features have norm at most 1, so the bonus is at most 1 / sqrt(ridge).
    """

    ridge: float


def _bonus(ctx: Context) -> None:
    from safetensors.numpy import load_file, save_file

    pairs, artifact = ctx.inputs["pairs"], ctx.inputs["features"]
    if artifact.manifest["inputs"].get("rows") != pairs.key:
        raise InvariantError(
            f"the features were made from rows {artifact.manifest['inputs'].get('rows')}, not from these pairs",
            where=f"bonus: features {artifact.key[:12]}, pairs {pairs.key[:12]}",
            mend="pass the features of these very pairs",
        )
    rows, table = pairs.jsonl("pairs.jsonl"), load_file(artifact.path(_FEATURES))
    sides = [table.get(f"response_{k}") for k in (0, 1)]
    if any(side is None or len(side) != len(rows) for side in sides):
        raise InvariantError(
            f"the features hold {', '.join(table)}, not two responses of each of {len(rows)} pairs",
            where=f"bonus: features {artifact.key[:12]}",
            mend="make the features with table=pairs",
        )
    started = time.perf_counter()
    first, second = (np.asarray(side) for side in sides)
    train = np.array([row["split"] == "train" for row in rows])
    used = train & ((first != 0).any(1) | (second != 0).any(1))
    precision = Precision(first.shape[1], ctx.spec.ridge)
    precision.add_all((first - second)[used])
    bonus = np.stack([precision.norm(first), precision.norm(second)], 1)
    save_file(
        {f"bonus_{k}": np.ascontiguousarray(bonus[:, k]) for k in (0, 1)},
        ctx.out / "bonus.safetensors",
    )
    shown = bonus[used] if used.any() else bonus
    write_json(
        ctx.out / "summary.json",
        {
            "pairs": len(rows),
            "pairs_in_sigma": precision.count,
            "mean": float(shown.mean()),
            "mean_absolute_difference": float(np.abs(shown[:, 0] - shown[:, 1]).mean()),
            "quantiles": {f"{q:g}": float(np.quantile(shown, q)) for q in QUANTILES},
            "largest_possible": float(ctx.spec.ridge**-0.5),
        },
    )
    ctx.cost["seconds"] = time.perf_counter() - started


BONUS = register(
    Stage(
        "bonus",
        1,
        "bonus",
        BonusSpec,
        _bonus,
        lambda spec, inputs, runtime, hints: Estimate(Facts(rows=inputs["pairs"].rows)),
    )
)


# ---------------------------------------------------------------- several tables as one


@dataclass(frozen=True)
class JoinSpec:
    """Pairs tables one after another: inputs part_0, part_1, ... and, with `labels`, labels_0, labels_1, ...

    Attributes:
        labels: Also join the parts' labels: the artifact then serves as pairs and as labels of a prefer stage.
    """

    labels: bool = False


def _join(ctx: Context) -> None:
    from safetensors.numpy import load_file, save_file

    parts = _numbered(ctx, "part")
    tables = [part.jsonl("pairs.jsonl") for part in parts]
    rows = [row for table in tables for row in table]
    _check_one_split(rows)
    report: dict[str, Any] = {"n_rows": len(rows), "parts": [len(table) for table in tables]}
    if ctx.spec.labels:
        labels = _numbered(ctx, "labels")
        if len(labels) != len(parts):
            raise ConfigError(
                f"{len(labels)} labels for {len(parts)} parts", where="join", mend="give every part its labels"
            )
        loaded = []
        for number, (part, artifact, table) in enumerate(zip(parts, labels, tables, strict=True)):
            found = load_file(artifact.path("labels.safetensors"))
            own = artifact.key == part.key or part.key in artifact.manifest["inputs"].values()
            if not own or any(len(found[name]) != len(table) for name in ("preferred", "probability")):
                raise InvariantError(
                    f"labels_{number} ({artifact.key[:12]}) are not those of part_{number} ({part.key[:12]})",
                    where=f"join: labels made from {artifact.manifest['inputs']}",
                    mend="pass the parts and their labels in the same order",
                )
            loaded.append(found)
        save_file(
            {name: np.concatenate([found[name] for found in loaded]) for name in ("preferred", "probability")},
            ctx.out / "labels.safetensors",
        )
    write_jsonl(ctx.out / "pairs.jsonl", rows)
    write_json(ctx.out / "report.json", report)


def _numbered(ctx: Context, role: str) -> list[Artifact]:
    """Inputs role_0, role_1, ... in order of their numbers (part_10 comes after part_9)."""
    count = sum(name.rpartition("_")[0] == role for name in ctx.inputs)
    wanted = [f"{role}_{n}" for n in range(count)]
    if not count or any(name not in ctx.inputs for name in wanted):
        raise ConfigError(
            f"the inputs are {', '.join(ctx.inputs) or 'none'}",
            where="join",
            mend=f"number them without a gap: {role}_0, {role}_1, ...",
        )
    return [ctx.inputs[name] for name in wanted]


def _check_one_split(rows: list[dict[str, Any]]) -> None:
    """A prompt that one part trains on and another holds out would leak."""
    found: dict[str, str] = {}
    for row in rows:
        if found.setdefault(row["prompt"], row["split"]) != row["split"]:
            raise InvariantError(
                f"a prompt is in split {found[row['prompt']]} of one part and {row['split']} of another",
                where=f"join: prompt {row['prompt'][:60]!r}",
                mend="split all parts by the same prompts and seed",
            )


def _join_estimate(
    spec: JoinSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    parts = [facts for role, facts in inputs.items() if role.startswith("part_")]
    rows = sum(part.rows for part in parts)
    return Estimate(Facts(rows=rows, tokens=sum(part.rows * part.tokens for part in parts) / max(rows, 1)))


JOIN = register(Stage("join", 1, "pairs", JoinSpec, _join, _join_estimate))
