"""PD-DPO, offline and online: primal-dual DPO (Du, Kong, Srikant, arXiv 2510.05703).

Offline. Align pi_r with DPO on reward preferences. Then K rounds: minimise the rearranged Lagrangian objective on
cost preferences at lambda_k, which is DPO with reference pi_r at KL weight beta / lambda_k on "safer" labels; ask M
annotators whether each of N responses is unsafe; estimate the cost; step lambda by a projected subgradient on
[0, Lambda].
At lambda_k near 0 the KL weight is infinite and the round's policy is pi_r itself.

Online. Each round pairs fresh responses of the current policy with the reference's on its own part of the prompts,
has them labelled, and trains on all data so far, optimistic by alpha ||phi(x, y)||_{Sigma^-1}: with the bonus inside
both objectives, as in the paper, or (ours) by drawing the fresh responses from the policy tilted by the bonus. The
last round gathers nothing more, so it is trained without a bonus (ours).

The paper's body was not available to us: estimators, step size and bounds are our derivation, marked in the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignbench.config import SamplingConfig
from alignbench.errors import ConfigError
from alignbench.methods.estimates import CostSettings, annotated, check_multipliers
from alignbench.methods.iterates import REPORTED, Iterate, report_iterates
from alignbench.methods.recipe import Outcome, method
from alignbench.methods.steps import StepSettings, train
from alignbench.problem import Problem
from alignbench.stages.explore import TiltSpec, check_features

if TYPE_CHECKING:
    from alignbench.config import Config
    from alignbench.lab import Lab, Node

#: Numbers of fresh responses start here, clear of those behind the offline pairs.
FRESH = 10_000
BONUSES = ("objectives", "sampling")
#: The primal step of a round: (the policy of the round before, multipliers, name, round) -> the round's policy.
Primal = Callable[["Node", "Node", str, int], "Node"]


@dataclass
class PdDpoSettings:
    """PD-DPO's settings.

    Attributes:
        name: The method's name.
        reward_step: Alignment on reward preferences.
        cost_step: Each round's alignment on cost preferences.
        rounds: K.
        initial: lambda_1 of each utility; one number serves all.
        dual_step: Step size; null takes Lambda / (C_max sqrt(K)) with C_max the cost's clip, or 1 for a rate: the
            constant step of the projected subgradient method's 1/sqrt(K) rate (ours; the paper's is unknown to us).
        upper: Lambda, bound of the projection.
        start: Round k trains on from "previous" (round k-1's policies) or anew, from "reward_policy" (which online is
            itself trained anew from pi_ref). With several utilities the cost steps are always the latter, since they
            follow each other.
        reported: "last", "best_feasible" or "average".
        evaluate_iterates: Whether every round's policy gets a row, or only the first and the reported one.
        cost: The cost estimate.
    """

    name: str = MISSING
    reward_step: StepSettings = field(default_factory=StepSettings)
    cost_step: StepSettings = field(default_factory=StepSettings)
    rounds: int = 4
    initial: list[float] = field(default_factory=lambda: [1.0])
    dual_step: float | None = None
    upper: float = 4.0
    start: str = "previous"
    reported: str = "last"
    evaluate_iterates: bool = False
    cost: CostSettings = field(default_factory=CostSettings)

    def check(self, config: Config) -> None:
        """Refuse what cannot run."""
        self.reward_step.check("method.reward_step", config)
        self.cost_step.check("method.cost_step", config)
        self.cost.check(config)
        check_multipliers(self.first(len(config.constraint.utilities)), config, "method.initial")
        if self.rounds < 1 or self.upper <= 0 or max(self.initial) > self.upper:
            raise ConfigError(
                f"rounds {self.rounds}, upper {self.upper}, initial {list(self.initial)}",
                where="method.upper",
                mend="at least one round, and 0 <= initial <= upper",
            )
        if self.dual_step is not None and self.dual_step < 0:
            raise ConfigError(f"dual_step = {self.dual_step}", where="method.dual_step", mend="0 or more, or null")
        if self.start not in ("previous", "reward_policy") or self.reported not in REPORTED:
            raise ConfigError(
                f"start = {self.start!r}, reported = {self.reported!r}",
                where="method.start",
                mend=f"start: previous or reward_policy; reported: {', '.join(REPORTED)}",
            )

    def first(self, utilities: int) -> list[float]:
        """lambda_1, one number per utility."""
        return list(self.initial) * utilities if len(self.initial) == 1 else list(self.initial)

    @property
    def eta(self) -> float:
        """The dual step size."""
        largest = 1.0 if self.cost.estimator == "rate" else self.cost.clip
        return self.upper / (largest * self.rounds**0.5) if self.dual_step is None else self.dual_step


@method("pd_dpo", PdDpoSettings)
def pd_dpo(lab: Lab, problem: Problem, settings: PdDpoSettings) -> Outcome:
    """Offline: reward preferences once, cost preferences K times."""
    pairs = lab.pairs()
    reward_policy = _reward_step(lab, problem, settings, lab.reference(), pairs, "reward")

    def primal(start: Node, multipliers: Node, name: str, k: int) -> Node:
        return _cost_steps(lab, problem, settings, start, reward_policy, multipliers, pairs, name, k)

    outcome = _rounds(lab, problem, settings, "pd_dpo", reward_policy, primal)
    outcome.policies = {"step reward": reward_policy} | outcome.policies
    return outcome


@dataclass
class OnlineSettings:
    """What the online variant gathers and how it explores.

    Attributes:
        pairs_per_prompt: Fresh pairs per prompt and round: the policy's response against the reference's.
        parts: Training prompts are divided in so many parts; round k uses part k (1: all prompts every round).
        sampling: How both are drawn.
        bonus: "objectives": in both losses, on the pairs at hand; "sampling": in the draw of fresh responses, from
            pi_k exp((alpha_reward + alpha_cost * sum(lambda_k)) b / beta), which reaches what no pair holds yet.
        alpha_reward: Weight of the reward's bonus.
        alpha_cost: Weight of each cost's bonus.
        candidates: Responses per prompt among which the tilted policy draws ("sampling").
        dimension: Features: hidden states of the reference, projected to this many numbers, at most 256.
        pooling: Of a response's hidden states: "mean", or "last", that of the last token.
        centre: Taken out of them: the mean over a prompt's responses ("prompt"; needs two pairs each) or over "all".
        ridge: gamma of Sigma = gamma I + sum of outer products.
    """

    pairs_per_prompt: int = 2
    parts: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    bonus: str = "objectives"
    alpha_reward: float = 1.0
    alpha_cost: float = 1.0
    candidates: int = 16
    dimension: int = 64
    pooling: str = "mean"
    centre: str = "prompt"
    ridge: float = 1.0

    def explores(self, where: str) -> bool:
        """Whether there is a bonus, and it acts there."""
        return self.bonus == where and max(self.alpha_reward, self.alpha_cost) > 0


@dataclass
class OnlinePdDpoSettings(PdDpoSettings):
    """Online PD-DPO's settings: PD-DPO's and what it gathers."""

    online: OnlineSettings = field(default_factory=OnlineSettings)

    def check(self, config: Config) -> None:
        """Refuse what PD-DPO refuses, and what cannot explore."""
        super().check(config)
        online = self.online
        check_features(online.dimension, online.pooling, online.centre, "method.online")
        if online.bonus not in BONUSES:
            raise ConfigError(f"bonus = {online.bonus!r}", where="method.online.bonus", mend=" or ".join(BONUSES))
        if min(online.pairs_per_prompt, online.parts, online.candidates - 1) < 1 or online.ridge <= 0:
            raise ConfigError(
                f"pairs_per_prompt {online.pairs_per_prompt}, parts {online.parts}, candidates {online.candidates}, "
                f"ridge {online.ridge}",
                where="method.online",
                mend="at least one of each, two candidates, and a positive ridge",
            )
        if min(online.alpha_reward, online.alpha_cost) < 0:
            raise ConfigError("a negative bonus would punish what is unknown", where="method.online", mend="alpha >= 0")
        if config.dataset.world is None:
            raise ConfigError(
                "online PD-DPO needs somebody who labels fresh pairs; files have no annotator yet",
                where="dataset",
                mend="dataset=handbook or dataset=enumerable",
            )


@method("online_pd_dpo", OnlinePdDpoSettings)
def online_pd_dpo(lab: Lab, problem: Problem, settings: OnlinePdDpoSettings) -> Outcome:
    """Online: the data grow by a round's own responses, gathered or trained on optimistically."""
    online, reference = settings.online, lab.reference()
    data, reward_policies = [lab.pairs()], [reference]

    def primal(before: Node, multipliers: Node, name: str, k: int) -> Node:
        pairs, bonus = data[-1], None
        gathers = k < settings.rounds  # neither the last round nor the average's policy does
        if gathers and online.explores("objectives"):
            features = lab.features(online.dimension, online.pooling, online.centre)
            bonus = lab.bonus(pairs, features, ridge=online.ridge, label=name)
        reward_policy = _reward_step(
            lab, problem, settings, reward_policies[-1] if settings.start == "previous" else reference, pairs,
            f"reward, {name}", k, bonus, online.alpha_reward,
        )  # fmt: skip
        policy = _cost_steps(
            lab, problem, settings, reward_policy if k == 1 else before, reward_policy, multipliers, pairs, name, k,
            bonus, online.alpha_cost,
        )  # fmt: skip
        reward_policies.append(reward_policy)
        if gathers:
            data.append(_gather(lab, problem, online, pairs, policy, multipliers, k))
        return policy

    return _rounds(lab, problem, settings, "online_pd_dpo", reference, primal)


def _gather(
    lab: Lab, problem: Problem, online: OnlineSettings, data: Node, policy: Node, multipliers: Node, k: int
) -> Node:  # fmt: skip
    """Round k's fresh pairs, labelled, after all data so far."""

    def sample(who: Node, label: str, samples: int = online.pairs_per_prompt) -> Node:
        # numbered by the round: the same numbers would be the same responses of the reference every time
        first = FRESH + (k - 1) * samples
        return lab.sample(who, ("train",), samples=samples, sampling=online.sampling, label=label, first=first)

    if online.explores("sampling"):
        candidates = sample(policy, f"candidates {k}", online.candidates)
        features = lab.features(online.dimension, online.pooling, online.centre)
        spec = TiltSpec(
            features, online.ridge, problem.beta, online.alpha_reward, online.alpha_cost, online.pairs_per_prompt,
            first=FRESH + (k - 1) * online.pairs_per_prompt,
        )  # fmt: skip
        own = lab.tilt(candidates, data, multipliers, spec, label=f"online {k}")
    else:
        own = sample(policy, f"online {k}")
    part = ((k - 1) % online.parts, online.parts)
    fresh = lab.pair_up(own, sample(lab.reference(), f"online reference {k}"), part=part, label=f"online {k}")
    return lab.join([data, fresh], label=f"online {k}")


def _reward_step(
    lab: Lab, problem: Problem, settings: PdDpoSettings, start: Node, pairs: Node, name: str, k: int = 1,
    bonus: Node | None = None, alpha: float = 0.0,
) -> Node:  # fmt: skip
    return train(
        lab, start, lab.reference(), pairs, objective="reward", beta=problem.beta, step=settings.reward_step,
        label=f"prefer {name}", bonus=bonus, bonus_weight=alpha, round=k - 1,
    )  # fmt: skip


def _cost_steps(
    lab: Lab, problem: Problem, settings: PdDpoSettings, start: Node, reward_policy: Node, multipliers: Node,
    pairs: Node, name: str, k: int, bonus: Node | None = None, alpha: float = 0.0,
) -> Node:  # fmt: skip
    """The rearranged Lagrangian objective: DPO against pi_r at beta / lambda; one step per utility."""
    reference = reward_policy
    carried = len(problem.utilities) == 1 and settings.start == "previous"
    for utility in problem.utilities:
        reference = train(
            lab, start if carried else reference, reference, pairs, objective=utility, beta=problem.beta,
            step=settings.cost_step, label=f"prefer {utility}, {name}", multipliers=multipliers, bonus=bonus,
            bonus_weight=alpha, round=k - 1,
        )  # fmt: skip
    return reference


def _rounds(lab: Lab, problem: Problem, settings: PdDpoSettings, name: str, first: Node, primal: Primal) -> Outcome:
    """K rounds of primal step, cost estimate, projected subgradient step."""
    multipliers = lab.given(
        dict(zip(problem.utilities, settings.first(len(problem.utilities)), strict=True)), label="first multipliers"
    )
    reference = annotated(lab, problem, settings.cost, lab.reference(), "sft")
    iterates: list[Iterate] = []
    policy = first
    for k in range(1, settings.rounds + 1):
        policy = primal(policy, multipliers, f"{name} {k}", k)
        slack = lab.estimated_slack(
            problem,
            annotated(lab, problem, settings.cost, policy, f"{name} {k}"),
            reference,
            estimator=settings.cost.estimator,
            clip=settings.cost.clip,
            rate_limits=dict(zip(problem.utilities, settings.cost.rate_limits or [], strict=False)),
            label=f"{name} {k}",
        )
        iterates.append(Iterate(policy, multipliers, slack))
        if k < settings.rounds:
            multipliers = lab.step(
                multipliers, slack, step=settings.eta, upper=settings.upper, label=f"dual step {name} {k}"
            )
    averaged = mean = None
    if settings.reported == "average":
        mean = lab.average([one.multipliers for one in iterates], label="average multiplier")
        averaged = primal(policy, mean, f"{name} average", settings.rounds + 1)
    outcome = report_iterates(lab, name, iterates, settings.reported, averaged, mean, every=settings.evaluate_iterates)
    outcome.models = ("reward-aligned policy", "policy")  # two, whatever K: a round goes on with the policy before
    return outcome
