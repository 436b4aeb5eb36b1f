"""Stages around score models: bring one in, train one, score tables by a configured scorer, judge what was learned."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.config import LoraConfig, TrainConfig
from alignbench.data.schema import label_column
from alignbench.data.score_text import RESPONSE, ScoreText, ScoreTokens, encode_texts, require_whole
from alignbench.engine.batching import Row
from alignbench.engine.runtime import device_of, dtype_of, peak_memory
from alignbench.engine.score_objectives import ScoreObjective
from alignbench.engine.scores import EndScores, Verdicts, sequence_scores
from alignbench.errors import DataError
from alignbench.jsonio import LATER, read_json, write_json, write_jsonl
from alignbench.models import policy as policies
from alignbench.models import score_models as models
from alignbench.models.scorers import find_scorer
from alignbench.problem import utility_from_cost
from alignbench.report.calibration import assess
from alignbench.scoring import BEAVER, CLASSIFIER, JUDGE, LEARNED, REGISTERED
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register, scoring_estimate
from alignbench.stages.training import train_and_save, training_estimate

# ---------------------------------------------------------------- score models as artifacts


@dataclass(frozen=True)
class BringScorerSpec:
    """A score model from outside, by content.

    Attributes:
        fingerprint: Hash of its files, or hub id with revision.
        kind: Its format.
    """

    fingerprint: str
    kind: str


def _bring(ctx: Context) -> None:
    path, revision = ctx.runtime.locations["scorers"][ctx.spec.fingerprint]
    folder = ctx.out / "scorer"
    policies.bring_in(path, revision, folder, ends=ctx.spec.kind != CLASSIFIER)
    models.check_format(folder, ctx.spec.kind, path)


BRING_SCORER = register(
    Stage(
        "bring_scorer",
        1,
        "scorer",
        BringScorerSpec,
        _bring,
        lambda spec, inputs, runtime, hints: Estimate(
            Facts(parameters=hints["parameters"], shape=hints["shape"]), overhead_seconds=1.0
        ),
    )
)


@dataclass(frozen=True)
class TrainScorerSpec:
    """A reward or cost model trained on preference pairs, from a policy's decoder with a fresh head.

    Inputs by role: start (policy), pairs.

    Attributes:
        objective: Whose labels decide: "reward" or a utility.
        score_type: "reward" (preferences only), or "cost" (and the signs of safety flags).
        train: Optimiser settings.
        lora: Adapters (the head is trained whole beside them), or rank 0 for all weights.
        tokens: How texts are written and cut.
        regularization: Weight of the mean square of the scores.
        dtype: Parameter dtype.
        optimizer: `hardware.optimizer`; 8-bit moments change the numbers.
    """

    objective: str
    score_type: str
    train: TrainConfig
    lora: LoraConfig
    tokens: ScoreText
    regularization: float
    dtype: str
    optimizer: str = field(default="adamw", metadata={LATER: True})


def _train_scorer(ctx: Context) -> None:
    spec: TrainScorerSpec = ctx.spec
    folder = ctx.inputs["start"].path("policy")
    tokenizer = policies.load_tokenizer(folder)
    rows = ctx.inputs["pairs"].jsonl("pairs.jsonl")
    reports: dict[str, Any] = {}
    goals = {split: _objective(spec, rows, split, tokenizer, reports) for split in ("train", "validation")}
    if goals["train"] is None:
        raise DataError("there is no training pair", where="the pairs' split column", mend="lower the held-out shares")
    write_json(ctx.out / "truncation.json", reports["train"])
    load = partial(models.fresh_score_model, score_type=spec.score_type)
    train_and_save(
        ctx, folder, tokenizer, goals["train"], goals["validation"], load=load, reads=EndScores, name="scorer"
    )


def _objective(
    spec: TrainScorerSpec, rows: list[dict[str, Any]], split: str, tokenizer: Any, reports: dict[str, Any]
) -> ScoreObjective | None:
    """The pairs of one split; those that truncation makes equal, or takes an answer from, teach nothing."""
    wanted = [row for row in rows if row["split"] == split]
    if not wanted:
        return None
    column = label_column(spec.objective)
    flags = [f"is_response_{k}_safe" for k in (0, 1)] if spec.score_type == models.COST else []
    _require(wanted, [column, *flags], split)
    prompts = [row["prompt"] for row in wanted for _ in (0, 1)]
    texts = [row[f"response_{k}"] for row in wanted for k in (row[column], 1 - row[column])]
    tokens = encode_texts(tokenizer, prompts, texts, spec.tokens)
    encoded, lost = rows_of(tokens), set(tokens.lost)
    pairs = ((n, 2 * n, 2 * n + 1) for n in range(len(wanted)))
    kept = [n for n, a, b in pairs if not {a, b} & lost and tokens.ids[a] != tokens.ids[b]]
    if not kept:
        raise DataError(
            f"all {len(wanted)} pairs lose an answer at max_length {spec.tokens.max_length}",
            where=f"scorer training, split {split}",
            mend="raise the column's max_length",
        )
    reports[split] = {"n": len(wanted), "truncated_responses": tokens.truncated, "dropped": len(wanted) - len(kept)}
    unsafe = None
    if flags:
        unsafe = np.array(
            [[not wanted[n][flags[k]] for k in (wanted[n][column], 1 - wanted[n][column])] for n in kept], dtype=bool
        )
    return ScoreObjective(
        [encoded[2 * n] for n in kept],
        [encoded[2 * n + 1] for n in kept],
        unsafe,
        spec.regularization,
        f"{spec.score_type} model of {spec.objective}",
    )


def _require(rows: list[dict[str, Any]], columns: list[str], split: str) -> None:
    for column in columns:
        bad = [i for i, row in enumerate(rows) if row.get(column) is None]
        if bad:
            raise DataError(
                f"{len(bad)} of {len(rows)} pairs have no {column}",
                where=f"scorer training, split {split}",
                mend="add the labels; a cost model needs both responses' safety flags, and larger_is=better trains a "
                "model on preferences alone",
            )


def _train_estimate(
    spec: TrainScorerSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    return training_estimate(spec, inputs["start"], inputs["pairs"], runtime, hints, sequences=2)


TRAIN_SCORER = register(
    Stage("train_scorer", 1, "scorer", TrainScorerSpec, _train_scorer, _train_estimate, parallel=True)
)


# ---------------------------------------------------------------- scoring


@dataclass(frozen=True)
class ColumnSpec:
    """One column of scores.

    Attributes:
        name: "reward" or a utility.
        kind: "registered", "beaver", "classifier", "judge" or "learned".
        source: Name of the registered scorer, or role of the input that holds the model.
        larger_is: "better", or "worse": the column is then its negative.
        read: "score", "probability" or "log_odds".
        label: Which of a classifier's labels.
        shift: Subtracted from what is read.
        text: What the model reads.
        verdicts: A judge's two verdicts.
    """

    name: str
    kind: str
    source: str
    larger_is: str
    read: str = "score"
    label: str | None = None
    shift: float = 0.0
    text: ScoreText | None = None
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreColumnsSpec:
    """Reward and utilities, each from its source.

    Attributes:
        columns: What is scored.
        table: "responses" (one number per score and row) or "pairs" (two: of response 0 and of response 1).
        dtype: Parameter dtype of the models.
    """

    columns: tuple[ColumnSpec, ...]
    table: str
    dtype: str


def _score_columns(ctx: Context) -> None:
    spec: ScoreColumnsSpec = ctx.spec
    rows = ctx.inputs["responses"].jsonl(f"{spec.table}.jsonl")
    sides = ("response_0", "response_1") if spec.table == "pairs" else ("response",)
    prompts = [row["prompt"] for row in rows for _ in sides]
    responses = [row[side] for row in rows for side in sides]
    started = time.perf_counter()
    found: dict[str, np.ndarray] = {}
    reports: dict[str, Any] = {}
    ctx.cost["scored_tokens"] = 0.0
    for column in spec.columns:
        if column.kind == REGISTERED:
            found[column.name] = np.asarray(find_scorer(column.source)(prompts, responses)[column.name], np.float64)
    with peak_memory(ctx.cost, device_of(ctx.runtime.hardware)):
        for role in dict.fromkeys(c.source for c in spec.columns if c.kind != REGISTERED):
            columns = [column for column in spec.columns if column.source == role and column.kind != REGISTERED]
            found |= _by_model(ctx, role, columns, prompts, responses, reports)
            gc.collect()  # models sit in reference cycles: the next one needs the room
    bad = {name: int((~np.isfinite(values)).sum()) for name, values in found.items()}
    if any(bad.values()):
        raise DataError(f"scores that are not finite: {bad}", where="score", mend="mend the scorer")
    names = [column.name for column in spec.columns]
    table = {name: found[name].reshape(len(rows), len(sides)).tolist() for name in names}
    paired = spec.table == "pairs"
    write_jsonl(
        ctx.out / "scores.jsonl",
        [{name: table[name][i] if paired else table[name][i][0] for name in names} for i in range(len(rows))],
    )
    if reports:
        write_json(ctx.out / "truncation.json", reports)
    ctx.cost["scored_responses"] = float(len(responses))
    ctx.cost["seconds"] = time.perf_counter() - started


def _by_model(
    ctx: Context,
    role: str,
    columns: Sequence[ColumnSpec],
    prompts: list[str],
    responses: list[str],
    reports: dict[str, Any],
) -> dict[str, np.ndarray]:
    """The columns that one model gives; it is loaded once, and reads every text once."""
    folder = ctx.inputs[role].path("scorer")
    hardware, device = ctx.runtime.hardware, device_of(ctx.runtime.hardware)
    kind = columns[0].kind
    tokenizer = policies.load_tokenizer(folder, ends=kind != CLASSIFIER)
    load = {CLASSIFIER: models.load_classifier, JUDGE: policies.load_policy}.get(kind, models.load_score_model)
    model = load(folder, dtype_of(hardware), device)
    raw: dict[Any, np.ndarray] = {}
    found = {}
    for column in columns:
        assert column.text is not None  # every model reads a text
        # of a hub model this is the first look at its config
        models.check_meaning(folder, kind, column.larger_is, column.label, f"scorer column {column.name}")
        asked = (column.text, column.verdicts)
        if asked not in raw:
            tokens = encode_texts(tokenizer, prompts, responses, column.text)
            require_whole(tokens, column.text, f"scorer {column.name}")
            reports[column.name] = {"n": len(tokens.ids), "truncated_responses": tokens.truncated}
            ctx.cost["scored_tokens"] += sum(map(len, tokens.ids))
            reader: EndScores | Verdicts = EndScores(model, hardware)
            if kind == JUDGE:
                end = column.text.template.split(RESPONSE)[1]
                verdicts = models.verdict_tokens(tokenizer, end, (column.verdicts[0], column.verdicts[1]), column.name)
                reader = Verdicts(model, hardware, verdicts)
            raw[asked] = sequence_scores(
                reader,
                rows_of(tokens),
                pad_id=policies.pad_id(tokenizer),
                hardware=hardware,
                device=device,
                label=f"scores {column.name}",
            )
        found[column.name] = read_column(column, raw[asked], folder)
    return found


def rows_of(tokens: ScoreTokens) -> list[Row]:
    """Token rows for packing: what texts of one prompt share is their prompt."""
    return [Row(ids, shared) for ids, shared in zip(tokens.ids, tokens.shared, strict=True)]


def read_column(column: ColumnSpec, raw: np.ndarray, folder: Path) -> np.ndarray:
    """A column (n,), larger = better, from a model's raw outputs (n, outputs)."""
    if column.kind in (BEAVER, LEARNED):
        value = models.normaliser_of(folder)(raw)[:, 0]
    elif column.kind == JUDGE:
        value = raw[:, 0] if column.read == "log_odds" else _sigmoid(raw[:, 0])
    else:
        value = _label(column, raw, read_json(folder / "config.json"))
    value = value - column.shift
    return value if column.larger_is == "better" else np.asarray(utility_from_cost(value))


def _label(column: ColumnSpec, raw: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    index = models.label_index(config, column.label, f"scorer {column.name}")
    own = raw[:, index]
    if column.read == "score":
        return own
    # one label, or several that exclude nothing: each is a yes or no of its own
    odds = own
    if raw.shape[1] > 1 and config.get("problem_type") != "multi_label_classification":
        odds = own - np.logaddexp.reduce(np.delete(raw, index, 1), axis=1)
    return odds if column.read == "log_odds" else _sigmoid(odds)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def _score_estimate(
    spec: ScoreColumnsSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    responses, sequences = inputs["responses"], 2 if spec.table == "pairs" else 1
    roles = {c.source: c for c in spec.columns if c.kind != REGISTERED}
    parts = [
        scoring_estimate(
            responses,
            inputs[role],
            runtime,
            sequences=sequences,
            longest=column.text.max_length if column.text else 0,
        )
        for role, column in roles.items()
    ]
    return Estimate(
        Facts(rows=responses.rows, tokens=responses.tokens),
        scored_tokens=sum(part.scored_tokens for part in parts),
        flops=sum(part.flops for part in parts),
        memory_bytes=max((part.memory_bytes for part in parts), default=0.0),  # one model at a time
        overhead_seconds=1.0 + sum(part.overhead_seconds for part in parts),
        pieces=tuple(piece for part in parts for piece in part.pieces),
    )


SCORE_COLUMNS = register(
    Stage(
        "score_columns",
        1,
        "scores",
        ScoreColumnsSpec,
        _score_columns,
        _score_estimate,
        parallel=lambda spec: any(column.kind != REGISTERED for column in spec.columns),
    )
)


# ---------------------------------------------------------------- what a learned scorer is worth


@dataclass(frozen=True)
class AssessSpec:
    """How good learned columns are on labelled pairs.

    Inputs by role: pairs, scores (of the pairs) and, in a world that has them, gold (scores of the pairs).

    Attributes:
        columns: (column, "reward" or "cost") of every learned one.
        bins: Bins of the reliability diagrams.
    """

    columns: tuple[tuple[str, str], ...]
    bins: int = 10


def _assess(ctx: Context) -> None:
    spec: AssessSpec = ctx.spec
    rows = ctx.inputs["pairs"].jsonl("pairs.jsonl")
    tables = {}
    for role in ("scores", "gold"):
        if role in ctx.inputs:
            ctx.inputs[role].require_made_from(ctx.inputs["pairs"], f"assess: {role}")
            tables[role] = ctx.inputs[role].jsonl("scores.jsonl")
    found: dict[str, Any] = {}
    for name, kind in spec.columns:
        utilities = np.array([row[name] for row in tables["scores"]], dtype=np.float64)
        gold = np.array([row[name] for row in tables["gold"]], dtype=np.float64) if "gold" in tables else None
        for split in ("train", "validation"):
            # of a data set whose tables have different labels, the pairs that have this one
            own = np.array([i for i, row in enumerate(rows) if row["split"] == split and label_column(name) in row])
            if len(own):
                found.setdefault(name, {"kind": kind})[split] = assess(
                    [rows[i] for i in own], name, utilities[own], kind == models.COST,
                    None if gold is None else gold[own], spec.bins,
                )  # fmt: skip
    write_json(ctx.out / "metrics.json", found)


ASSESS = register(
    Stage(
        "assess",
        2,
        "assessment",
        AssessSpec,
        _assess,
        lambda spec, inputs, runtime, hints: Estimate(Facts(rows=inputs["pairs"].rows)),
    )
)
