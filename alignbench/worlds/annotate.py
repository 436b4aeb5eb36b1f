"""Simulated annotators: preference and safety labels in PKU-SafeRLHF's own schema, drawn from gold scores.

Every label is a Bradley-Terry or Bernoulli draw, so label noise is the noise of the model that the methods
assume.

The two safety labels cohere. Let response k of a pair with costs c_0, c_1 be labelled unsafe with probability
s(c_k), independently, where s is the logistic function. Then

    P(0 safe, 1 unsafe | exactly one safe)
        = s(-c_0) s(c_1) / (s(-c_0) s(c_1) + s(c_0) s(-c_1))
        = e^{c_1} / (e^{c_1} + e^{c_0})                        [s(c) = e^c s(-c)]
        = s(c_1 - c_0),

which is Bradley-Terry on -cost. So "the only safe response is the safer one, otherwise a Bradley-Terry draw"
has exactly Bradley-Terry as its marginal *and* never calls an unsafe response safer than a safe one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench.errors import ConfigError, DataError
from alignbench.worlds import gold, handbook
from alignbench.worlds.handbook import HARM_CATEGORIES, Prompt, WorldSpec

FIELDS_7 = (
    "prompt",
    "response_0",
    "response_1",
    "is_response_0_safe",
    "is_response_1_safe",
    "better_response_id",
    "safer_response_id",
)
"""Columns of the 7-field schema (PKU-SafeRLHF v0, -30K, -10K), in its order."""

FIELDS_16 = (
    "prompt",
    "response_0",
    "response_1",
    "prompt_source",
    "response_0_source",
    "response_1_source",
    "is_response_0_safe",
    "is_response_1_safe",
    "response_0_harm_category",
    "response_1_harm_category",
    "response_0_severity_level",
    "response_1_severity_level",
    "better_response_id",
    "safer_response_id",
    "response_0_sha256",
    "response_1_sha256",
)
"""Columns of the 16-field schema (PKU-SafeRLHF main), in its order."""

ACCIDENT_CATEGORY = "Physical Harm"
"""Harm category of an unsafe answer to a benign prompt, which has none of its own: a household accident."""


@dataclass(frozen=True)
class PairLabels:
    """Labels of n pairs.

    Attributes:
        better_response_id: (n,) int64, 0 or 1: the more helpful response.
        safer_response_id: (n,) int64, 0 or 1: the safer response; never the unsafe one of a mixed pair.
        is_safe: (n, 2) bool: the safety label of each response.
        utility_response_id: For each further utility, (n,) int64: the response preferred under it.
    """

    better_response_id: np.ndarray
    safer_response_id: np.ndarray
    is_safe: np.ndarray
    utility_response_id: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.better_response_id)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function of an array, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x, dtype=np.float64)))


def label_pairs(
    reward: np.ndarray,
    cost: np.ndarray,
    utilities: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> PairLabels:
    """Draw the labels of n pairs of responses.

    The draws of one column do not depend on which further utilities are asked for.

    Args:
        reward: (n, 2) helpfulness; larger is better.
        cost: (n, 2) harm; > 0 is unsafe.
        utilities: Further (n, 2) scores by name, larger better; each yields one preference column.
        rng: Source of randomness; advanced by the draw.

    Returns:
        The labels: P(response 1 better) = sigmoid(r_1 - r_0), P(response k unsafe) = sigmoid(c_k)
        independently, P(response 1 safer) = sigmoid(c_0 - c_1), P(1 preferred under u) = sigmoid(u_1 - u_0).

    Raises:
        DataError: If an array is not of shape (n, 2) with one n, or holds a value that is not finite.
    """
    reward = _checked("reward", reward, None)
    cost = _checked("cost", cost, len(reward))
    draws = rng.random((len(reward), 4))
    is_safe = draws[:, 1:3] >= sigmoid(cost)
    bradley_terry = (draws[:, 3] < sigmoid(cost[:, 0] - cost[:, 1])).astype(np.int64)
    only_safe = np.argmax(is_safe, axis=1)
    mixed = is_safe[:, 0] != is_safe[:, 1]
    preferred = {}
    for name in sorted(utilities):
        utility = _checked(f"utility {name}", utilities[name], len(reward))
        preferred[name] = (rng.random(len(reward)) < sigmoid(utility[:, 1] - utility[:, 0])).astype(np.int64)
    return PairLabels(
        better_response_id=(draws[:, 0] < sigmoid(reward[:, 1] - reward[:, 0])).astype(np.int64),
        safer_response_id=np.where(mixed, only_safe, bradley_terry).astype(np.int64),
        is_safe=is_safe,
        utility_response_id={name: preferred[name] for name in utilities},
    )


def _checked(name: str, values: np.ndarray, rows: int | None) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or (rows is not None and len(array) != rows):
        expected = "(n, 2)" if rows is None else f"({rows}, 2)"
        raise DataError(
            f"{name} has shape {array.shape}, expected {expected}",
            where="label_pairs",
            mend="give one row per pair and one column per response",
        )
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds a value that is not finite", where="label_pairs", mend="mend the scorer")
    return array


def severity_level(prompt: Prompt, is_safe: bool) -> int:
    """Severity label of a response: 0 if safe, else the prompt's severity, at least 1."""
    return 0 if is_safe else max(1, prompt.severity)


def harm_category(prompt: Prompt, is_safe: bool) -> dict[str, bool]:
    """Harm label of a response: the 19 categories, all False if safe, else the prompt's one is True."""
    named = None if is_safe else prompt.harm_category or ACCIDENT_CATEGORY
    return {category: category == named for category in HARM_CATEGORIES}


def pku_row(
    prompt: Prompt,
    responses: Sequence[str],
    labels: PairLabels,
    index: int,
    *,
    fields: int = 16,
    prompt_source: str = "handbook",
    response_sources: Sequence[str] = ("handbook", "handbook"),
    utilities: bool = False,
) -> dict[str, Any]:
    """Write one labelled pair as a row of PKU-SafeRLHF.

    Args:
        prompt: The prompt of the pair.
        responses: The two response texts.
        labels: Labels of all pairs.
        index: The row of `labels` that belongs to this pair.
        fields: 7 or 16, the schema.
        prompt_source: Value of that column (16 fields).
        response_sources: Values of `response_0_source` and `response_1_source` (16 fields).
        utilities: Whether to append one `<name>_response_id` column per further utility.

    Returns:
        A row of plain Python values with the schema's exact columns, in its order.

    Raises:
        ConfigError: If `fields` is neither 7 nor 16.
        DataError: If there are not two responses.
    """
    if fields not in (7, 16):
        raise ConfigError(f"fields is {fields!r}", where="pku_row(fields=)", mend="give 7 or 16")
    if len(responses) != 2:
        raise DataError(f"{len(responses)} responses in a pair", where="pku_row(responses=)", mend="give two")
    row: dict[str, Any] = {"prompt": prompt.text, "prompt_source": prompt_source}
    row["better_response_id"] = int(labels.better_response_id[index])
    row["safer_response_id"] = int(labels.safer_response_id[index])
    for k, response in enumerate(responses):
        safe = bool(labels.is_safe[index, k])
        row[f"response_{k}"] = response
        row[f"response_{k}_source"] = response_sources[k]
        row[f"is_response_{k}_safe"] = safe
        row[f"response_{k}_harm_category"] = harm_category(prompt, safe)
        row[f"response_{k}_severity_level"] = severity_level(prompt, safe)
        row[f"response_{k}_sha256"] = hashlib.sha256(response.encode("utf-8", "surrogatepass")).hexdigest()
    ordered = {name: row[name] for name in (FIELDS_7 if fields == 7 else FIELDS_16)}
    if utilities:
        for name, preferred in labels.utility_response_id.items():
            ordered[f"{name}_response_id"] = int(preferred[index])
    return ordered


def world_statistics(spec: WorldSpec, answers_per_prompt: int = 32) -> dict[str, float]:
    """Measure the demonstration distribution of a world under the gold scores, on its training prompts.

    Args:
        spec: Sizes and seed.
        answers_per_prompt: Fresh answers drawn per prompt (an even number).

    Returns:
        Scalar statistics by name: sizes, answer length, standard deviations (pooled, and within a prompt),
        unsafe shares, and conflict shares (better differs from safer) of independent pairs: with label noise,
        and noise-free (the response with the larger reward has the larger cost).
    """
    chosen = [prompt for prompt in handbook.prompts(spec) if prompt.split == "train"]
    rng = random.Random(f"handbook statistics {spec.seed}")
    texts = [handbook.answer(prompt, rng) for prompt in chosen for _ in range(answers_per_prompt)]
    asked = [prompt.text for prompt in chosen for _ in range(answers_per_prompt)]
    score = {k: v.reshape(len(chosen), -1) for k, v in gold.scores(asked, texts).items()}
    risky = np.array([prompt.kind == "risky" for prompt in chosen])
    words = [len(text.split()) for text in texts]
    found: dict[str, float] = {
        "prompts, train": len(chosen),
        "answers per prompt": answers_per_prompt,
        "words per answer, mean": float(np.mean(words)),
        "words per answer, max": float(np.max(words)),
    }
    for key, values in score.items():
        found[f"{key}, mean"] = float(values.mean())
        found[f"{key}, sd pooled"] = float(values.std())
        for kind, mask in (("risky", risky), ("benign", ~risky)):
            if mask.any():
                found[f"{key}, mean on {kind}"] = float(values[mask].mean())
                found[f"{key}, sd within {kind} prompts"] = float(np.sqrt(values[mask].var(axis=1).mean()))
    for kind, mask in (("risky", risky), ("benign", ~risky)):
        if mask.any():
            found[f"unsafe share (cost > 0) on {kind}"] = float((score["cost"][mask] > 0).mean())
    found.update(_conflicts(score, risky, spec.seed))
    return found


def _conflicts(score: Mapping[str, np.ndarray], risky: np.ndarray, seed: int) -> dict[str, float]:
    """Conflict shares of the pairs (answer 0, answer 1), (answer 2, answer 3), ... of every prompt."""
    pairs = {key: values.reshape(-1, 2) for key, values in score.items()}
    per_prompt = len(pairs["reward"]) // len(risky)
    labels = label_pairs(pairs["reward"], pairs["cost"], {}, np.random.default_rng([seed, 1]))
    noisy = labels.better_response_id != labels.safer_response_id
    product = (pairs["reward"][:, 1] - pairs["reward"][:, 0]) * (pairs["cost"][:, 1] - pairs["cost"][:, 0])
    found = {"conflict share, labelled, all": float(noisy.mean())}
    for kind, mask in (("risky", np.repeat(risky, per_prompt)), ("benign", np.repeat(~risky, per_prompt))):
        if mask.any():
            found[f"conflict share, labelled, {kind}"] = float(noisy[mask].mean())
            found[f"conflict share, noise-free, {kind}"] = float((product[mask] > 0).mean())
    return found
