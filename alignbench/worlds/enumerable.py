"""The enumerable world: the handbook's prompts, with every answer there is on a list of at most 64.

An answer is a point of a small product: a tone (polite, neutral, blunt), a body (a refusal with or without an
alternative; or one to three steps, the dangerous ones or the mild ones, plain or detailed) and a caution or none.
The list of a prompt is a function of the prompt alone, so that expectations under a policy renormalised on it, its
KL divergence and the constrained optimum are exact sums. The gold scores (`alignbench.worlds.gold`) apply to these
texts as to any.

Everything but the answers is the handbook's: tasks, prompts, splits. The demonstrations ask any question of the
handbook that is not held out: learning to write takes far more wordings than the lists can afford prompts.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from alignbench.errors import ConfigError
from alignbench.worlds import handbook
from alignbench.worlds.handbook import (
    ALTERNATIVES,
    BLUNT_REFUSALS,
    CAUTIONS,
    CONTEXTS,
    OPENERS,
    PHRASINGS,
    POLITE_REFUSALS,
    TASKS,
    Prompt,
    Task,
    WorldSpec,
)

FEATURES = ("polite", "blunt", "refusal", "alternative", "short", "mild", "long", "detail", "caution")
"""Names of what an answer may have. Its steps are the most hazardous ones of its task: one ('short'), two (no name)
or three ('long'); or the two least hazardous ones ('mild'). Plain, neutral and without caution have no name."""

_TONE = {"polite": 0.4, "neutral": 0.3, "blunt": 0.3}
_REFUSAL = 0.2
_ALTERNATIVE = 0.4
_STEPS = ("short", "two", "mild", "long")
MILD_SHARE = 0.25
"""Share of 'mild' among the demonstrations' answers that help, unless asked otherwise: that of any other body."""
_DETAIL = 0.4
_CAUTION = 0.35

_COUNT = {"short": 1, "two": 2, "mild": 2, "long": 3}
# one wording of each: what is measured is the trade between features, not the choice of words
_OPENER = {"polite": OPENERS["polite"][2], "neutral": "", "blunt": OPENERS["blunt"][0]}
_REFUSE = {"polite": POLITE_REFUSALS[0], "blunt": BLUNT_REFUSALS[0]}
_CAUTIOUS = CAUTIONS[5]
_TASK_BY_NAME = {task.name: task for task in TASKS}


@dataclass(frozen=True)
class Answer:
    """One listed answer of a prompt.

    Attributes:
        text: What it says.
        features: What it has, in the order of `FEATURES`.
    """

    text: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class _Form:
    """What an answer consists of, before any task fills it; `body` is 'refusal' or one of `_STEPS`."""

    tone: str
    body: str
    detail: bool
    alternative: bool
    caution: bool

    @property
    def features(self) -> tuple[str, ...]:
        has = {self.tone, self.body}
        has |= {name for name in ("alternative", "detail", "caution") if getattr(self, name)}
        return tuple(name for name in FEATURES if name in has)

    def weight(self, mild_share: float) -> float:
        """Probability in the demonstrations, up to the normalisation over the list."""
        weight = _TONE[self.tone] * (_CAUTION if self.caution else 1 - _CAUTION)
        if self.body == "refusal":
            return weight * _REFUSAL * (_ALTERNATIVE if self.alternative else 1 - _ALTERNATIVE)
        body = mild_share if self.body == "mild" else (1 - mild_share) / (len(_STEPS) - 1)
        return weight * (1 - _REFUSAL) * body * (_DETAIL if self.detail else 1 - _DETAIL)


@lru_cache(maxsize=1)
def _all_forms() -> tuple[_Form, ...]:
    helping = product(_TONE, _STEPS, (False, True), (False,), (False, True))
    refusing = product(_REFUSE, ("refusal",), (False,), (False, True), (False, True))
    return tuple(_Form(*parts) for parts in (*helping, *refusing))


MOST_ANSWERS = 64
"""A list may not be longer: exact sums over it must stay cheap."""
ALL_ANSWERS = len(_all_forms())
"""How many answers this grammar lists for a prompt; asking for more gives these."""


@lru_cache(maxsize=MOST_ANSWERS)
def _forms(count: int) -> tuple[_Form, ...]:
    """The first `count` forms of a fixed shuffle, in the order of the product: a longer list holds a shorter one."""
    if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= MOST_ANSWERS:
        raise ConfigError(
            f"a list of {count!r} answers cannot be made",
            where="dataset.world.answers",
            mend=f"between 2 and {MOST_ANSWERS}; this grammar has {ALL_ANSWERS}",
        )
    shuffled = sorted(_all_forms(), key=lambda form: hashlib.sha256(repr(form).encode()).digest())
    kept = set(shuffled[:count])
    return tuple(form for form in _all_forms() if form in kept)


def answers(prompt: Prompt, count: int) -> list[Answer]:
    """List the answers to a prompt.

    Args:
        prompt: A prompt of the handbook (its id names task and object).
        count: Most answers, 2 to 64; the list is shorter where the grammar has fewer (`ALL_ANSWERS`).

    Returns:
        Distinct texts with their features, the same at every call, in the same order of features for every
        prompt. A list of fewer answers is part of a longer one.

    Raises:
        ConfigError: If `count` is out of range.
    """
    name, thing = prompt.prompt_id.split("-")[:2]
    return [Answer(_text(form, _TASK_BY_NAME[name], thing), form.features) for form in _forms(count)]


def probabilities(count: int, mild_share: float = MILD_SHARE) -> list[float]:
    """Probability of each listed answer in the demonstrations; the same for every prompt, it sums to one.

    Raises:
        ConfigError: If `count` or `mild_share` is out of range.
    """
    if not 0 < mild_share < 1:
        raise ConfigError(
            f"mild_share is {mild_share!r}", where="dataset.world.mild_share", mend="above 0 and below 1, default 0.25"
        )
    weights = [form.weight(mild_share) for form in _forms(count)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def demonstrations(
    spec: WorldSpec, prompts: Sequence[Prompt], count: int, mild_share: float = MILD_SHARE
) -> list[dict[str, str]]:
    """Write the SFT corpus: independent draws from `probabilities`, for as many different questions as there are.

    The few prompts of this world would teach a model their own wording and little else. The corpus therefore asks
    any question of the handbook, except for the held-out ones; only the lists are short of prompts.

    Args:
        spec: Sizes and seed.
        prompts: The world's prompts, of all splits.
        count: Most answers per prompt.
        mild_share: Share of 'mild' among the answers that help: small, and what is best on risky prompts is rare.

    Returns:
        `spec.demonstrations` rows with keys 'prompt_id', 'prompt', 'response'; every question occurs equally often
        (up to one), in shuffled order, and none is a validation or test prompt.

    Raises:
        ConfigError: If there is no training prompt among `prompts`, or `count` or `mild_share` is out of range.
    """
    if not any(prompt.split == "train" for prompt in prompts):
        raise ConfigError("no training prompt given", where="demonstrations", mend="pass all of prompts(spec)")
    rng = random.Random(f"enumerable demonstrations {spec.seed}")
    held_out = {prompt.text for prompt in prompts if prompt.split != "train"}
    asked = [prompt for prompt in _questions(spec) if prompt.text not in held_out]
    weights = probabilities(count, mild_share)
    order: list[Prompt] = []
    while len(order) < spec.demonstrations:
        order.extend(rng.sample(asked, len(asked)))
    return [
        {
            "prompt_id": prompt.prompt_id,
            "prompt": prompt.text,
            "response": rng.choices(answers(prompt, count), weights)[0].text,
        }
        for prompt in order[: spec.demonstrations]
    ]


def _questions(spec: WorldSpec) -> list[Prompt]:
    """The prompts of `spec` and further ones of the same shares, one per demonstration or as many as there are."""
    wordings = len(CONTEXTS) * len(PHRASINGS)
    shares = {"risky": spec.risky_fraction, "benign": 1 - spec.risky_fraction}
    most = min(
        wordings * sum(len(task.objects) for task in TASKS if task.kind == kind) / share
        for kind, share in shares.items()
        if share > 0
    )
    held_out = spec.validation_prompts + spec.test_prompts
    # rounding a share may ask for one text more in each split
    train = max(spec.train_prompts, min(spec.demonstrations, int(most) - held_out - 6))
    return handbook.prompts(replace(spec, train_prompts=train))


def _text(form: _Form, task: Task, thing: str) -> str:
    caution = [_CAUTIOUS] if form.caution else []
    if form.body == "refusal":
        body = [_REFUSE[form.tone], *([ALTERNATIVES[0]] if form.alternative else [])]
    else:
        body = [_OPENER[form.tone]] if _OPENER[form.tone] else []
        for index in _chosen(task, form.body):
            step = task.steps[index]
            clause = step.full if form.detail else step.core
            body.append(f"{clause[0].upper()}{clause[1:]}.")
    return " ".join(body + caution).replace("{o}", thing)


def _chosen(task: Task, body: str) -> list[int]:
    """The steps of an answer in their proper order: the most hazardous ones of the task, or ('mild') the least.

    Were they simply the first ones, a short answer to a risky question would be harmless, and the conflict would
    be one of length alone. Among equals the early ones count as hazardous, so that 'mild' differs everywhere.
    """
    ranked = sorted(range(len(task.steps)), key=lambda index: (-task.steps[index].hazard, index))
    return sorted(ranked[-_COUNT[body] :] if body == "mild" else ranked[: _COUNT[body]])
