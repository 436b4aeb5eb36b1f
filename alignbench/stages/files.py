"""Stages on data from files or the hub: read and check, look at lengths, choose the pairs that have a label."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.data.layouts import Table, read_table
from alignbench.data.readers import Source, some_prompts, split_by_prompt
from alignbench.data.schema import Mode, Row, excerpt, label_column
from alignbench.data.templates import render_prompt
from alignbench.data.tokenize import encode, encode_prompt
from alignbench.errors import DataError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.models import policy as policies
from alignbench.stages.stage import Context, Estimate, Facts, Stage, register
from alignbench.stages.tokens import TokenSpec

_MAX_EXAMPLES = 3
_PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class TableSpec:
    """One table of rows, by content.

    Attributes:
        table: "pairs", "responses", "prompts" or "demonstrations".
        fingerprint: Of its source.
        layout: How its rows are laid out.
        columns: (name that the layout expects, name in the source), where they differ.
        labels: Objectives whose labels (pairs) or scores (responses) must be there.
    """

    table: Table
    fingerprint: str
    layout: str = "rows"
    columns: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadSpec:
    """Tables from files or the hub, split by prompt.

    Attributes:
        tables: (name, what it is); the names are those of the locations.
        validation: "strict" refuses broken rows, "lenient" drops and counts them.
        validation_share: Fraction of distinct prompts held out for validation.
        test_share: Fraction of distinct prompts held out for reporting.
        split_seed: Decides which prompts those are.
        pairs_per_prompt: Most pairs that are made of a prompt's scored responses; 0 where there are none.
        most_prompts: Distinct prompts of a table that are kept, drawn by `split_seed`; 0 keeps all.
        responses_per_prompt: Scored responses of a prompt that are kept, drawn likewise; 0 keeps all.
    """

    tables: tuple[tuple[str, TableSpec], ...]
    validation: Mode
    validation_share: float
    test_share: float
    split_seed: int
    pairs_per_prompt: int = 0
    most_prompts: int = 0
    responses_per_prompt: int = 0


def _read(ctx: Context) -> None:
    spec: ReadSpec = ctx.spec
    tables: dict[str, list[Row]] = {name: [] for name in ("pairs", "responses", "prompts", "demonstrations")}
    reports: dict[str, Any] = {}
    for name, table in spec.tables:
        source: Source = ctx.runtime.locations[name]
        rows, reports[name] = read_table(
            source,
            table.table,
            layout=table.layout,
            columns=dict(table.columns),
            labels=table.labels,
            mode=spec.validation,
        )
        tables[table.table] += rows
    main = "responses" if tables["responses"] else "pairs" if tables["pairs"] else "demonstrations"
    rows, left_out = _without_reported(tables[main], tables["prompts"])
    rows, drawn = _some(rows, spec, responses=spec.responses_per_prompt if main == "responses" else 0)
    by_split = split_by_prompt(rows, _shares(spec), spec.split_seed)
    prompts = _distinct_prompts(by_split, tables["prompts"])
    write_jsonl(ctx.out / "prompts.jsonl", prompts)
    # the first table's counts at the top, further tables by their names
    report = next(iter(reports.values())) | dict(list(reports.items())[1:])
    report["table"] = main
    report["splits"] = {split: len(part) for split, part in by_split.items()}
    report |= {"reported_prompts_left_out": left_out} if tables["prompts"] else {}
    report |= {"drawn": drawn} if drawn else {}
    if main == "responses":
        _write_answers(ctx, by_split, prompts)
        pairs = [row | {"split": s} for s, part in by_split.items() for row in pairs_of(part, spec)]
        if not any(pair["split"] == "train" for pair in pairs):
            raise DataError(
                "no two responses to a training prompt differ in a score, so there is no pair to train on",
                where=ctx.runtime.locations["responses"].path,
                mend="give several responses per prompt, with scores that tell them apart",
            )
        report["pairs_made"] = _pair_counts(pairs)
    else:
        pairs = [row | {"split": split} for split, part in by_split.items() for row in part if main == "pairs"]
    write_jsonl(ctx.out / "pairs.jsonl", pairs)
    if tables["demonstrations"]:
        shown = rows if main == "demonstrations" and drawn else _some(tables["demonstrations"], spec)[0]
        kept = _trainable(shown, by_split, prompts, spec)
        if not kept:
            raise DataError(
                f"all {len(shown)} demonstrations are on held-out prompts: none may be trained on",
                where=ctx.runtime.locations["demonstrations"].path,
                mend="give demonstrations on more prompts, lower the held-out shares, or change dataset.seed",
            )
        write_jsonl(ctx.out / "demonstrations.jsonl", kept)
        counted = report if main == "demonstrations" else report["demonstrations"]
        counted["held_out"] = len(shown) - len(kept)
    write_json(ctx.out / "report.json", report)


def _shares(spec: ReadSpec) -> dict[str, float]:
    shares = {
        "train": 1 - spec.validation_share - spec.test_share,
        "validation": spec.validation_share,
        "test": spec.test_share,
    }
    return {name: share for name, share in shares.items() if share > 0}


def _without_reported(rows: list[Row], reported: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows whose prompt is in no prompt set that results are reported on, and how many are."""
    held = {row["prompt"].strip() for row in reported}
    kept = [row for row in rows if row["prompt"].strip() not in held]
    return kept, len(rows) - len(kept)


def _some(rows: list[Row], spec: ReadSpec, responses: int = 0) -> tuple[list[Row], dict[str, str]]:
    """The rows that are drawn, and what is said of them; nothing where all are kept."""
    if not spec.most_prompts and not responses:
        return rows, {}
    kept = some_prompts(rows, spec.most_prompts, spec.split_seed, responses=responses)
    counts = [len({row["prompt"].strip() for row in some}) for some in (kept, rows)]
    return kept, {"prompts": f"{counts[0]} of {counts[1]}", "rows": f"{len(kept)} of {len(rows)}"}


def _distinct_prompts(by_split: Mapping[str, Sequence[Row]], reported: Sequence[Row]) -> list[Row]:
    """One row per distinct prompt text, in order of appearance; a prompt set is the split test."""
    seen: dict[str, Row] = {}
    for split, part in by_split.items():
        for row in part:
            seen.setdefault(row["prompt"], {"prompt_id": f"p{len(seen)}", "prompt": row["prompt"], "split": split})
    for row in reported:
        kind = row.get("kind") or row.get("category") or row.get("harm_category")
        found = {"prompt_id": f"p{len(seen)}", "prompt": row["prompt"], "split": "test"}
        cells = {name: row[name] for name in ("harm_category", "category") if row.get(name)}
        seen.setdefault(row["prompt"], found | ({"kind": kind} if kind else {}) | cells)
    return list(seen.values())


def _write_answers(ctx: Context, by_split: Mapping[str, Sequence[Row]], prompts: Sequence[Row]) -> None:
    asked = {row["prompt"]: {name: row[name] for name in ("prompt_id", "split")} for row in prompts}
    answers: dict[str, list[Row]] = {prompt: [] for prompt in asked}
    for part in by_split.values():
        for row in part:
            own = answers[row["prompt"]]
            own.append(row | asked[row["prompt"]] | {"answer": len(own)})
    # a prompt's answers lie together, however they lay in the file
    write_jsonl(ctx.out / "answers.jsonl", [row for own in answers.values() for row in own])


def pairs_of(rows: Sequence[Row], spec: ReadSpec) -> list[Row]:
    """Pairs of scored responses to the same prompt.

    Each prompt gives up to `pairs_per_prompt` pairs, drawn without replacement from those that differ in at least one
    score; which they are, and which response comes first, depends on the prompt's own responses and the split's seed
    alone. The label of an objective names the response with the larger score; where both are equal there is none.

    Args:
        rows: ``{"prompt", "response", "scores"}``.
        spec: Its `pairs_per_prompt` and `split_seed`.

    Returns:
        Rows of the pair schema with one label column per score that differs, and ``scores`` {name: [of response 0,
        of response 1]}.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    made = []
    for prompt, answers in by_prompt.items():
        digest = hashlib.sha256(f"pairs\0{spec.split_seed}\0{prompt}".encode()).digest()
        rng = np.random.default_rng(np.frombuffer(digest, np.uint32))
        for i, j in _differing(answers, spec.pairs_per_prompt, rng):
            sides = [answers[i], answers[j]]
            scores = {name: [side["scores"][name] for side in sides] for name in sides[0]["scores"]}
            labels = {label_column(n): int(second > first) for n, (first, second) in scores.items() if first != second}
            made.append(
                {"prompt": prompt, "response_0": sides[0]["response"], "response_1": sides[1]["response"]}
                | labels
                | {"scores": scores}
            )
    return made


def _differing(answers: Sequence[Row], most: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Up to `most` ordered pairs of answers that differ in a score, each unordered pair at most once."""
    scores = np.array([list(row["scores"].values()) for row in answers])
    first, second = np.triu_indices(len(answers), k=1)
    wanted = np.flatnonzero((scores[first] != scores[second]).any(axis=1))
    chosen = rng.permutation(wanted)[:most]
    swap = rng.random(len(chosen)) < 0.5
    left, right = first[chosen], second[chosen]
    return list(zip(np.where(swap, right, left).tolist(), np.where(swap, left, right).tolist(), strict=True))


def _pair_counts(pairs: Sequence[Row]) -> dict[str, int]:
    """How many pairs there are, how many have each objective's label, and how many conflict with the reward's."""
    found = {"pairs": len(pairs)}
    reward = label_column("reward")
    for name in pairs[0]["scores"]:
        column = label_column(name)
        found[f"labelled for {name}"] = sum(column in row for row in pairs)
        if name != "reward":
            both = [row for row in pairs if column in row and reward in row]
            found[f"reward against {name}"] = sum(row[column] != row[reward] for row in both)
    return found


def _trainable(
    shown: Sequence[Row], by_split: Mapping[str, Sequence[Row]], prompts: Sequence[Row], spec: ReadSpec
) -> list[Row]:
    """Demonstrations on prompts that are not held out."""
    held = {row["prompt"].strip() for row in prompts if row["split"] == "test"}
    # split together with the other rows: every split is then filled, whatever the demonstrations
    rows = [row for part in by_split.values() for row in part]
    together = split_by_prompt([*rows, *shown], _shares(spec), spec.split_seed)
    kept = together["train"][len(by_split["train"]) :]
    return [row for row in kept if row["prompt"].strip() not in held]


READ = register(
    Stage(
        name="read",
        version=4,
        kind="data",
        spec=ReadSpec,
        run=_read,
        estimate=lambda spec, inputs, runtime, hints: Estimate(
            Facts(rows=hints["rows"], tokens=hints["tokens"], trained_share=1 - spec.validation_share - spec.test_share)
        ),
    )
)


@dataclass(frozen=True)
class SelectSpec:
    """The pairs that carry a label of one objective."""

    objective: str


def _select(ctx: Context) -> None:
    column = label_column(ctx.spec.objective)
    rows = ctx.inputs["pairs"].jsonl("pairs.jsonl")
    kept = [row for row in rows if row.get(column) is not None]
    if not any(row["split"] == "train" for row in kept):
        raise DataError(
            f"no training pair of {len(rows)} pairs is labelled for {ctx.spec.objective}",
            where=f"the column {column}",
            mend="label some pairs for it, or choose a method that does not train on these labels",
        )
    write_jsonl(ctx.out / "pairs.jsonl", kept)
    write_json(ctx.out / "report.json", {"pairs": len(rows), "labelled": len(kept)})


SELECT = register(
    Stage(
        "select",
        1,
        "pairs",
        SelectSpec,
        _select,
        lambda spec, inputs, runtime, hints: Estimate(inputs["pairs"]),
    )
)


@dataclass(frozen=True)
class FitSpec:
    """The tables as a model sees them: how long they are, and what does not fit.

    Attributes:
        tokens: Template and lengths.
        over_long: "cut" keeps rows that truncation shortens and counts them, "drop" leaves them out (prompts
            stay), "refuse" raises.
    """

    tokens: TokenSpec
    over_long: str


#: Table -> the response columns of its rows.
_COLUMNS = {
    "pairs": ("response_0", "response_1"),
    "demonstrations": ("response",),
    "answers": ("response",),
    "prompts": (),
}


def _fit(ctx: Context) -> None:
    spec: FitSpec = ctx.spec
    # of the policy only the tokenizer is read
    tokenizer = policies.load_tokenizer(ctx.inputs["policy"].path("policy"))
    report: dict[str, Any] = {}
    for name, columns in _COLUMNS.items():
        if f"{name}.jsonl" not in ctx.inputs["data"].manifest["files"]:
            continue
        rows = ctx.inputs["data"].jsonl(f"{name}.jsonl")
        fits, report[name] = measure_lengths(rows, columns, tokenizer, spec.tokens)
        if spec.over_long == "drop":
            # prompts stay as they are: which are reported on must not depend on a tokenizer
            kept = [row for row, fit in zip(rows, fits, strict=True) if fit or name == "prompts"]
            write_jsonl(ctx.out / f"{name}.jsonl", kept)
            report[name]["left_out"] = len(rows) - len(kept)
    report = {name: found for name, found in report.items() if found["rows"]}
    if spec.over_long == "refuse":
        _refuse_over_long(report, spec.tokens)
    write_json(ctx.out / "report.json", report)


def measure_lengths(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Any, tokens: TokenSpec
) -> tuple[list[bool], dict[str, Any]]:
    """How long rows are in tokens.

    Args:
        rows: With ``prompt`` and the response columns.
        columns: The response columns; none for prompts alone.
        tokenizer: Of the policy.
        tokens: Template and limits.

    Returns:
        Which rows fit whole, and the report: rows, how many prompts and responses the limits cut (a pair counts once),
        percentiles of prompts, responses and both together, the first examples of what is too long.
    """
    lengths: dict[str, list[int]] = {"prompt": [], "response": [], "whole": []}
    fits, cut = [], {"prompts_cut": 0, "responses_cut": 0}
    examples: list[str] = []
    rendered: dict[str, tuple[str, int]] = {}
    whole = 1 << 40
    for number, row in enumerate(rows, 1):
        if row["prompt"] not in rendered:
            text = render_prompt(tokens.template, row["prompt"], tokenizer)
            rendered[row["prompt"]] = text, len(encode_prompt(tokenizer, text, max_prompt_length=None))
        text, prompt = rendered[row["prompt"]]
        lengths["prompt"].append(prompt)
        sides = [encode(tokenizer, "", row[c], max_length=whole) for c in columns]
        responses = [len(side.response_ids) for side in sides]
        lengths["response"] += responses
        lengths["whole"] += [prompt + response for response in responses]
        room = tokens.max_length - min(prompt, tokens.max_prompt_length)
        long = (prompt > tokens.max_prompt_length, any(response > room for response in responses))
        cut["prompts_cut"] += long[0]
        cut["responses_cut"] += long[1]
        fits.append(not any(long))
        if any(long) and len(examples) < _MAX_EXAMPLES:
            examples.append(
                f"row {number}: prompt {prompt}, response {max(responses, default=0)} tokens; "
                f"prompt {excerpt(row['prompt'])}"
            )
    report: dict[str, Any] = {"rows": len(rows), **cut, "too_long": len(fits) - sum(fits)}
    for name, values in lengths.items():
        if values:
            found = np.percentile(values, _PERCENTILES)
            report[f"{name}_tokens"] = {
                f"p{p}" if p < 100 else "max": float(v) for p, v in zip(_PERCENTILES, found, strict=True)
            }
    return fits, report | ({"examples": examples} if examples else {})


def _refuse_over_long(report: Mapping[str, Any], tokens: TokenSpec) -> None:
    faults = [
        f"  {found['too_long']} of {found['rows']} {name}\n"
        + "\n".join(f"    {example}" for example in found["examples"])
        for name, found in report.items()
        if found["too_long"]
    ]
    if faults:
        raise DataError(
            f"rows are too long for {tokens.max_prompt_length} prompt tokens and {tokens.max_length} in all:\n"
            + "\n".join(faults),
            where="dataset.files.over_long",
            mend="raise model.max_length or model.max_prompt_length, set dataset.files.over_long=drop to leave such "
            "rows out, or =cut to shorten prompts at their start and responses at their end",
        )


FIT = register(
    Stage(
        "fit",
        1,
        "data",
        FitSpec,
        _fit,
        lambda spec, inputs, runtime, hints: Estimate(inputs["data"], overhead_seconds=1.0),
    )
)
