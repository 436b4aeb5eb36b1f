"""The stage that trains on preferences: DPO, IPO or KTO against a stated reference."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignbench.config import LoraConfig, TrainConfig
from alignbench.data.schema import label_column
from alignbench.engine.objectives import KtoObjective, Objective, PairObjective
from alignbench.errors import ConfigError, DataError, InvariantError
from alignbench.jsonio import LATER, write_json, write_jsonl
from alignbench.losses import PairLoss, pair_loss
from alignbench.models import policy as policies
from alignbench.problem import ratio_from_lambda
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register
from alignbench.stages.tokens import TokenSpec, mismatched_rows, split_pairs
from alignbench.stages.training import train_and_save, training_estimate
from alignbench.store import Artifact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferSpec:
    """Preference training against a stated reference.

    Inputs by role: start, reference (policies), pairs, reference_logprobs; optional are

    - labels: labels.safetensors with preferred, int64 (rows,), and probability, float64 (rows,), the P(response 1 is
      the better one), aligned with pairs.jsonl; they replace the objective's label column;
    - bonus: bonus.safetensors with bonus_0 and bonus_1, float64 (rows,), aligned with pairs.jsonl;
    - multipliers: multipliers.json, {"multipliers": {utility: lambda}}.

    Attributes:
        objective: "reward" or a utility: which label column decides, unless there is an input labels.
        loss: "dpo", "ipo" or "kto".
        beta: KL weight of this stage; with `ratio_of` the problem's beta, and the stage's is beta / lambda.
        train: Optimiser settings.
        lora: Fresh adapters on the start policy, or rank 0 for all weights.
        tokens: Template and lengths.
        dtype: Parameter dtype.
        kto_labels: "preferred" (chosen desirable, other undesirable) or "is_safe" (each response's own flag).
        kto_balance: Weight undesirable examples by n_desirable / n_undesirable (released SACPO code).
        soft: Train on the probabilities of the input labels and not on the labels drawn from them (DPO only).
        bonus_weight: alpha >= 0: alpha * bonus is added to the score that the policy learns (online PD-DPO; DPO only).
        ratio_of: Utility whose lambda, from the input multipliers, divides beta; None takes beta as it is.
        round: Which round of an iterative method this is; its pairs' order goes on where the round before ended.
        smallest_multiplier: With `ratio_of`, a lambda up to this trains nothing and returns the reference.
        optimizer: `hardware.optimizer`; 8-bit moments change the numbers.
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
    soft: bool = False
    bonus_weight: float = 0.0
    ratio_of: str | None = None
    smallest_multiplier: float = 1e-3
    round: int = 0
    optimizer: str = field(default="adamw", metadata={LATER: True})


@dataclass(frozen=True)
class _Signals:
    """What decides about each row of pairs.jsonl.

    Attributes:
        preferred: int64 (rows,): the chosen side; with soft labels the likelier one.
        wrong: float64 (rows,): P(the other side is the better one), or None for hard labels.
        bonus: float64 (rows, 2): weighted bonus of both responses, or None.
    """

    preferred: np.ndarray
    wrong: np.ndarray | None
    bonus: np.ndarray | None


def _prefer(ctx: Context) -> None:
    spec: PreferSpec = ctx.spec
    _check_roles(ctx)
    _check_cache(ctx)
    beta = _stage_beta(ctx)
    if beta is None:
        _hand_on_reference(ctx)
        return
    folder = ctx.inputs["start"].path("policy")
    tokenizer = policies.load_tokenizer(folder)
    rows = ctx.inputs["pairs"].jsonl("pairs.jsonl")
    signals = _signals(ctx, rows)
    objectives = {
        split: _objective(spec, beta, rows, signals, split, tokenizer, ctx) for split in ("train", "validation")
    }
    if objectives["train"] is None:
        raise DataError("there is no training pair", where="the pairs' split column", mend="lower the held-out shares")
    train_and_save(ctx, folder, tokenizer, objectives["train"], objectives["validation"])


# ---------------------------------------------------------------- what belongs together


def _check_roles(ctx: Context) -> None:
    """Refuse settings without the input they speak of, and the reverse."""
    spec: PreferSpec = ctx.spec
    if spec.soft and "labels" not in ctx.inputs:
        raise ConfigError(
            "soft labels need probabilities", where="prefer: soft", mend="pass the input labels, or set soft=False"
        )
    if spec.bonus_weight and "bonus" not in ctx.inputs:
        raise ConfigError(
            f"bonus_weight = {spec.bonus_weight}, but there is no bonus",
            where="prefer: bonus_weight",
            mend="pass the input bonus, or set bonus_weight=0",
        )
    if not (np.isfinite(spec.bonus_weight) and spec.bonus_weight >= 0):
        raise ConfigError(
            f"bonus_weight = {spec.bonus_weight}", where="prefer: bonus_weight", mend="a finite number >= 0"
        )
    if (spec.ratio_of is None) != ("multipliers" not in ctx.inputs):
        raise ConfigError(
            f"ratio_of = {spec.ratio_of} {'with' if 'multipliers' in ctx.inputs else 'without'} an input multipliers",
            where="prefer: ratio_of",
            mend="give both, or neither",
        )
    if pair_loss(spec.loss) is not PairLoss.dpo and (spec.soft or spec.bonus_weight):
        raise ConfigError(
            f"soft labels and bonuses are defined for dpo, not for {spec.loss}",
            where="prefer: loss",
            mend="use loss=dpo, or soft=False and bonus_weight=0",
        )


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


# ---------------------------------------------------------------- the KL weight


def _stage_beta(ctx: Context) -> float | None:
    """This stage's KL weight; None where lambda is as good as 0 and there is nothing to train."""
    spec: PreferSpec = ctx.spec
    if spec.ratio_of is None:
        return spec.beta
    found = ctx.inputs["multipliers"].json("multipliers.json")["multipliers"]
    if spec.ratio_of not in found:
        raise ConfigError(
            f"there is no multiplier of {spec.ratio_of}",
            where="prefer: ratio_of",
            mend=f"the input multipliers has: {', '.join(sorted(found)) or 'none'}",
        )
    multiplier = float(found[spec.ratio_of])
    if not (np.isfinite(multiplier) and multiplier >= 0):
        raise InvariantError(
            f"the multiplier of {spec.ratio_of} is {multiplier}",
            where=f"prefer: multipliers {ctx.inputs['multipliers'].key[:12]}",
            mend="a multiplier is a finite number >= 0: look at the dual step that made it",
        )
    return None if multiplier <= spec.smallest_multiplier else ratio_from_lambda(spec.beta, multiplier)


def _hand_on_reference(ctx: Context) -> None:
    """At lambda = 0 the KL weight beta / lambda is infinite, and the optimum is the reference itself."""
    spec: PreferSpec = ctx.spec
    log.info(
        "prefer: lambda of %s is at most %g, so beta / lambda has no bound and the optimum is the reference: "
        "its weights are handed on and nothing is trained",
        spec.ratio_of,
        spec.smallest_multiplier,
    )
    source, target = ctx.inputs["reference"].path("policy"), ctx.out / "policy"
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    write_jsonl(ctx.out / "log.jsonl", [])
    ctx.cost.update(trained_tokens=0.0, optimizer_steps=0.0)


# ---------------------------------------------------------------- labels and bonuses


def _signals(ctx: Context, rows: list[dict[str, Any]]) -> _Signals:
    spec: PreferSpec = ctx.spec
    bonus = None
    if spec.bonus_weight:
        table = _aligned(ctx, "bonus", "bonus.safetensors", ("bonus_0", "bonus_1"), len(rows))
        bonus = spec.bonus_weight * np.stack([table["bonus_0"], table["bonus_1"]], 1).astype(np.float64)
    if "labels" not in ctx.inputs:
        column = label_column(spec.objective)
        # test rows may lack the label: nothing trains on them
        return _Signals(np.array([row.get(column, -1) for row in rows]), None, bonus)
    table = _aligned(ctx, "labels", "labels.safetensors", ("preferred", "probability"), len(rows))
    preferred, probability = table["preferred"], table["probability"]
    if not np.isin(preferred, (0, 1)).all() or not ((probability >= 0) & (probability <= 1)).all():
        raise DataError(
            "labels hold a preferred side other than 0 and 1, or a probability outside [0, 1]",
            where=f"prefer: labels {ctx.inputs['labels'].key[:12]}",
            mend="make the labels again",
        )
    if not spec.soft:
        return _Signals(preferred, None, bonus)
    # the likelier side, and not the drawn one: the result is then a function of the probabilities alone
    return _Signals((probability > 0.5).astype(np.int64), np.minimum(probability, 1 - probability), bonus)


def _aligned(ctx: Context, role: str, file: str, columns: tuple[str, ...], count: int) -> dict[str, np.ndarray]:
    """Columns of an input with one number per row of pairs.jsonl."""
    from safetensors.numpy import load_file

    ctx.inputs[role].require_made_from(ctx.inputs["pairs"], f"prefer: {role}")
    table = load_file(ctx.inputs[role].path(file))
    absent = [name for name in columns if name not in table]
    wrong = {name: table[name].shape for name in columns if name not in absent and table[name].shape != (count,)}
    if absent or wrong:
        raise InvariantError(
            f"{file} lacks {', '.join(absent)}" if absent else f"{file} has the shapes {wrong}, for {count} pairs",
            where=f"prefer: {role} {ctx.inputs[role].key[:12]}",
            mend="it must hold one number per row of pairs.jsonl, in the same order",
        )
    bad = [name for name in columns if not np.isfinite(table[name]).all()]
    if bad:
        raise DataError(
            f"{', '.join(bad)} of {file} is not finite everywhere",
            where=f"prefer: {role} {ctx.inputs[role].key[:12]}",
            mend=f"make the {role} again and look at what it was made from",
        )
    return table


# ---------------------------------------------------------------- objectives


def _objective(
    spec: PreferSpec,
    beta: float,
    rows: list[dict[str, Any]],
    signals: _Signals,
    split: str,
    tokenizer: Any,
    ctx: Context,
) -> Objective | None:
    from safetensors.numpy import load_file

    cached: Artifact = ctx.inputs["reference_logprobs"]
    pairs = split_pairs(ctx.inputs["pairs"], rows, split, ctx.inputs["start"], tokenizer, spec.tokens)
    if pairs is None:
        return None
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
    preferred = signals.preferred[pairs.index]
    if not np.isin(preferred, (0, 1)).all():
        raise DataError(
            f"a pair has no label {label_column(spec.objective)}",
            where=f"pairs, split {split}",
            mend="label every pair for this objective, or pass the input labels",
        )
    if pair_loss(spec.loss).paired:
        each = range(len(preferred))
        bonus = None if signals.bonus is None else signals.bonus[pairs.index]
        return PairObjective(
            chosen=[pairs.responses[preferred[n]][n] for n in each],
            rejected=[pairs.responses[1 - preferred[n]][n] for n in each],
            reference=np.stack([reference[each, preferred], reference[each, 1 - preferred]], 1),
            name=spec.loss,
            beta=beta,
            wrong=None if signals.wrong is None else signals.wrong[pairs.index],
            offset=None if bonus is None else bonus[each, preferred] - bonus[each, 1 - preferred],
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
        beta=beta,
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
    return training_estimate(spec, inputs["start"], inputs["pairs"], runtime, hints, sequences=2)


PREFER = register(Stage("prefer", 1, "policy", PreferSpec, _prefer, _prefer_estimate, parallel=True))
