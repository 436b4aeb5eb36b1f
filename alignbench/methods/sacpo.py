"""SACPO and P-SACPO: stepwise alignment (Wachi et al., arXiv 2404.11049).

Algorithm 1. Align with the reward at KL weight beta; then, starting from *and* referenced to the result, align
with each utility at beta / lambda. Theorem 1: the two steps reach pi_ref exp((r + lambda g) / beta); Remark 2:
their order does not matter; Theorem 4: several utilities are several such steps. Each step may use DPO, IPO or KTO.
The paper has no procedure for lambda: here it is a number, beta / lambda, or (ours) the dual's solution for the
asked thresholds.

P-SACPO (section 6). Take the reward-aligned policy and a conservative SACPO policy (a lambda that is too large) and
average their weights: theta_q = (1 - q) theta_r + q theta_conservative. A larger q is safer; no new training. Which q
to take is again open in the paper; ours is the smallest one that meets the thresholds on validation prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignbench.errors import ConfigError
from alignbench.lab import Bank
from alignbench.methods.estimates import DualSettings, check_multipliers, check_scorer
from alignbench.methods.recipe import Outcome, method
from alignbench.methods.steps import StepSettings, train
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
        beta_over_lambda: KL weight of each utility's step, one per constrained utility; null: not given so.
        multipliers: lambda of each utility; null: not given so. With neither the dual is solved.
        dual: The bank and the solver, where lambda comes from the dual.
        reward_step: Loss and optimiser of the reward step.
        safety_step: Loss and optimiser of every utility's step.
    """

    name: str = MISSING
    order: str = "helpful_first"
    beta_over_lambda: list[float] | None = None
    multipliers: list[float] | None = None
    dual: DualSettings = field(default_factory=DualSettings)
    reward_step: StepSettings = field(default_factory=StepSettings)
    safety_step: StepSettings = field(default_factory=StepSettings)

    def check(self, config: Config) -> None:
        """Refuse settings that do not fit the constraints."""
        self.reward_step.check("method.reward_step", config)
        self.safety_step.check("method.safety_step", config)
        if self.order not in ("helpful_first", "safe_first"):
            raise ConfigError(f"order = {self.order!r}", where="method.order", mend="helpful_first or safe_first")
        if self.beta_over_lambda is not None and self.multipliers is not None:
            raise ConfigError(
                "beta_over_lambda and multipliers both state lambda",
                where="method.beta_over_lambda",
                mend="set one of them to null",
            )
        if self.multipliers is not None:
            check_multipliers(self.multipliers, config, "method.multipliers")
        if self.beta_over_lambda is None:
            if self.multipliers is None:
                self._check_dual(config)
            return
        utilities = config.constraint.utilities
        if len(self.beta_over_lambda) != len(utilities) or min(self.beta_over_lambda, default=0) <= 0:
            raise ConfigError(
                f"beta_over_lambda = {list(self.beta_over_lambda)} for the utilities {list(utilities)}",
                where="method.beta_over_lambda",
                mend="one positive number per utility, for instance method.beta_over_lambda=[0.25]",
            )

    def _check_dual(self, config: Config) -> None:
        try:
            self.dual.check(config, scored=True)
        except ConfigError as error:
            raise ConfigError(
                f"lambda is not stated, and the dual cannot be solved for it: {error.what}",
                where=error.where,
                mend=f"method.beta_over_lambda=[0.25] or method.multipliers=[2.0]; or {error.mend}",
            ) from None


@method("sacpo", SacpoSettings)
def sacpo(lab: Lab, problem: Problem, settings: SacpoSettings) -> Outcome:
    """Algorithm 1, for any number of utilities and in either order."""
    bank, multipliers = _multipliers(lab, problem, settings)
    objectives = ["reward", *problem.utilities]
    if settings.order == "safe_first":
        objectives = objectives[1:] + objectives[:1]
    policy, done = lab.reference(), []
    policies: dict[str, Node] = {}
    for objective in objectives:
        done.append(objective)
        name = " -> ".join(done)
        # start and reference are both the previous step's policy: with another reference this is another method
        policy = step(lab, problem, policy, policy, objective, multipliers, settings, name)
        policies[name] = policy
    *earlier, last = policies
    named = {f"step {name}": policies[name] for name in earlier} | {"sacpo": policies[last]}
    models = tuple(policies)
    if isinstance(multipliers, dict):
        return Outcome(named, "sacpo", multipliers=multipliers, models=models)
    predictions = {} if bank is None else {"sacpo": lab.predict(problem, bank, multipliers, label="sacpo")}
    stated = settings.multipliers
    return Outcome(
        named,
        "sacpo",
        multipliers={} if stated is None else dict(zip(problem.utilities, stated, strict=True)),
        duals={"sacpo": multipliers},
        predictions=predictions,
        diagnostics={"dual": None if bank is None else lab.peek(multipliers, "dual.json")},
        models=models,
    )


def step(
    lab: Lab, problem: Problem, start: Node, reference: Node, objective: str, multipliers: dict[str, float] | Node,
    settings: SacpoSettings, name: str,
) -> Node:  # fmt: skip
    """One step: the reward's at KL weight beta, a utility's at beta / lambda."""
    chosen, beta = settings.safety_step, problem.beta
    extra: dict[str, Node] = {}
    if objective == "reward":
        chosen = settings.reward_step
    elif isinstance(multipliers, dict):
        assert settings.beta_over_lambda is not None  # only there multipliers are numbers
        beta = settings.beta_over_lambda[problem.utilities.index(objective)]
    else:
        extra = {"multipliers": multipliers}
    return train(
        lab, start, reference, lab.pairs(), objective=objective, beta=beta, step=chosen, label=f"prefer {name}", **extra
    )


def _multipliers(lab: Lab, problem: Problem, settings: SacpoSettings) -> tuple[Bank | None, dict[str, float] | Node]:
    """Lambda as beta / lambda, as numbers, or from the dual (with the bank it was solved on)."""
    if settings.beta_over_lambda is not None:
        ratios = zip(problem.utilities, settings.beta_over_lambda, strict=True)
        return None, {utility: lambda_from_ratio(problem.beta, ratio) for utility, ratio in ratios}
    if settings.multipliers is not None:
        return None, lab.given(dict(zip(problem.utilities, settings.multipliers, strict=True)))
    bank = settings.dual.bank(lab, lab.reference(), "bank")
    return bank, lab.solve_dual(problem, bank, solver=settings.dual.solver)


@dataclass
class PSacpoSettings(SacpoSettings):
    """P-SACPO's settings; `beta_over_lambda` is the conservative one (paper: 0.01).

    Attributes:
        q: Weights of the conservative policy, each in [0, 1]; one training serves all.
        reported_q: The one that is the method's result; null: the smallest that meets the thresholds on
            validation prompts (ours).
        validation_samples: Responses per validation prompt that q is chosen with.
    """

    q: list[float] = MISSING
    reported_q: float | None = None
    validation_samples: int = 16

    def check(self, config: Config) -> None:
        """Refuse what SACPO refuses, a lambda that is not conservative by choice, and a q outside [0, 1]."""
        super().check(config)
        if self.order != "helpful_first":
            raise ConfigError(
                "P-SACPO merges the reward-aligned policy, which only helpful_first makes",
                where="method.order",
                mend="method.order=helpful_first",
            )
        if self.beta_over_lambda is None and self.multipliers is None:
            raise ConfigError(
                "P-SACPO's lambda is conservative on purpose, so it is no solution of the dual",
                where="method.beta_over_lambda",
                mend="a number per utility, smaller than SACPO's, for instance [0.1]",
            )
        if not self.q or not all(0 <= q <= 1 for q in self.q):
            raise ConfigError(
                f"q = {list(self.q)}", where="method.q", mend="numbers in [0, 1], e.g. method.q=[0.25,0.5,0.75]"
            )
        if self.reported_q is not None and self.reported_q not in self.q:
            raise ConfigError(
                f"reported_q = {self.reported_q} is not among q = {list(self.q)}",
                where="method.reported_q",
                mend="one of them, or null to choose on validation prompts",
            )
        if self.reported_q is None:
            check_scorer(self.dual.scorer, "method.dual.scorer", config)
            if config.dataset.world is not None and config.dataset.world.validation_prompts < 1:
                raise ConfigError(
                    "there is no validation prompt to choose q on",
                    where="dataset.world.validation_prompts",
                    mend="at least a few dozen, or method.reported_q=0.75",
                )


@method("p_sacpo", PSacpoSettings)
def p_sacpo(lab: Lab, problem: Problem, settings: PSacpoSettings) -> Outcome:
    """Section 6: linear merges of the reward-aligned and the conservative policy."""
    conservative = sacpo(lab, problem, settings)
    reward_aligned, safest = next(iter(conservative.policies.values())), conservative.policies["sacpo"]
    merged = {
        q: lab.merge([(reward_aligned, 1 - q), (safest, q)], label=f"merge q={q:g}") for q in sorted(set(settings.q))
    }
    slack: dict[str, dict[str, float]] = {}
    q = settings.reported_q
    if q is None:
        q, slack = choose_q(lab, problem, settings, merged)
    names = {"step reward": reward_aligned} | {f"p_sacpo q={q:g}": node for q, node in merged.items()}
    # For a log-linear family the merge is exactly lambda = q * conservative lambda; for a network it is a guide.
    multipliers = {u: q * value for u, value in conservative.multipliers.items()}
    return Outcome(
        names | {"conservative": safest},
        f"p_sacpo q={q:g}",
        multipliers=multipliers,
        diagnostics={"q": q, "q_chosen_on": "settings" if not slack else "validation", "validation_slack": slack},
        models=conservative.models,
    )


def choose_q(
    lab: Lab, problem: Problem, settings: PSacpoSettings, merged: dict[float, Node]
) -> tuple[float, dict[str, dict[str, float]]]:
    """The smallest q whose margins are met on validation prompts, or the largest if none is (ours).

    Returns:
        q, and the measured slack of every q. A plan, which measures nothing, takes the middle one.
    """

    def bank(policy: Node, name: str) -> Bank:
        responses, weights = lab.answers(
            policy,
            splits=("validation",),
            samples=settings.validation_samples,
            sampling=settings.dual.sampling,
            label=f"validation {name}",
        )
        scores = lab.score(responses, settings.dual.scorer, label=responses.label)
        return Bank(responses, scores, weights)

    reference = bank(lab.reference(), "sft")
    found: dict[str, dict[str, float]] = {}
    met: Sequence[float] = ()
    for q, policy in merged.items():
        node = lab.slack(problem, bank(policy, f"q={q:g}"), reference, label=f"q={q:g}")
        measured = lab.peek(node, "slack.json")
        if measured is not None:
            found[f"{q:g}"] = {utility: value["mean"] for utility, value in measured["slack"].items()}
            if min(found[f"{q:g}"].values()) >= 0:
                met = [*met, q]
    if not found:
        return list(merged)[len(merged) // 2], {}
    return (min(met) if met else max(merged)), found
