"""MoCAID and PeCAID: iterative dualization (Zhang et al., arXiv 2505.19387).

Algorithm 1. From the one-shot multiplier, repeat: train the policy at r + <lambda, g> with the weights of the iterate
before and pi_ref as the fixed reference; sample the new policy; measure its slack; step the multiplier against it,
projected on lambda >= 0. MoCAID (Algorithm 2) scores with models, PeCAID (Algorithm 3) with pre-aligned policies.

The paper states no step size. Ours is 1 / (largest eigenvalue of the dual's Hessian at the one-shot lambda*): the slack
moves by Hessian * (change of lambda) near lambda*, so it is the longest step that overshoots in no direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignbench.errors import ConfigError
from alignbench.lab import Bank
from alignbench.methods.can import MocanSettings, PecanSettings, prealign, released_scale, with_aligned
from alignbench.methods.iterates import REPORTED, Iterate, report_iterates
from alignbench.methods.recipe import Outcome, method
from alignbench.methods.steps import relabel_and_train
from alignbench.problem import Problem

if TYPE_CHECKING:
    from alignbench.config import Config
    from alignbench.lab import Lab, Node


@dataclass
class _Iterative:
    """What both add to the one-shot settings; `multipliers` is then the start, null warm-starts at the dual's.

    Attributes:
        iterations: T, policies trained.
        dual_step: Step size in (reward unit / utility unit^2); null takes it from the curvature.
        dual_step_scale: Factor on the curvature's step.
        on_policy_samples: Responses per prompt of each new policy.
        reported: "last" (paper, implied), "best_feasible" or "average".
        measure_last: Whether the last iterate's slack is measured, too: no step follows, but the dual's course ends
            with it, and "best_feasible" compares it.
        evaluate_iterates: Whether every iterate gets a row, or only the first and the reported one.
    """

    iterations: int = 4
    dual_step: float | None = None
    dual_step_scale: float = 1.0
    on_policy_samples: int = 8
    reported: str = "last"
    measure_last: bool = True
    evaluate_iterates: bool = False

    def check_iterations(self) -> None:
        """Refuse what cannot iterate."""
        if self.iterations < 1 or self.on_policy_samples < 1 or self.dual_step_scale <= 0:
            raise ConfigError(
                f"iterations {self.iterations}, on_policy_samples {self.on_policy_samples}, "
                f"dual_step_scale {self.dual_step_scale}",
                where="method.iterations",
                mend="at least one of each, and a positive scale",
            )
        if self.dual_step is not None and self.dual_step <= 0:
            raise ConfigError(f"dual_step = {self.dual_step}", where="method.dual_step", mend="positive, or null")
        if self.reported not in REPORTED:
            raise ConfigError(
                f"reported = {self.reported!r}", where="method.reported", mend=f"one of: {', '.join(REPORTED)}"
            )
        if self.reported == "best_feasible" and not self.measure_last:
            raise ConfigError(
                "the best iterate cannot be told while the last one's slack is not measured",
                where="method.measure_last",
                mend="method.measure_last=true, or method.reported=last",
            )


@dataclass
class MocaidSettings(_Iterative, MocanSettings):
    """MoCAID's settings: MoCAN's and the iteration's."""

    def check(self, config: Config) -> None:
        """Refuse what MoCAN refuses, and what cannot iterate."""
        MocanSettings.check(self, config)
        self.check_iterations()


@dataclass
class PecaidSettings(_Iterative, PecanSettings):
    """PeCAID's settings: PeCAN's and the iteration's."""

    def check(self, config: Config) -> None:
        """Refuse what PeCAN refuses, and what cannot iterate."""
        PecanSettings.check(self, config)
        self.check_iterations()


@method("mocaid", MocaidSettings)
def mocaid(lab: Lab, problem: Problem, settings: MocaidSettings) -> Outcome:
    """Algorithm 2: models score the responses."""
    bank = settings.dual.bank(lab, lab.reference(), "bank")  # lines 3, 4
    scores = lab.pair_scores(lab.pairs(), settings.dual.scorer)

    def measured(policy: Node, name: str) -> Bank:
        return settings.dual.bank(lab, policy, f"on-policy {name}", samples=settings.on_policy_samples)

    return _iterate(lab, problem, settings, "mocaid", bank, scores, measured)


@method("pecaid", PecaidSettings)
def pecaid(lab: Lab, problem: Problem, settings: PecaidSettings) -> Outcome:
    """Algorithm 3: pre-aligned policies score the responses."""
    implied = prealign(lab, problem, settings)  # line 3
    bank = implied.bank(settings.dual.answers(lab, lab.reference(), "bank"))  # lines 4, 5

    def measured(policy: Node, name: str) -> Bank:
        answers = settings.dual.answers(lab, policy, f"on-policy {name}", samples=settings.on_policy_samples)
        return implied.bank(answers)

    scores = implied.scores(lab.pairs(), "pairs")
    outcome = _iterate(
        lab, problem, settings, "pecaid", bank, scores, measured, scale=released_scale(problem, settings)
    )
    return with_aligned(outcome, implied)


def _iterate(
    lab: Lab,
    problem: Problem,
    settings: MocaidSettings | PecaidSettings,
    name: str,
    bank: Bank,
    scores: Node,
    measured: Callable[[Node, str], Bank],
    **options: Any,
) -> Outcome:
    """Algorithm 1, from the one-shot multiplier."""
    policy, one_shot = lab.reference(), None
    if settings.multipliers is None or settings.dual_step is None:
        one_shot = lab.solve_dual(problem, bank, solver=settings.dual.solver)
    if settings.multipliers is not None:
        multipliers = lab.given(dict(zip(problem.utilities, settings.multipliers, strict=True)))
    else:
        assert one_shot is not None  # solved above
        multipliers = one_shot
    iterates: list[Iterate] = []
    for t in range(1, settings.iterations + 1):
        policy = relabel_and_train(  # (7): from the last iterate's weights, against pi_ref
            lab, problem, policy, scores, multipliers, settings.step, f"{name} {t}", round=t - 1, **options
        )
        last, slack = t == settings.iterations, None
        if settings.measure_last or not last:
            slack = lab.slack(problem, measured(policy, f"{name} {t}"), bank, label=f"{name} {t}")  # (5)
        iterates.append(Iterate(policy, multipliers, slack))
        if slack is not None and not last:
            multipliers = lab.step(  # (6)
                multipliers,
                slack,
                step=settings.dual_step,
                scale=settings.dual_step_scale,
                curvature=one_shot,
                label=f"dual step {name} {t}",
            )
    averaged = mean = None
    if settings.reported == "average":
        mean = lab.average([one.multipliers for one in iterates], label="average multiplier")
        averaged = relabel_and_train(
            lab, problem, policy, scores, mean, settings.step, f"{name} average", round=settings.iterations, **options
        )
    outcome = report_iterates(lab, name, iterates, settings.reported, averaged, mean, every=settings.evaluate_iterates)
    outcome.predictions = {
        row: lab.predict(problem, bank, node, label=f"{name} {row}") for row, node in outcome.duals.items()
    }
    outcome.models = (name,)
    outcome.diagnostics["dual"] = None if one_shot is None else lab.peek(one_shot, "dual.json")
    return outcome
