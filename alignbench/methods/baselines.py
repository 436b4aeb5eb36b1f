"""Baselines: the reference itself, and DPO on one objective alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignbench.errors import ConfigError
from alignbench.methods.recipe import Outcome, method
from alignbench.methods.steps import StepSettings, train
from alignbench.problem import Problem

if TYPE_CHECKING:
    from alignbench.config import Config
    from alignbench.lab import Lab


@dataclass
class SftSettings:
    """The reference has nothing to set."""

    name: str = MISSING


@method("sft", SftSettings)
def sft(lab: Lab, problem: Problem, settings: SftSettings) -> Outcome:
    """pi_ref: what every margin is measured against."""
    return Outcome({"sft": lab.reference()}, "sft")


@dataclass
class SingleSettings:
    """One preference stage on the labels of one objective.

    Attributes:
        name: The method's name.
        beta: KL weight of the stage; null takes the problem's.
        step: Loss and optimiser.
    """

    name: str = MISSING
    beta: float | None = None
    step: StepSettings = field(default_factory=StepSettings)

    def check(self, config: Config) -> None:
        """Refuse a step that cannot train."""
        self.step.check("method.step", config)
        if self.beta is not None and self.beta <= 0:
            raise ConfigError(f"beta = {self.beta}", where="method.beta", mend="a positive number, or null")


@method("dpo_helpful", SingleSettings)
def dpo_helpful(lab: Lab, problem: Problem, settings: SingleSettings) -> Outcome:
    """Helpfulness labels only: the unconstrained end of every trade-off."""
    return _single(lab, problem, settings, "dpo_helpful", "reward")


@method("dpo_safe", SingleSettings)
def dpo_safe(lab: Lab, problem: Problem, settings: SingleSettings) -> Outcome:
    """Labels of the first constrained utility only: the other end."""
    return _single(lab, problem, settings, "dpo_safe", problem.utilities[0])


def _single(lab: Lab, problem: Problem, settings: SingleSettings, name: str, objective: str) -> Outcome:
    reference = lab.reference()
    policy = train(
        lab,
        reference,
        reference,
        lab.pairs(),
        objective=objective,
        beta=problem.beta if settings.beta is None else settings.beta,
        step=settings.step,
        label=f"prefer {objective}",
    )
    return Outcome({name: policy}, name, models=(objective,))
