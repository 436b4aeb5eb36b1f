"""Stages of judging: `judge` asks, and keeps every answer as it came; `verdicts` aggregates."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.engine.runtime import derive_seed
from alignbench.errors import DataError, InvariantError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.judging import verdicts
from alignbench.judging.asking import Answer, AnswerCache, Comparison, Question, questions
from alignbench.judging.local import LocalClient, LocalJudge
from alignbench.judging.protocols import (
    COLUMNS,
    POLICY_FIRST,
    Protocol,
    Reading,
    compared,
    find_protocol,
    read_probabilities,
)
from alignbench.judging.server import ServerClient, ServerJudge
from alignbench.judging.settings import JudgeConfig
from alignbench.models import policy as policies
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register, scoring_estimate
from alignbench.store import Artifact

log = logging.getLogger(__name__)

#: Tokens of a question that a plan counts with: the task and two answers.
_QUESTION_TOKENS = 700.0


@dataclass(frozen=True)
class ScorerJudge:
    """A judge that compares scores: each comparison once, since order means nothing to it.

    Attributes:
        tie_margin: Differences up to this are ties, in the score's unit.
        kind: Tells it from other judges in keys.
    """

    tie_margin: float
    kind: str = "scorer"


@dataclass(frozen=True)
class JudgeSpec:
    """Who judges which answers, and how it is asked.

    Attributes:
        judge: Who.
        protocol: Name of the protocol.
        wording: Digest of its texts; empty where the judge reads none.
        criteria: What is judged.
        samples: Answers per prompt, the first ones.
        repeats: Times that each order is asked.
        temperature: Of the judge.
        max_tokens: Most tokens of its answer.
    """

    judge: ScorerJudge | LocalJudge | ServerJudge
    protocol: str
    wording: str
    criteria: tuple[str, ...]
    samples: int
    repeats: int
    temperature: float
    max_tokens: int

    @classmethod
    def of(
        cls, judge: ScorerJudge | LocalJudge | ServerJudge, protocol: Protocol, criteria: Sequence[str], samples: int
    ) -> JudgeSpec:
        """The spec of a protocol; what a scorer does not read is left out of its key."""
        if isinstance(judge, ScorerJudge):
            return cls(judge, "", "", tuple(criteria), samples, 1, 0.0, 1)
        return cls(
            judge,
            protocol.name,
            protocol.wording,
            tuple(criteria),
            samples,
            protocol.repeats,
            protocol.temperature,
            protocol.max_tokens,
        )


def _judge(ctx: Context) -> None:
    spec: JudgeSpec = ctx.spec
    started = time.perf_counter()
    pairs, tokens = _comparisons(ctx, spec.samples)
    rows = _scored(ctx, spec.judge) if isinstance(spec.judge, ScorerJudge) else _asked(ctx, spec.judge, pairs)
    write_jsonl(ctx.out / "judgements.jsonl", rows)
    write_jsonl(
        ctx.out / "comparisons.jsonl",
        [
            {"prompt_id": pair.prompt_id, "sample": pair.sample, "tokens": own, "opponent_tokens": other}
            for pair, (own, other) in zip(pairs, tokens, strict=True)
        ],
    )
    ctx.cost["judgements"] = float(len(rows))
    ctx.cost["seconds"] = time.perf_counter() - started


def _first(responses: Artifact, samples: int) -> list[int]:
    """Rows of the first `samples` answers to each prompt."""
    seen: dict[str, int] = {}
    kept = []
    for i, row in enumerate(responses.jsonl("responses.jsonl")):
        seen[row["prompt_id"]] = seen.get(row["prompt_id"], 0) + 1
        if seen[row["prompt_id"]] <= samples:
            kept.append(i)
    return kept


def _comparisons(ctx: Context, samples: int) -> tuple[list[Comparison], list[tuple[int, int]]]:
    """What is compared, and both answers' lengths in tokens."""
    tables = []
    for role in ("responses", "opponent_responses"):
        rows = ctx.inputs[role].jsonl("responses.jsonl")
        tables.append([rows[i] for i in _first(ctx.inputs[role], samples)])
    own, other = tables
    if [row["prompt_id"] for row in own] != [row["prompt_id"] for row in other]:
        raise InvariantError(
            "policy and opponent answered different prompts", where="judge", mend="sample both on one split"
        )
    pairs = [
        Comparison(a["prompt_id"], a["sample"], a["prompt"], a["response"], b["response"])
        for a, b in zip(own, other, strict=True)
    ]
    return pairs, [(len(a["response_ids"]), len(b["response_ids"])) for a, b in zip(own, other, strict=True)]


def _scored(ctx: Context, judge: ScorerJudge) -> list[dict[str, Any]]:
    """The judgements of a scorer, with the two scores as its words."""
    kept = _first(ctx.inputs["responses"], ctx.spec.samples)
    own, other = (ctx.inputs[role].jsonl("scores.jsonl") for role in ("scores", "opponent_scores"))
    rows = []
    for number, i in enumerate(kept):
        for criterion in ctx.spec.criteria:
            column = COLUMNS[criterion]
            if column not in own[i]:
                raise DataError(
                    f"the judge's scorer has no column {column!r}, by which {criterion} is judged; it has "
                    + ", ".join(own[i]),
                    where="judge.scorer",
                    mend="another scorer, or fewer judge.criteria",
                )
            scores = float(own[i][column]), float(other[i][column])
            question = Question(criterion, number, POLICY_FIRST, 0, [], 0.0, 1)
            reading = Reading(compared(*scores, judge.tie_margin), scores)
            rows.append(_row(question, Answer(f"{scores[0]!r} {scores[1]!r}"), reading))
    return rows


def _asked(ctx: Context, judge: LocalJudge | ServerJudge, pairs: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The judgements of a judge that reads."""
    spec: JudgeSpec = ctx.spec
    protocol = replace(
        find_protocol(spec.protocol), repeats=spec.repeats, temperature=spec.temperature, max_tokens=spec.max_tokens
    )
    access: JudgeConfig = ctx.runtime.locations["judge"]  # how it is reached from here; who it is, the spec says
    cache = AnswerCache(ctx.work / "answers" if access.cache is None else Path(access.cache))
    asked = questions(protocol, spec.criteria, pairs)
    client: LocalClient | ServerClient
    if isinstance(judge, LocalJudge):
        folder = ctx.work / "judge"
        shutil.rmtree(folder, ignore_errors=True)  # a killed attempt may have left half of it
        assert access.local is not None  # by validation
        policies.bring_in(access.local.path, access.local.revision, folder)
        client = LocalClient(judge, folder, ctx.runtime.hardware)
    else:
        assert access.server is not None  # by validation
        client = ServerClient(judge, access.server)
    answers = client.ask(asked, cache, "judge")
    rows = [
        _row(question, answer, _read(judge, protocol, question, answer))
        for question, answer in zip(asked, answers, strict=True)
    ]
    missing = sum(row["outcome"] is None for row in rows)
    if missing:
        example = next(row["text"] for row in rows if row["outcome"] is None)
        log.warning("%d of %d answers of the judge cannot be read (the first: %.80r)", missing, len(rows), example)
    ctx.cost["judge_cost"] = math.fsum(answer.paid for answer in answers)
    ctx.cost["judge_tokens"] = float(sum(answer.tokens for answer in answers))
    return rows


def _read(judge: LocalJudge | ServerJudge, protocol: Protocol, question: Question, answer: Answer) -> Reading | None:
    if answer.reason is not None:
        return None
    if isinstance(judge, LocalJudge) and judge.read == "probability":
        import json

        outcome = read_probabilities(json.loads(answer.text), judge.least_mass)
        return None if outcome is None else Reading(outcome)
    return protocol.read(question.criterion, answer.text)


def _row(question: Question, answer: Answer, reading: Reading | None) -> dict[str, Any]:
    """One judgement as it is kept: the raw text always, what was read from it where it could be."""
    return {
        "criterion": question.criterion,
        "comparison": question.comparison,
        "order": question.order,
        "repeat": question.repeat,
        "text": answer.text,
        "outcome": None if reading is None else list(reading.outcome),
        "scores": None if reading is None or reading.scores is None else list(reading.scores),
        "missing": (answer.reason or "unreadable") if reading is None else None,
    }


def _judge_estimate(
    spec: JudgeSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, Any]
) -> Estimate:
    rows = hints["prompts"] * spec.samples * hints["asked"]
    if not isinstance(spec.judge, LocalJudge):
        return Estimate(Facts(rows=rows))
    length = min(_QUESTION_TOKENS, float(spec.judge.max_length))
    facts = Facts(parameters=hints["parameters"], shape=hints["shape"])
    return scoring_estimate(Facts(rows=rows, tokens=length), facts, runtime, longest=spec.judge.max_length)


JUDGE = register(Stage("judge", 1, "judgements", JudgeSpec, _judge, _judge_estimate))


@dataclass(frozen=True)
class VerdictsSpec:
    """How answers of a judge become numbers.

    Attributes:
        rule: How the judgements of a comparison are combined.
        tie: What a tie adds to the win rate.
        level: Two-sided coverage.
        resamples: Bootstrap draws.
    """

    rule: str
    tie: float
    level: float
    resamples: int


def _verdicts(ctx: Context) -> None:
    spec: VerdictsSpec = ctx.spec
    judged = ctx.inputs["judged"]
    compared_rows = judged.jsonl("comparisons.jsonl")
    prompts = np.array([row["prompt_id"] for row in compared_rows])
    longer = np.sign([row["tokens"] - row["opponent_tokens"] for row in compared_rows])
    rows = judged.jsonl("judgements.jsonl")
    options = verdicts.Options(spec.level, spec.resamples, derive_seed(ctx.seed, "bootstrap"))
    found: dict[str, Any] = {}
    for criterion in dict.fromkeys(row["criterion"] for row in rows):
        own = [row for row in rows if row["criterion"] == criterion]
        judgements = verdicts.Judgements.read(own)
        triples = verdicts.combine(spec.rule, judgements, len(prompts))
        result: dict[str, Any] = {
            **verdicts.win_tie_loss(triples, spec.tie, prompts, options),
            "repeat_std": verdicts.repeat_spread(judgements, spec.tie),
            "order_bias": verdicts.order_bias(judgements, prompts, options),
            "longer_preferred": verdicts.longer_preferred(triples, longer, prompts, options),
            "counts": _counts(own, triples),
            "per_prompt": _per_prompt(prompts, triples, judgements),
        }
        if "gold" in ctx.inputs:
            gold = _gold(ctx, criterion, judged)
            result["gold"] = verdicts.against_gold(triples, gold, longer, prompts, options)
        found[criterion] = result
    write_json(ctx.out / "verdicts.json", found)


def _counts(rows: Sequence[Mapping[str, Any]], triples: np.ndarray) -> dict[str, Any]:
    """How much was judged, and how much could not be read, by reason."""
    reasons = [row["missing"] for row in rows if row["missing"] is not None]
    return {
        "comparisons": len(triples),
        "comparisons_missing": int(np.isnan(triples[:, 0]).sum()),
        "judgements": len(rows),
        "judgements_missing": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


def _per_prompt(prompts: np.ndarray, triples: np.ndarray, judgements: verdicts.Judgements) -> dict[str, list[Any]]:
    """Sums by prompt: `verdicts` of comparisons (for ratings), `games` of single judgements (for sequential Elo)."""
    ids, owner = np.unique(prompts, return_inverse=True)
    columns: dict[str, list[Any]] = {"prompt_id": ids.tolist()}
    for name, values, index in (
        ("verdicts", triples, owner),
        ("games", judgements.triple, owner[judgements.comparison]),
    ):
        kept = ~np.isnan(values[:, 0])
        sums = [np.bincount(index[kept], values[kept, k], minlength=len(ids)) for k in range(3)]
        columns[name] = np.stack(sums, axis=1).tolist()
    return columns


def _gold(ctx: Context, criterion: str, judged: Artifact) -> np.ndarray:
    """Sign of the gold difference of every comparison, by the same rows that were judged."""
    samples = judged.manifest["spec"]["samples"]
    kept = _first(ctx.inputs["responses"], samples)
    own, other = (ctx.inputs[role].jsonl("scores.jsonl") for role in ("gold", "opponent_gold"))
    return np.sign([own[i][COLUMNS[criterion]] - other[i][COLUMNS[criterion]] for i in kept])


def _verdicts_estimate(
    spec: VerdictsSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, Any]
) -> Estimate:
    return Estimate(Facts(rows=inputs["judged"].rows), overhead_seconds=1.0)


VERDICTS = register(Stage("verdicts", 2, "verdicts", VerdictsSpec, _verdicts, _verdicts_estimate))
