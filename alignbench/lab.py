"""The verbs a recipe may use. Each looks up a stage's artifact in the store or runs the stage.

A `Lab` runs; a `PlanLab` (see `alignbench.plan`) only says what would run. A recipe cannot tell them apart, except
through `peek`, which gives None in a plan for what is not computed yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignbench import stages
from alignbench.config import LoraConfig, SamplingConfig, TrainConfig
from alignbench.lab_base import Node, spec_of
from alignbench.lab_data import DataLab
from alignbench.lab_scores import score_table
from alignbench.problem import Problem
from alignbench.stages.certify import CertifySpec
from alignbench.stages.data import LabelSpec, PairUpSpec
from alignbench.stages.dualize import (
    AverageSpec,
    CostSpec,
    DualSpec,
    GivenSpec,
    PredictSpec,
    ProblemSpec,
    SlackSpec,
    StepSpec,
)
from alignbench.stages.evaluate import EvaluateSpec
from alignbench.stages.explore import BonusSpec, FeaturesSpec, JoinSpec, TiltSpec
from alignbench.stages.geometry import GeometrySpec
from alignbench.stages.listed import DrawSpec, ListSpec, LookupSpec, RatioSpec
from alignbench.stages.measure import LogProbsSpec, SampleSpec
from alignbench.stages.policies import MergeSpec, PreferSpec, SftSpec
from alignbench.stages.relabel import AnnotateSpec, ImplicitSpec, RelabelSpec

__all__ = ["Bank", "Lab", "Node", "PreferSettings", "spec_of"]


@dataclass(frozen=True)
class PreferSettings:
    """One preference stage of a recipe: its loss and its optimiser settings.

    Attributes:
        loss: "dpo", "ipo" or "kto".
        train: Optimiser settings.
        kto_labels: "preferred" or "is_safe": what makes a response desirable (KTO only).
        kto_balance: Weight undesirable responses by n_desirable / n_undesirable (KTO only).
        soft: Train on the labels' probabilities instead of the drawn labels (DPO with relabelled pairs only).
    """

    loss: str
    train: TrainConfig
    kto_labels: str = "preferred"
    kto_balance: bool = True
    soft: bool = False


@dataclass(frozen=True)
class Bank:
    """Scored responses that stand for a policy: samples, or every listed answer with the policy's log-probs.

    Attributes:
        responses: The responses.
        scores: Their scores.
        weights: Log-probs of listed answers; None for samples.
    """

    responses: Node
    scores: Node
    weights: Node | None = None

    def inputs(self, prefix: str = "") -> dict[str, Node]:
        """The bank as a stage's inputs."""
        found = {f"{prefix}responses": self.responses, f"{prefix}scores": self.scores}
        return found if self.weights is None else found | {f"{prefix}weights": self.weights}


class Lab(DataLab):
    """Runs stages for one configuration and one seed, through the store."""

    # ---------------------------------------------------------------- policies and data

    def reference(self) -> Node:
        """pi_ref: the base model, supervised fine-tuned where the configuration says so."""
        model = self.config.model
        data = self.data()  # first: broken rows are found before a model is fetched
        base = self.base()
        if model.sft is None:
            return base
        return self._run(
            stages.SFT,
            SftSpec(
                model.sft,
                model.lora if model.lora_for_sft else LoraConfig(),
                self.tokens,
                self.config.hardware.dtype,
                self.config.hardware.optimizer,
            ),
            {"start": base, "data": data},
            "sft",
            hints=self._trainable if model.lora_for_sft else {},
        )

    def pairs(self) -> Node:
        """Preference pairs: read from files, or sampled from the reference and labelled by the world."""
        world = self.config.dataset.world
        if world is None:
            self.refuse_no_pairs()
            return self.data()
        responses = self.sample(
            self.reference(),
            ("train", "validation"),
            samples=2 * world.pairs_per_prompt,
            sampling=world.sampling,
            label="pairs",
            without=tuple(world.uncovered),
        )
        inputs = {"data": self.data(), "responses": responses, "scores": self.score(responses, "gold", label="pairs")}
        return self._run(stages.LABEL, LabelSpec(("politeness",), world.pairs_per_prompt), inputs, "label pairs")

    def pair_up(self, first: Node, second: Node, *, part: tuple[int, int], label: str) -> Node:
        """Labelled pairs of two policies' responses to part `part[0]` of `part[1]` of the training prompts."""
        inputs = {"data": self.data()}
        for role, responses in (("first", first), ("second", second)):
            inputs |= {role: responses, f"{role}_scores": self.score(responses, "gold", label=f"{role} of {label}")}
        return self._run(stages.PAIR_UP, PairUpSpec(("politeness",), part), inputs, f"label {label}")

    def join(self, parts: Sequence[Node], *, label: str) -> Node:
        """Several pairs tables as one."""
        return self._run(stages.JOIN, JoinSpec(), {f"part_{i}": p for i, p in enumerate(parts)}, f"join {label}")

    def prefer(
        self,
        start: Node,
        reference: Node,
        pairs: Node,
        *,
        objective: str,
        beta: float,
        settings: PreferSettings,
        label: str,
        labels: Node | None = None,
        multipliers: Node | None = None,
        bonus: Node | None = None,
        bonus_weight: float = 0.0,
        round: int = 0,
    ) -> Node:
        """Preference training from `start` against `reference` (SACPO eqs. 6, 7); reference log-probs cached.

        Args:
            start: Policy whose weights training starts from.
            reference: Policy that the KL term refers to.
            pairs: Preference pairs.
            objective: Whose labels decide: "reward", a utility, or "lagrangian" with `labels`.
            beta: KL weight; the problem's beta where `multipliers` divide it.
            settings: Loss and optimiser.
            label: Name of the stage.
            labels: Labels from scores in place of the pairs' own.
            multipliers: The KL weight is beta / lambda of `objective`; at lambda = 0 the reference is returned.
            bonus: Exploration bonus of every response.
            bonus_weight: alpha, the bonus's factor.
            round: Which round of an iterative method this is: the order of pairs goes on from the round before.
        """
        if labels is None:
            pairs = self.labelled(pairs, objective)
        cached = self.pair_logprobs(
            reference, pairs, label=f"reference log-probs for {label}", mismatched=settings.loss == "kto"
        )
        spec = PreferSpec(
            objective=objective,
            loss=settings.loss,
            beta=beta,
            train=settings.train,
            lora=self.config.model.lora,
            tokens=self.tokens,
            dtype=self.config.hardware.dtype,
            # what only KTO reads must not give DPO another key
            kto_labels=settings.kto_labels if settings.loss == "kto" else "preferred",
            kto_balance=settings.kto_balance or settings.loss != "kto",
            soft=settings.soft and labels is not None,
            bonus_weight=bonus_weight if bonus is not None else 0.0,
            ratio_of=objective if multipliers is not None else None,
            round=round,
            optimizer=self.config.hardware.optimizer,
        )
        inputs = {"start": start, "reference": reference, "pairs": pairs, "reference_logprobs": cached}
        extra = {"labels": labels, "multipliers": multipliers, "bonus": bonus if bonus_weight > 0 else None}
        inputs |= {role: node for role, node in extra.items() if node is not None}
        return self._run(stages.PREFER, spec, inputs, label, hints=self._trainable)

    def merge(self, parts: Sequence[tuple[Node, float]], *, label: str) -> Node:
        """Linear merge of policies' weights; the weights sum to one."""
        inputs = {f"policy_{i}": node for i, (node, _) in enumerate(parts)}
        return self._run(stages.MERGE, MergeSpec(tuple(w for _, w in parts)), inputs, label)

    # ---------------------------------------------------------------- looking at policies

    def sample(
        self,
        policy: Node,
        splits: tuple[str, ...],
        *,
        samples: int,
        sampling: SamplingConfig,
        label: str,
        without: tuple[str, ...] = (),
        first: int = 0,
        prompts: int | None = None,
        in_own_words: bool = False,
    ) -> Node:
        """Responses of `policy` to the prompts of `splits`; listed answers are drawn from the policy on the list.

        `in_own_words`: the policy answers freely where there is a list, too.

        `first` numbers them: responses of other numbers are other draws. `prompts`: at most so many prompts (not where
        answers are listed, by the settings' checks); None: all.
        """
        data, count = self.prompts(splits, prompts)
        every = sum(map(self._prompts_of, splits))
        held_out = sum(self._prompts_of(split) for split in splits if split != "train")
        hints = {"prompts": count, "trained_share": 1 - held_out / max(1.0, every)}
        if self._answers_are_listed and not in_own_words:
            inputs = {"listed": self.listed(splits), "logprobs": self.listed_logprobs(policy, splits, label=label)}
            return self._run(
                stages.DRAW, DrawSpec(splits, samples, without, first), inputs, f"sample {label}", hints=hints
            )
        spec = SampleSpec(splits, samples, sampling, self.tokens, self.config.hardware.dtype, first)
        stage = stages.SAMPLE_VLLM if self.config.hardware.generator == "vllm" else stages.SAMPLE
        return self._run(stage, spec, {"policy": policy, "data": data}, f"sample {label}", hints=hints)

    def listed(self, splits: tuple[str, ...]) -> Node:
        """Every listed answer to the prompts of `splits`."""
        # the reference gives the tokenizer, which all policies share
        inputs = {"data": self.data(), "policy": self.reference()}
        spec = ListSpec(splits, self.tokens)
        hints = {"prompts": float(sum(map(self._prompts_of, splits)))}
        return self._run(stages.LIST, spec, inputs, f"list answers, {' and '.join(splits)}", hints=hints)

    def listed_logprobs(self, policy: Node, splits: tuple[str, ...], *, label: str) -> Node:
        """Log-probs of every listed answer under `policy`; of samples from files the log of their weights."""
        return self._on_list(policy, self.listed(splits), f"log-probs of {label} on the list, {' and '.join(splits)}")

    def _on_list(self, policy: Node, listed: Node, label: str) -> Node:
        spec = LogProbsSpec("responses", self.tokens, self.config.hardware.dtype)
        own = self._run(stages.LOGPROBS, spec, {"policy": policy, "rows": listed}, label)
        files = self.config.dataset.files
        if files is None or files.responses_as != "samples":
            return own
        inputs = {"policy": self.reference(), "rows": listed}
        base = self._run(stages.LOGPROBS, spec, inputs, f"log-probs of sft, {listed.label}")
        inputs = {"logprobs": own, "reference_logprobs": base, "listed": listed}
        return self._run(stages.RATIO, RatioSpec(), inputs, f"weights from {label}")

    def score(self, responses: Node, scorer: str, *, label: str) -> Node:
        """Reward and utilities of responses."""
        return score_table(self, responses, scorer, table="responses", label=f"score {label}")

    def pair_scores(self, pairs: Node, scorer: str) -> Node:
        """Reward and utilities of both responses of every pair."""
        return score_table(self, pairs, scorer, table="pairs", label=f"score pairs with {scorer}")

    def logprobs(self, policy: Node, responses: Node, *, label: str) -> Node:
        """Log-probs of sampled responses under `policy`; of listed ones renormalised on the list."""
        if "listed" in responses.inputs:  # drawn from a list
            listed = responses.inputs["listed"]
            whole = self._on_list(policy, listed, f"{label}, on the list")
            inputs = {"rows": responses, "listed": listed, "logprobs": whole}
            return self._run(stages.LOOKUP, LookupSpec(), inputs, label)
        spec = LogProbsSpec("responses", self.tokens, self.config.hardware.dtype)
        return self._run(stages.LOGPROBS, spec, {"policy": policy, "rows": responses}, label)

    def pair_logprobs(self, policy: Node, pairs: Node, *, label: str, mismatched: bool = False) -> Node:
        """Log-probs of both responses of every pair under `policy`."""
        spec = LogProbsSpec("pairs", self.tokens, self.config.hardware.dtype, mismatched=mismatched)
        return self._run(stages.LOGPROBS, spec, {"policy": policy, "rows": pairs}, label)

    def evaluate(self, policy: Node, problem: Problem, *, label: str) -> Node:
        """Every metric of `policy` against the reference, on held-out prompts."""
        reference = self.reference()
        answers, scores = self._answers(policy, label)
        base_answers, base_scores = self._answers(reference, "sft")
        inputs = {
            "data": self.data(),
            "responses": answers,
            "scores": scores,
            "reference_responses": base_answers,
            "reference_scores": base_scores,
            "logprobs": self.logprobs(policy, answers, label=f"log-probs {label}"),
            "reference_logprobs": self.logprobs(reference, answers, label=f"log-probs of sft on {label}"),
        }
        ev = self.config.evaluate
        spec = EvaluateSpec(
            problem.form.value, problem.utilities, problem.thresholds, problem.beta, ev.level, ev.resamples,
            tuple(ev.refusal_phrases), ev.refusal_words,
        )  # fmt: skip
        return self._run(stages.EVALUATE, spec, inputs, f"evaluate {label}")

    def benchmark(self, policy: Node, *, label: str) -> Node | None:
        """TruthfulQA's MC1 and MC2 of `policy`; None where no benchmark is asked for."""
        if self.config.benchmark is None:
            return None
        spec, hints = self._asked, {"questions": 817.0}
        return self._run(stages.TRUTHFULQA, spec, {"policy": policy}, f"truthfulqa {label}", seed=0, hints=hints)

    def certify(
        self, policy: Node, problem: Problem, *, label: str, multipliers: Node | None = None
    ) -> dict[str, Node]:
        """Exact gaps of `policy` by split, on the training prompts (the problem posed) and on the reported ones.

        Empty where the evaluation's answers are not listed, since nothing is exact there.
        """
        if not self._answers_are_listed or self._reported_in_own_words:
            return {}
        found = {}
        for split in ("train", self.config.evaluate.split):
            inputs = {
                "listed": self.listed((split,)),
                "scores": self.score(
                    self.listed((split,)), self.config.evaluate.scorer, label=f"list answers, {split}"
                ),
                "logprobs": self.listed_logprobs(policy, (split,), label=label),
                "reference_logprobs": self.listed_logprobs(self.reference(), (split,), label="sft"),
            }
            inputs |= {} if multipliers is None else {"multipliers": multipliers}
            spec = CertifySpec(ProblemSpec.of(problem))
            found[split] = self._run(stages.CERTIFY, spec, inputs, f"certify {label}, {split}")
        return found

    # ---------------------------------------------------------------- the dual

    def answers(
        self, policy: Node, *, splits: tuple[str, ...], samples: int, sampling: SamplingConfig, label: str,
        prompts: int | None = None,
    ) -> tuple[Node, Node | None]:  # fmt: skip
        """Responses that stand for `policy`: `samples` per prompt, or every listed answer and its log-probs."""
        if self._answers_are_listed:
            return self.listed(splits), self.listed_logprobs(policy, splits, label=label)
        return self.sample(policy, splits, samples=samples, sampling=sampling, label=label, prompts=prompts), None

    def implicit_scores(
        self,
        rows: Node,
        reference: Node,
        policies: Mapping[str, tuple[Node, float]],
        *,
        table: str,
    ) -> Node:
        """Scores implied by aligned policies: KL weight times log-ratio to the reference (CAN eq. 7).

        Args:
            rows: Pairs or responses.
            reference: pi_ref.
            policies: Objective -> (its aligned policy, the KL weight it was aligned with).
            table: "pairs" or "responses".
        """

        def logprobs(policy: Node, name: str) -> Node:
            label = f"log-probs of {name} on {rows.label}"
            spec = LogProbsSpec(table, self.tokens, self.config.hardware.dtype)
            return self._run(stages.LOGPROBS, spec, {"policy": policy, "rows": rows}, label)

        inputs = {"rows": rows, "reference": logprobs(reference, "sft")}
        inputs |= {name: logprobs(policy, f"aligned {name}") for name, (policy, _) in policies.items()}
        spec = ImplicitSpec(table, tuple((name, weight) for name, (_, weight) in policies.items()))
        return self._run(stages.IMPLICIT, spec, inputs, f"implicit scores of {rows.label}")

    def solve_dual(self, problem: Problem, bank: Bank, *, solver: str) -> Node:
        """lambda* for the problem's thresholds, on the reference's bank."""
        ev = self.config.evaluate
        spec = DualSpec(ProblemSpec.of(problem), solver, ev.level, min(ev.resamples, 500))
        return self._run(stages.DUAL, spec, bank.inputs(), "dual")

    def dual_geometry(self, solved: Node) -> Node:
        """The dual around its minimiser, for pictures: on the bank and for the problem that were solved."""
        spec = GeometrySpec(solved.identity.spec.problem)
        return self._run(stages.GEOMETRY, spec, solved.inputs, f"geometry of {solved.label}")

    def given(self, multipliers: Mapping[str, float], *, label: str = "given multipliers") -> Node:
        """Multipliers that the configuration states."""
        return self._run(stages.GIVEN, GivenSpec(tuple(multipliers.items())), {}, label, seed=0)

    def average(self, multipliers: Sequence[Node], *, label: str) -> Node:
        """Mean of several iterates' multipliers."""
        inputs = {f"multipliers_{i:02d}": node for i, node in enumerate(multipliers)}
        return self._run(stages.AVERAGE, AverageSpec(), inputs, label, seed=0)

    def predict(self, problem: Problem, bank: Bank, multipliers: Node, *, label: str) -> Node:
        """What the reference's bank says `multipliers` will achieve."""
        ev = self.config.evaluate
        spec = PredictSpec(ProblemSpec.of(problem), ev.level, ev.resamples)
        return self._run(stages.PREDICT, spec, bank.inputs() | {"multipliers": multipliers}, f"predict {label}")

    def slack(self, problem: Problem, own: Bank, reference: Bank, *, label: str) -> Node:
        """Achieved minus requested margin of a policy (CAID eq. 5)."""
        ev = self.config.evaluate
        inputs = own.inputs() | reference.inputs("reference_")
        spec = SlackSpec(ProblemSpec.of(problem), ev.level, ev.resamples)
        return self._run(stages.SLACK, spec, inputs, f"slack {label}")

    def annotate(self, scores: Node, problem: Problem, *, labels: int, draw: str, label: str) -> Node:
        """Binary unsafe labels of scored responses, `labels` each."""
        spec = AnnotateSpec(problem.utilities, labels, draw)
        return self._run(stages.ANNOTATE, spec, {"scores": scores}, f"annotate {label}")

    def estimated_slack(
        self,
        problem: Problem,
        own: tuple[Node, Node],
        reference: tuple[Node, Node],
        *,
        estimator: str,
        clip: float,
        rate_limits: Mapping[str, float],
        label: str,
    ) -> Node:
        """Slack from binary labels; `own` and `reference` are (responses, their labels)."""
        ev = self.config.evaluate
        spec = CostSpec(ProblemSpec.of(problem), estimator, clip, tuple(rate_limits.items()), ev.level, ev.resamples)
        inputs = {"responses": own[0], "labels": own[1]}
        inputs |= {"reference_responses": reference[0], "reference_labels": reference[1]}
        return self._run(stages.COST, spec, inputs, f"slack {label}")

    def step(
        self,
        multipliers: Node,
        slack: Node,
        *,
        step: float | None,
        scale: float = 1.0,
        upper: float | None = None,
        curvature: Node | None = None,
        label: str,
    ) -> Node:
        """Projected dual step; without a step size it comes from the Hessian of `curvature` (a solved dual)."""
        inputs = {"multipliers": multipliers, "slack": slack}
        if step is None:
            assert curvature is not None  # by the settings' checks
            inputs |= {"dual": curvature}
        return self._run(stages.STEP, StepSpec(step, scale, upper), inputs, label)

    def relabel(
        self, pairs: Node, scores: Node, *, objective: str, kind: str, label: str,
        multipliers: Node | None = None, scale: float = 1.0, draw: int = 0,
    ) -> Node:  # fmt: skip
        """Pseudo-preferences of pairs: by one score, or by r + <lambda, g>; `draw` names an independent draw."""
        inputs = {"pairs": pairs, "scores": scores}
        inputs |= {} if multipliers is None else {"multipliers": multipliers}
        return self._run(stages.RELABEL, RelabelSpec(objective, kind, scale, draw), inputs, label)

    def features(self, dimension: int, pooling: str, centre: str) -> FeaturesSpec:
        """How the reference's hidden states become features; nothing runs yet."""
        return FeaturesSpec(dimension, self.tokens, self.config.hardware.dtype, pooling, centre)

    def bonus(self, pairs: Node, features: FeaturesSpec, *, ridge: float, label: str) -> Node:
        """Exploration bonus ||phi||_{Sigma^-1} of both responses of every pair, on the reference's features."""
        inputs = {"policy": self.reference(), "pairs": pairs}
        made = self._run(stages.FEATURES, features, inputs, f"features of {label}")
        return self._run(stages.BONUS, BonusSpec(ridge), {"pairs": pairs, "features": made}, f"bonus of {label}")

    def tilt(self, responses: Node, pairs: Node, multipliers: Node, spec: TiltSpec, *, label: str) -> Node:
        """Responses of the optimistic version of the policy that gave `responses`, where `pairs` say little."""
        inputs = {"policy": self.reference(), "pairs": pairs, "responses": responses, "multipliers": multipliers}
        return self._run(stages.TILT, spec, inputs, f"tilt {label}", hints={"prompts": self._prompts_of("train")})

    def peek(self, node: Node, name: str) -> dict[str, Any] | None:
        """A JSON file of an artifact; None in a plan that has not got it."""
        return None if node.artifact is None else dict(node.artifact.json(name))

    # ---------------------------------------------------------------- private

    def _answers(self, policy: Node, label: str) -> tuple[Node, Node]:
        ev = self.config.evaluate
        responses = self.sample(
            policy, (ev.split,), samples=ev.samples_per_prompt, sampling=ev.sampling, label=label, prompts=ev.prompts,
            in_own_words=self._reported_in_own_words,
        )  # fmt: skip
        return responses, self.score(responses, ev.scorer, label=label)
