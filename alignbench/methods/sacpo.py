"""SACPO and P-SACPO: stepwise alignment (Wachi et al., arXiv 2404.11049).

Algorithm 1. Align with the reward at KL weight beta; then, starting from *and* referenced to the result, align
with each utility at beta / lambda. Theorem 1: the two steps reach pi_ref exp((r + lambda g) / beta); Remark 2:
their order does not matter; Theorem 4: several utilities are several such steps. Each step may use DPO, IPO or KTO.

P-SACPO (section 6). Take the reward-aligned policy and a conservative SACPO policy (a lambda that is too large) and
average their weights: theta_q = (1 - q) theta_r + q theta_conservative. A larger q is safer; no new training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignbench.errors import ConfigError
from alignbench.methods.recipe import Outcome, method
from alignbench.methods.steps import StepSettings
from alignbench.problem import Problem, lambda_from_ratio

if TYPE_CHECKING:
    from alignbench.config import Config
    from alignbench.lab import Lab, Node


@dataclass
class SacpoSettings:
    """SACPO's settings.

    Attributes:
        name: The method's name.
        order: "helpful_first" (paper's main setting) or "safe_first" (Remark 2).
        beta_over_lambda: KL weight of each utility's step, one per constrained utility.
        reward_step: Loss and optimiser of the reward step.
        safety_step: Loss and optimiser of every utility's step.
    """

    name: str = MISSING
    order: str = "helpful_first"
    beta_over_lambda: list[float] = MISSING
    reward_step: StepSettings = field(default_factory=StepSettings)
    safety_step: StepSettings = field(default_factory=StepSettings)

    def check(self, config: Config) -> None:
        """Refuse settings that do not fit the constraints."""
        self.reward_step.check("method.reward_step")
        self.safety_step.check("method.safety_step")
        if self.order not in ("helpful_first", "safe_first"):
            raise ConfigError(f"order = {self.order!r}", where="method.order", mend="helpful_first or safe_first")
        utilities = config.constraint.utilities
        if len(self.beta_over_lambda) != len(utilities) or min(self.beta_over_lambda, default=0) <= 0:
            raise ConfigError(
                f"beta_over_lambda = {list(self.beta_over_lambda)} for the utilities {list(utilities)}",
                where="method.beta_over_lambda",
                mend="one positive number per utility, for instance method.beta_over_lambda=[0.25]",
            )


@method("sacpo", SacpoSettings)
def sacpo(lab: Lab, problem: Problem, settings: SacpoSettings) -> Outcome:
    """Algorithm 1, for any number of utilities and in either order."""
    reward = ("reward", problem.beta, settings.reward_step)
    safety = [
        (utility, ratio, settings.safety_step)
        for utility, ratio in zip(problem.utilities, settings.beta_over_lambda, strict=True)
    ]
    steps = [reward, *safety] if settings.order == "helpful_first" else [*safety, reward]

    policy, done = lab.reference(), []
    policies: dict[str, Node] = {}
    for objective, beta, step in steps:
        done.append(objective)
        name = " -> ".join(done)
        # start and reference are both the previous step's policy: with another reference this is another method
        policy = lab.prefer(
            policy,
            policy,
            lab.pairs(),
            objective=objective,
            beta=beta,
            settings=step.prefer(),
            label=f"prefer {name}",
        )
        policies[name] = policy
    *earlier, last = policies
    named = {f"step {name}": policies[name] for name in earlier} | {"sacpo": policies[last]}
    return Outcome(named, "sacpo", multipliers=_multipliers(problem, settings))


def _multipliers(problem: Problem, settings: SacpoSettings) -> dict[str, float]:
    return {
        utility: lambda_from_ratio(problem.beta, ratio)
        for utility, ratio in zip(problem.utilities, settings.beta_over_lambda, strict=True)
    }


@dataclass
class PSacpoSettings(SacpoSettings):
    """P-SACPO's settings; `beta_over_lambda` is the conservative one (paper: 0.01).

    Attributes:
        q: Weights of the conservative policy, each in [0, 1]; one training serves all.
        reported_q: The one that is the method's result; it must be among `q`.
    """

    q: list[float] = MISSING
    reported_q: float = MISSING

    def check(self, config: Config) -> None:
        """Refuse what SACPO refuses, and a q outside [0, 1]."""
        super().check(config)
        if self.order != "helpful_first":
            raise ConfigError(
                "P-SACPO merges the reward-aligned policy, which only helpful_first makes",
                where="method.order",
                mend="method.order=helpful_first",
            )
        if not self.q or not all(0 <= q <= 1 for q in self.q) or self.reported_q not in self.q:
            raise ConfigError(
                f"q = {list(self.q)}, reported_q = {self.reported_q}",
                where="method.q",
                mend="every q lies in [0, 1] and reported_q is one of them, e.g. method.q=[0.25,0.5,0.75]",
            )


@method("p_sacpo", PSacpoSettings)
def p_sacpo(lab: Lab, problem: Problem, settings: PSacpoSettings) -> Outcome:
    """Section 6: linear merges of the reward-aligned and the conservative policy."""
    conservative = sacpo(lab, problem, settings)
    reward_aligned, safest = next(iter(conservative.policies.values())), conservative.policies["sacpo"]
    merged = {
        f"p_sacpo q={q:g}": lab.merge([(reward_aligned, 1 - q), (safest, q)], label=f"merge q={q:g}")
        for q in settings.q
    }
    names = {"step reward": reward_aligned} | merged | {"conservative": safest}
    # For a log-linear family the merge is exactly lambda = q * conservative lambda; for a network it is a guide.
    multipliers = {u: settings.reported_q * value for u, value in conservative.multipliers.items()}
    return Outcome(names, f"p_sacpo q={settings.reported_q:g}", multipliers=multipliers)
