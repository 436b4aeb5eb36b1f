"""TruthfulQA's multiple-choice scores of a policy: MC1 and MC2, from log-probs of the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignbench.data.published import multiple_choice
from alignbench.data.readers import Source, fingerprint, read_rows
from alignbench.data.templates import render_prompt
from alignbench.data.tokenize import encode
from alignbench.engine.batching import Row
from alignbench.engine.logprobs import sequence_logprobs
from alignbench.engine.runtime import device_of, dtype_of, peak_memory
from alignbench.errors import DataError
from alignbench.jsonio import write_json, write_jsonl
from alignbench.models import policy as policies
from alignbench.report.tails import rate_interval
from alignbench.stages.stage import Context, Estimate, Facts, Runtime, Stage, register, scoring_estimate
from alignbench.stages.tokens import TokenSpec

#: Answers to one question of TruthfulQA, both tasks together: 7,300 correct and incorrect ones to 817 questions.
_ANSWERS = 9.0


@dataclass(frozen=True)
class TruthfulQASpec:
    """Which questions, how they are asked, and the interval.

    Attributes:
        questions: Fingerprint of the file.
        form: "qa" (as lm-evaluation-harness asks: "Q: ...", "A:", an answer after a space, no end token) or "policy"
            (the policy's own template, and its end token after the answer).
        preamble: Text before each question ("qa" only).
        tokens: Template and lengths.
        dtype: Parameter dtype.
        level: Two-sided coverage.
    """

    questions: str
    form: str
    preamble: str
    tokens: TokenSpec
    dtype: str
    level: float


@dataclass(frozen=True)
class Questions:
    """Where the questions lie on this machine."""

    source: Source
    preamble: str

    @classmethod
    def of(cls, path: str, preamble: str | None) -> Questions:
        """From the configuration; raises DataError for a preamble that cannot be read."""
        text = ""
        if preamble is not None:
            try:
                with open(preamble, encoding="utf-8") as stream:
                    text = stream.read()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"the preamble cannot be read ({type(error).__name__})",
                    where="benchmark.preamble",
                    mend="give a text file, or benchmark.preamble=null",
                ) from None
        return cls(Source(path=path), text)

    @property
    def content(self) -> str:
        """Fingerprint of the questions."""
        return fingerprint(self.source)


def mc1(logprobs: npt.ArrayLike, labels: Sequence[int]) -> float:
    """Whether the true answer is the likeliest (Lin et al. 2022, sec. 3.2); of equals the first counts.

    Args:
        logprobs: Of each choice, shape (choices,).
        labels: 1 for the one true answer.
    """
    return float(labels[int(np.argmax(np.asarray(logprobs, dtype=np.float64)))] == 1)


def mc2(logprobs: npt.ArrayLike, labels: Sequence[int]) -> float:
    """Share of the true answers in the probability of all (Lin et al. 2022, sec. 3.2).

    It is taken from differences of log-probs: answers too unlikely for a float's range still have their share.

    Args:
        logprobs: Of each choice, shape (choices,).
        labels: 1 for true answers, 0 for false ones.
    """
    values = np.asarray(logprobs, dtype=np.float64)
    weights = np.exp(values - values.max())
    return float(weights[np.asarray(labels) == 1].sum() / weights.sum())


def rows_of(tokenizer: Any, question: str, choices: Sequence[str], spec: TruthfulQASpec) -> tuple[list[Row], int]:
    """Token rows of the choices, and how many lost the beginning of their prompt to the policy's length.

    Raises:
        DataError: an answer alone is longer than the policy's length.
    """
    if spec.form == "policy":
        prompt = render_prompt(spec.tokens.template, question, tokenizer)
        found, cut = [], 0
        for choice in choices:
            one = encode(
                tokenizer, prompt, choice, max_length=spec.tokens.max_length,
                max_prompt_length=spec.tokens.max_prompt_length,
            )  # fmt: skip
            if one.dropped or one.truncated_response:
                raise _too_long(question, spec)
            found.append(Row(one.input_ids, one.prompt_length))
            cut += one.truncated_prompt
        return found, cut
    blank = "\n\n" if spec.preamble else ""
    prompt = f"{spec.preamble.rstrip()}{blank}Q: {question}\nA:"
    length = len(tokenizer(prompt)["input_ids"])
    found, cut = [], 0
    for choice in choices:
        # encoded together, as lm-evaluation-harness does: the split is where the prompt alone would end
        ids = list(tokenizer(f"{prompt} {choice}")["input_ids"])
        over = max(0, len(ids) - spec.tokens.max_length)
        if over >= length:
            raise _too_long(question, spec)
        found.append(Row(ids[over:], length - over))
        cut += over > 0
    return found, cut


def _tokenised(tokenizer: Any, where: Questions, spec: TruthfulQASpec) -> tuple[list[Any], list[list[Row]], int]:
    """The questions; token rows of the choices of each one's MC1 and MC2, in turn; how many prompts were cut."""
    questions, rows, cut = multiple_choice(read_rows(where.source)), [], 0
    for question in questions:
        for target in ("mc1_targets", "mc2_targets"):
            found, lost = rows_of(tokenizer, question["question"], question[target]["choices"], spec)
            rows.append(found)
            cut += lost
    return questions, rows, cut


@cache
def check_fit(folder: Path, where: Questions, spec: TruthfulQASpec) -> None:
    """Refuse an answer that is longer than the policy, which every measurement would meet after the training.

    Args:
        folder: A model folder with the policies' tokenizer.
        where: The questions.
        spec: How they are asked.

    Raises:
        DataError: the first such answer.
    """
    _tokenised(policies.load_tokenizer(folder), where, spec)


def _too_long(question: str, spec: TruthfulQASpec) -> DataError:
    return DataError(
        f"an answer to {question!r} does not fit into {spec.tokens.max_length} tokens",
        where="model.max_length",
        mend="raise it, or take a model with more positions",
    )


def _run(ctx: Context) -> None:
    spec: TruthfulQASpec = ctx.spec
    started = time.perf_counter()
    where: Questions = ctx.runtime.locations["truthfulqa"]
    folder = ctx.inputs["policy"].path("policy")
    tokenizer, hardware = policies.load_tokenizer(folder), ctx.runtime.hardware
    questions, by_task, cut = _tokenised(tokenizer, where, spec)
    rows = [row for task in by_task for row in task]
    device = device_of(hardware)
    with peak_memory(ctx.cost, device):
        model = policies.load_policy(folder, dtype_of(hardware), device)
        logprobs = sequence_logprobs(
            model, rows, pad_id=policies.pad_id(tokenizer), hardware=hardware, device=device, label="truthfulqa"
        )
    parts = np.split(logprobs, np.cumsum([len(task) for task in by_task])[:-1])
    scores = {
        "mc1": [mc1(part, q["mc1_targets"]["labels"]) for part, q in zip(parts[::2], questions, strict=True)],
        "mc2": [mc2(part, q["mc2_targets"]["labels"]) for part, q in zip(parts[1::2], questions, strict=True)],
    }
    metrics = {
        name: rate_interval(values, np.arange(len(values)), level=spec.level).to_dict()
        for name, values in scores.items()
    }
    write_json(ctx.out / "metrics.json", {"metrics": metrics, "questions": len(questions), "cut_prompts": cut})
    write_jsonl(
        ctx.out / "questions.jsonl",
        [
            {"question": q["question"], "mc1": scores["mc1"][i], "mc2": scores["mc2"][i],
             "mc1_logprobs": parts[2 * i].tolist(), "mc2_logprobs": parts[2 * i + 1].tolist()}
            for i, q in enumerate(questions)
        ],
    )  # fmt: skip
    ctx.cost["scored_tokens"] = float(sum(len(row.ids) for row in rows))
    ctx.cost["seconds"] = time.perf_counter() - started


def _estimate(
    spec: TruthfulQASpec, inputs: Mapping[str, Facts], runtime: Runtime, hints: Mapping[str, Any]
) -> Estimate:
    per_row = float(min(spec.tokens.max_length, 40 + len(spec.preamble) / 4))
    rows = hints["questions"] * 2 * _ANSWERS
    return scoring_estimate(
        Facts(rows=rows, tokens=per_row), inputs["policy"], runtime, rows=hints["questions"], longest=per_row
    )


TRUTHFULQA = register(Stage("truthfulqa", 2, "benchmark", TruthfulQASpec, _run, _estimate, parallel=True))
