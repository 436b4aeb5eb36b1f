"""From text rows to token rows, with every truncation counted: shared by all stages that feed a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.data.templates import render_prompt
from alignbench.data.tokenize import TruncationReport, encode, encode_pair, encode_prompt
from alignbench.engine.batching import Row
from alignbench.errors import DataError
from alignbench.stages.kept import Kept
from alignbench.store import Artifact


@dataclass(frozen=True)
class TokenSpec:
    """How text becomes tokens; part of every spec that it touches.

    Attributes:
        template: Name of the prompt template.
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of the prompt; its end is kept.
    """

    template: str
    max_length: int
    max_prompt_length: int


@dataclass(frozen=True)
class PairRows:
    """Tokenised preference pairs.

    Attributes:
        index: Row number in the pairs table of every kept pair.
        responses: Token rows of response 0 and of response 1.
        report: What truncation did.
    """

    index: np.ndarray
    responses: tuple[list[Row], list[Row]]
    report: TruncationReport


def prompt_ids(tokenizer: Any, prompt: str, spec: TokenSpec) -> list[int]:
    """Token ids of a rendered prompt."""
    text = render_prompt(spec.template, prompt, tokenizer)
    return encode_prompt(tokenizer, text, max_prompt_length=spec.max_prompt_length)


def encode_pairs(rows: Sequence[Mapping[str, Any]], index: Sequence[int], tokenizer: Any, spec: TokenSpec) -> PairRows:
    """Tokenise `rows[i] for i in index`; a pair that would lose an answer is dropped and counted.

    Raises:
        DataError: no pair is left.
    """
    report = TruncationReport()
    kept: list[int] = []
    sides: tuple[list[Row], list[Row]] = ([], [])
    for i in index:
        row = rows[i]
        text = render_prompt(spec.template, row["prompt"], tokenizer)
        pair = encode_pair(
            tokenizer,
            text,
            row["response_0"],
            row["response_1"],
            max_length=spec.max_length,
            max_prompt_length=spec.max_prompt_length,
        )
        report.add(pair)
        if pair.dropped:
            continue
        kept.append(i)
        for rows_of_side, side in zip(sides, pair, strict=True):
            rows_of_side.append(Row(side.input_ids, side.prompt_length))
    if len(index) and not kept:
        raise DataError(
            f"all {len(index)} pairs lose an answer at max_length {spec.max_length}: {report.summary()}",
            where="model.max_length",
            mend="raise model.max_length, or lower model.max_prompt_length",
        )
    return PairRows(np.array(kept, dtype=np.int64), sides, report)


@dataclass(frozen=True)
class _Of:
    """What tokenised pairs are a function of: the pairs and a split of them, the tokenizer's files, how it is used."""

    pairs: str
    split: str
    tokenizer: tuple[tuple[str, str], ...]
    spec: TokenSpec


#: Two million tokens of all splits together: some 80 MB.
_KEPT = Kept[PairRows](2_000_000, lambda pairs: sum(len(row.ids) for side in pairs.responses for row in side))


def split_pairs(
    pairs: Artifact, rows: Sequence[Mapping[str, Any]], split: str, policy: Artifact, tokenizer: Any, spec: TokenSpec
) -> PairRows | None:
    """The tokenised pairs of a split; None if it has no row.

    A sweep asks for the same ones again and again, a small model's quarter pass being three times as long as
    tokenising what it trains on. So they are kept in this process.

    Args:
        pairs: The artifact that `rows` were read from.
        rows: Its pairs.jsonl.
        split: Which of them.
        policy: A policy with the tokenizer: its files tell it from others.
        tokenizer: That policy's tokenizer.
        spec: Template and lengths.

    Raises:
        DataError: no pair is left.
    """
    wanted = [i for i, row in enumerate(rows) if row["split"] == split]
    if not wanted:
        return None
    # all files of its folder but the weights; training copies them as they are
    folder = {name: file for name, file in policy.manifest["files"].items() if name.startswith("policy/")}
    files = tuple(sorted((name, file["sha256"]) for name, file in folder.items() if not name.endswith(".safetensors")))
    return _KEPT.get(_Of(pairs.key, split, files, spec), lambda: encode_pairs(rows, wanted, tokenizer, spec))


def encode_demonstrations(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, spec: TokenSpec
) -> tuple[list[Row], TruncationReport]:
    """Tokenise (prompt, response) rows for SFT."""
    report = TruncationReport()
    kept = []
    for row in rows:
        encoded = encode(
            tokenizer,
            render_prompt(spec.template, row["prompt"], tokenizer),
            row["response"],
            max_length=spec.max_length,
            max_prompt_length=spec.max_prompt_length,
        )
        report.add(encoded)
        if not encoded.dropped:
            kept.append(Row(encoded.input_ids, encoded.prompt_length))
    if not kept:
        raise DataError(
            f"no demonstration fits max_length {spec.max_length}",
            where="model.max_length",
            mend="raise model.max_length",
        )
    return kept, report


def encode_responses(rows: Sequence[Mapping[str, Any]], tokenizer: Any, spec: TokenSpec) -> list[Row]:
    """Sampled responses as token rows, from their own ids (decoding and re-encoding could merge tokens)."""
    cache: dict[str, list[int]] = {}
    result = []
    for row in rows:
        prompt = cache.setdefault(row["prompt_id"], []) or prompt_ids(tokenizer, row["prompt"], spec)
        cache[row["prompt_id"]] = prompt
        result.append(Row([*prompt, *row["response_ids"]], len(prompt)))
    return result


def mismatch(rows: list[dict[str, Any]], index: np.ndarray, seed: int) -> np.ndarray:
    """For each pair the position of another pair, with another prompt wherever there is one.

    A seeded shuffle in which pairs of one prompt lie together, shifted by the largest such group: the partner
    has another prompt unless one prompt holds more than half of all pairs.
    """
    rng = np.random.default_rng(seed)
    prompts = [rows[i]["prompt"] for i in index]
    ranks = dict(zip(dict.fromkeys(prompts), rng.permutation(len(set(prompts))), strict=True))
    order = np.argsort([ranks[p] for p in prompts], kind="stable")
    largest = max(np.bincount([ranks[p] for p in prompts]))
    partner = np.empty(len(index), dtype=np.int64)
    partner[order] = np.roll(order, -int(largest))
    return partner


def mismatched_rows(rows: list[Row], partner: np.ndarray, max_length: int) -> list[Row]:
    """Each row's prompt with its partner's response, cut at `max_length` tokens like any other row."""
    result = []
    for row, other in zip(rows, partner, strict=True):
        response = rows[other].ids[rows[other].prompt_length :]
        ids = [*row.ids[: row.prompt_length], *response]
        result.append(Row(ids[:max_length], row.prompt_length))
    return result
