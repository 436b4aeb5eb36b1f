"""Stages that look at policies and change none: sample, score, logprobs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alignbench import memory
from alignbench.config import SamplingConfig
from alignbench.data.tokenize import TruncationReport
from alignbench.dataset import DATA_SCORER
from alignbench.engine import group, vllm_backend
from alignbench.engine.batching import Row
from alignbench.engine.generate import Request, generate
from alignbench.engine.logprobs import sequence_logprobs
from alignbench.engine.runtime import derive_seed, device_of, dtype_of, memory_left, peak_memory
from alignbench.errors import DataError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.models import policy as policies
from alignbench.models.scorers import find_scorer, is_shared
from alignbench.stages.data import WORLD_RESPONSE_TOKENS
from alignbench.stages.stage import (
    ROW_SECONDS,
    Context,
    Estimate,
    Facts,
    Runtime,
    Stage,
    load_seconds,
    piece_of,
    register,
    scoring_estimate,
)
from alignbench.stages.tokens import (
    TokenSpec,
    encode_responses,
    mismatch,
    mismatched_rows,
    prompt_ids,
    split_pairs,
)
from alignbench.stages.training import on_device


@dataclass(frozen=True)
class SampleSpec:
    """Responses of a policy to the prompts of some splits.

    Attributes:
        splits: Splits of the prompt table.
        samples: Responses per prompt.
        sampling: Temperature, top-p, most new tokens.
        tokens: Template and lengths.
        dtype: Parameter dtype.
        first: Number of the first sample; samples of other numbers are independent of these.
    """

    splits: tuple[str, ...]
    samples: int
    sampling: SamplingConfig
    tokens: TokenSpec
    dtype: str
    first: int = 0


def _sample(ctx: Context, with_vllm: bool = False) -> None:
    spec: SampleSpec = ctx.spec
    folder = ctx.inputs["policy"].path("policy")
    hardware, device = ctx.runtime.hardware, device_of(ctx.runtime.hardware)
    tokenizer = policies.load_tokenizer(folder)
    prompts = [p for p in ctx.inputs["data"].jsonl("prompts.jsonl") if p["split"] in spec.splits]
    if not prompts:
        raise DataError(
            f"no prompt in split {', '.join(spec.splits)}",
            where="prompts",
            mend="raise the split's share or size",
        )
    requests = [
        Request(p["prompt_id"], ids, k)
        for p in prompts
        for ids in (tuple(prompt_ids(tokenizer, p["prompt"], spec.tokens)),)
        for k in range(spec.first, spec.first + spec.samples)
    ]
    started = time.perf_counter()
    drawn: dict[str, Any] = {
        "sampling": spec.sampling,
        "eos_id": tokenizer.eos_token_id,
        "seed": derive_seed(ctx.seed, "sample"),
        "memory": memory_left(hardware, device),
    }
    with peak_memory(ctx.cost, device):
        if with_vllm:
            responses = vllm_backend.generate(folder, requests, hardware=hardware, **drawn)
        else:
            policy = policies.load_policy(folder, dtype_of(hardware), device)
            responses = generate(
                policy,
                requests,
                pad_id=policies.pad_id(tokenizer),
                batch=hardware.generation_batch,
                device=device,
                **drawn,
            )
    text = {p["prompt_id"]: p["prompt"] for p in prompts}
    write_jsonl(
        ctx.out / "responses.jsonl",
        [
            {
                "prompt_id": request.prompt_id,
                "prompt": text[request.prompt_id],
                "sample": request.sample,
                "response": tokenizer.decode(ids, skip_special_tokens=True),
                "response_ids": ids,
                "finished": bool(ids) and ids[-1] == tokenizer.eos_token_id,
            }
            for request, ids in zip(requests, responses, strict=True)
        ],
    )
    ctx.cost["generated_tokens"] = float(sum(map(len, responses)))
    ctx.cost["seconds"] = time.perf_counter() - started


def _sample_estimate(
    spec: SampleSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    rows = hints["prompts"] * spec.samples
    length = min(spec.sampling.max_new_tokens, WORLD_RESPONSE_TOKENS if spec.tokens.max_length <= 128 else 256)
    tokens, policy, hardware = rows * length, inputs["policy"], runtime.hardware
    prompt = inputs["data"].prompt or spec.tokens.max_prompt_length / 2
    at_once = min(hardware.generation_batch, rows)
    piece = piece_of(
        "sample",
        policy,
        prompt=prompt,
        response=length,
        sequences=spec.samples,
        rows=at_once,
        most=spec.sampling.max_new_tokens,
    )
    peak = memory.sampling_peak(
        policy.shape,
        policy.parameters,
        at_once,
        spec.tokens.max_prompt_length,
        spec.sampling.max_new_tokens,
        hardware,
        samples=spec.samples,
    )
    return Estimate(
        Facts(
            rows=rows,
            tokens=length + prompt,
            prompt=prompt,
            per_prompt=spec.samples,
            trained_share=hints.get("trained_share", 1.0),
        ),
        generated_tokens=tokens,
        flops=2 * policy.parameters * (tokens + hints["prompts"] * prompt),
        memory_bytes=memory.OVERHEAD[hardware.device] + peak,
        overhead_seconds=load_seconds(policy, hardware) + ROW_SECONDS * rows,
        pieces=() if piece is None else ((piece, rows / piece.rows),),
    )


SAMPLE = register(Stage("sample", 1, "responses", SampleSpec, _sample, _sample_estimate, parallel=True))
# a stage of its own: of the same spec and seed vLLM makes other samples
SAMPLE_VLLM = register(
    Stage("sample_vllm", 1, "responses", SampleSpec, lambda ctx: _sample(ctx, with_vllm=True), _sample_estimate)
)


@dataclass(frozen=True)
class ScoreSpec:
    """Reward and utilities by a named scorer.

    Attributes:
        scorer: Its name.
        table: "responses" (one number per score and row) or "pairs" (two: of response 0 and of response 1).
    """

    scorer: str
    table: str = "responses"


def _score(ctx: Context) -> None:
    paired = ctx.spec.table == "pairs"
    rows = ctx.inputs["responses"].jsonl(f"{ctx.spec.table}.jsonl")
    prompts = [r["prompt"] for r in rows]
    started = time.perf_counter()
    columns = ("response_0", "response_1") if paired else ("response",)
    batch = ctx.runtime.hardware.eval_batch
    if ctx.spec.scorer == DATA_SCORER and all("scores" in row for row in rows):
        sides = _own_scores(rows, paired)
    else:
        sides = [_finite_scores(ctx.spec.scorer, prompts, [r[column] for r in rows], batch) for column in columns]
    write_jsonl(
        ctx.out / "scores.jsonl",
        [
            {
                name: [float(side[name][i]) for side in sides] if paired else float(sides[0][name][i])
                for name in sides[0]
            }
            for i in range(len(rows))
        ],
    )
    ctx.cost["scored_responses"] = float(len(rows) * len(sides))
    ctx.cost["seconds"] = time.perf_counter() - started


def _own_scores(rows: Sequence[Mapping[str, Any]], paired: bool) -> list[dict[str, np.ndarray]]:
    """The scores that rows carry: a number each, of pairs two."""
    names = list(rows[0]["scores"])
    if not paired:
        return [{name: np.array([row["scores"][name] for row in rows]) for name in names}]
    return [{name: np.array([row["scores"][name][k] for row in rows]) for name in names} for k in (0, 1)]


def _finite_scores(scorer: str, prompts: list[str], responses: list[str], batch: int) -> dict[str, np.ndarray]:
    """Scores of every response, a batch at a time where ranks share the work."""
    score = find_scorer(scorer)
    if group.world() == 1:
        scores = score(prompts, responses)
    else:

        def some(rows: Sequence[int]) -> list[dict[str, float]]:
            found = score([prompts[i] for i in rows], [responses[i] for i in rows])
            return [{name: float(values[i]) for name, values in found.items()} for i in range(len(rows))]

        parts = [range(start, min(start + batch, len(prompts))) for start in range(0, len(prompts), batch)]
        rows = group.spread(parts, some)
        scores = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else {})}
    for name, values in scores.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise DataError(
                f"scorer {scorer!r} gave {len(bad)} {name} value(s) that are not finite",
                where=f"response rows {bad[:3].tolist()}",
                mend="mend the scorer, or drop those responses",
            )
    return scores


SCORE = register(
    Stage(
        "score",
        1,
        "scores",
        ScoreSpec,
        _score,
        lambda spec, inputs, runtime, hints: Estimate(
            inputs["responses"], overhead_seconds=ROW_SECONDS * inputs["responses"].rows
        ),
        parallel=lambda spec: is_shared(spec.scorer),
    )
)


@dataclass(frozen=True)
class LogProbsSpec:
    """Log-probs of a table's responses under a policy.

    Attributes:
        table: "pairs" (training and validation splits) or "responses".
        tokens: Template and lengths.
        dtype: Parameter dtype.
        mismatched: Also of each prompt with another prompt's response (KTO's KL estimate).
    """

    table: str
    tokens: TokenSpec
    dtype: str
    mismatched: bool = False


def _logprobs(ctx: Context) -> None:
    from safetensors.numpy import save_file

    spec: LogProbsSpec = ctx.spec
    folder = ctx.inputs["policy"].path("policy")
    hardware, device = ctx.runtime.hardware, device_of(ctx.runtime.hardware)
    tokenizer = policies.load_tokenizer(folder)
    tables = _pair_tables(ctx, tokenizer) if spec.table == "pairs" else _response_table(ctx, tokenizer)
    started = time.perf_counter()
    # all tables and columns together: their rows share prompts
    rows = [row for _, columns in tables.values() for column in columns.values() for row in column]
    with peak_memory(ctx.cost, device):
        policy = on_device(folder, hardware)
        ctx.cost["parameters_in_memory"] = policies.own_parameters(policy)
        found = sequence_logprobs(
            policy,
            rows,
            pad_id=policies.pad_id(tokenizer),
            hardware=hardware,
            device=device,
            label="log-probs",
        )
    for name, (arrays, columns) in tables.items():
        for column, own in columns.items():
            arrays[column], found = found[: len(own)], found[len(own) :]
        save_file(arrays, ctx.out / f"{name}.safetensors")
    ctx.cost["scored_tokens"] = float(sum(len(row.ids) for row in rows))
    ctx.cost["seconds"] = time.perf_counter() - started


Table = tuple[dict[str, np.ndarray], dict[str, list[Row]]]


def _pair_tables(ctx: Context, tokenizer: Any) -> dict[str, Table]:
    spec: LogProbsSpec = ctx.spec
    rows = ctx.inputs["rows"].jsonl("pairs.jsonl")
    tables: dict[str, Table] = {}
    report = TruncationReport()
    for split in ("train", "validation"):
        pairs = split_pairs(ctx.inputs["rows"], rows, split, ctx.inputs["policy"], tokenizer, spec.tokens)
        if pairs is None:
            continue
        report = pairs.report if split == "train" else report
        arrays = {"index": pairs.index}
        columns = {f"response_{k}": pairs.responses[k] for k in (0, 1)}
        if spec.mismatched:
            arrays["partner"] = mismatch(rows, pairs.index, derive_seed(ctx.seed, "mismatch", split))
            columns |= {
                f"mismatched_{k}": mismatched_rows(pairs.responses[k], arrays["partner"], spec.tokens.max_length)
                for k in (0, 1)
            }
        tables[split] = (arrays, columns)
    write_json(ctx.out / "truncation.json", report.to_dict())
    return tables


def _response_table(ctx: Context, tokenizer: Any) -> dict[str, Table]:
    rows = encode_responses(ctx.inputs["rows"].jsonl("responses.jsonl"), tokenizer, ctx.spec.tokens)
    return {"responses": ({}, {"response": rows})}


def _logprobs_estimate(
    spec: LogProbsSpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, float]
) -> Estimate:
    rows, policy, sequences = inputs["rows"], inputs["policy"], 2 if spec.table == "pairs" else 1
    found = scoring_estimate(rows, policy, runtime, sequences=sequences, longest=spec.tokens.max_length)
    if not spec.mismatched:
        return found
    return replace(  # as much again
        found,
        scored_tokens=2 * found.scored_tokens,
        flops=2 * found.flops,
        pieces=tuple((piece, 2 * count) for piece, count in found.pieces),
    )


LOGPROBS = register(Stage("logprobs", 1, "logprobs", LogProbsSpec, _logprobs, _logprobs_estimate, parallel=True))
