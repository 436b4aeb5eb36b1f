"""A judge that is a causal language model on this machine: its text, or its first token's probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignbench.config import HardwareConfig, SamplingConfig
from alignbench.data.templates import render_prompt
from alignbench.data.tokenize import encode_prompt
from alignbench.engine.generate import Request, generate
from alignbench.engine.logprobs import progress
from alignbench.engine.runtime import derive_seed, device_of, dtype_of, memory_left
from alignbench.errors import ModelError
from alignbench.jsonio import plain
from alignbench.judging.asking import Answer, AnswerCache, Question
from alignbench.judging.protocols import LABELS
from alignbench.models import policy as policies

#: As temperature goes to 0 the likeliest token is drawn.
_COLDEST = 1e-6
TOO_LONG = "too long"


@dataclass(frozen=True)
class LocalJudge:
    """Which judge it is: all that changes its answers.

    Attributes:
        model: Fingerprint of its folder.
        template: How a question becomes its prompt; the task stands before the answers.
        max_length: Most tokens of question and answer together; what is longer is not judged, and counted.
        read: "text" (it writes its verdict) or "probability" (of the letters as its first token).
        least_mass: Least sum of the letters' probabilities; below it the answer is missing.
        dtype: Of its parameters.
        kind: Tells it from other judges in keys.
    """

    model: str
    template: str
    max_length: int
    read: str
    least_mass: float
    dtype: str
    kind: str = "local"


class LocalClient:
    """Asks one model.

    Args:
        judge: Which judge.
        folder: Its transformers folder.
        hardware: Device and batch sizes.
    """

    def __init__(self, judge: LocalJudge, folder: Path, hardware: HardwareConfig) -> None:
        self._judge, self._hardware, self._device = judge, hardware, device_of(hardware)
        self._tokenizer = policies.load_tokenizer(folder)
        self._folder = folder

    def ask(self, asked: Sequence[Question], cache: AnswerCache, label: str) -> list[Answer]:
        """The answers to all questions: from the cache, else from the model, a batch at a time and each batch kept.

        Raises:
            ModelError: the tokenizer has no token of its own for each letter ("probability" only).
        """
        identity = plain(self._judge)
        keys = [question.key(identity) for question in asked]
        found = {key: answer for key in dict.fromkeys(keys) if (answer := cache.get(key)) is not None}
        todo = [(key, question) for key, question in dict(zip(keys, asked, strict=True)).items() if key not in found]
        fitting: list[tuple[str, Question, tuple[int, ...]]] = []
        for key, question in todo:
            ids = self._ids(question)
            room = 1 if self._judge.read == "probability" else question.max_tokens
            if len(ids) + room > self._judge.max_length:
                found[key] = Answer("", tokens=0, reason=TOO_LONG)
            else:
                fitting.append((key, question, ids))
        if fitting:
            model = policies.load_policy(self._folder, dtype_of(self._hardware), self._device)
            fitting.sort(key=lambda one: len(one[2]), reverse=True)  # the largest batch first: too large shows at once
            weighs = self._judge.read == "probability"
            with progress(len(fitting), label, "ans") as bar:
                while fitting:
                    size = self._batch(len(fitting[0][2]))
                    part, fitting = fitting[:size], fitting[size:]
                    answers = self._weigh(model, part) if weighs else self._write(model, part)
                    for (key, _, _), answer in zip(part, answers, strict=True):
                        cache.put(key, answer)
                        found[key] = answer
                    bar.update(len(part))
        return [found[key] for key in keys]

    def _batch(self, longest: int) -> int:
        """Questions of a batch whose longest has that many tokens."""
        hardware = self._hardware
        most = hardware.eval_batch if self._judge.read == "probability" else hardware.generation_batch
        return max(1, min(most, hardware.eval_tokens // longest))

    def _ids(self, question: Question) -> tuple[int, ...]:
        text = "\n\n".join(message["content"] for message in question.messages)
        rendered = render_prompt(self._judge.template, text, self._tokenizer)
        return tuple(encode_prompt(self._tokenizer, rendered, max_prompt_length=None))

    def _write(self, model: Any, part: Sequence[tuple[str, Question, tuple[int, ...]]]) -> list[Answer]:
        sampling = SamplingConfig(part[0][1].max_tokens, temperature=max(_COLDEST, part[0][1].temperature))
        responses = generate(
            model,
            [Request(key, ids, question.repeat) for key, question, ids in part],
            sampling=sampling,
            eos_id=self._tokenizer.eos_token_id,
            pad_id=policies.pad_id(self._tokenizer),
            seed=derive_seed(0, "judge"),
            batch=len(part),
            device=self._device,
            memory=memory_left(self._hardware, self._device),
        )
        return [
            Answer(self._tokenizer.decode(response, skip_special_tokens=True), tokens=len(ids) + len(response))
            for (_, _, ids), response in zip(part, responses, strict=True)
        ]

    def _weigh(self, model: Any, part: Sequence[tuple[str, Question, tuple[int, ...]]]) -> list[Answer]:
        labels = label_tokens(self._tokenizer)
        masses = first_token_masses(model, [ids for _, _, ids in part], labels, policies.pad_id(self._tokenizer))
        return [
            Answer(json.dumps(dict(zip(LABELS, row, strict=True))), tokens=len(ids))
            for (_, _, ids), row in zip(part, masses, strict=True)
        ]


def label_tokens(tokenizer: Any) -> list[list[int]]:
    """For each of LABELS the tokens that it can begin with, bare and after a space.

    Raises:
        ModelError: two labels share one, so that the first token does not tell them apart.
    """
    found = []
    for label in LABELS:
        spelled = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (label, f" {label}"))
        # "_A" as two tokens begins with a blank, which says nothing about the letter
        found.append(sorted({ids[0] for ids in spelled if len(ids) == 1}))
    every = [token for tokens in found for token in tokens]
    if len(every) != len(set(every)) or not all(found):
        raise ModelError(
            f"the tokenizer has no token of its own for each of {', '.join(LABELS)}",
            where="judge.local.read",
            mend="judge.local.read=text, or another model",
        )
    return found


def first_token_masses(
    model: Any, prompts: Sequence[tuple[int, ...]], labels: Sequence[Sequence[int]], pad_id: int
) -> list[list[float]]:
    """Probability of each label as the next token, float, by prompt; a label's tokens are added up."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # left padding: the last position is the prompt's last token
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=1,
        )
        probabilities = torch.softmax(out.logits[:, -1].double(), -1)
    return [[float(row[list(tokens)].sum()) for tokens in labels] for row in probabilities.cpu()]
