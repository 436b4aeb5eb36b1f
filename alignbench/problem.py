"""The constrained problem, its thresholds and its signs.

Canonical *margin form* (CAN, arXiv 2405.19544, problem CA; CAID, arXiv 2505.19387)::

    maximise   E_{x, y~pi}[r] - beta KL(pi || pi_ref)
    subject to E_pi[g_j] - E_ref[g_j] >= b_j ,   j = 1..m          (larger g_j = better)

Every other module speaks utilities ``g`` (larger is better) and margins ``b``. Costs (larger is worse) enter
and leave through ``utility_from_cost`` and ``cost_from_utility`` here, and no other module flips a sign.

====================  ============================  ===================================================
form                  the user's threshold ``t_j``  the constraint, and its margin ``b_j``
====================  ============================  ===================================================
``margin``            improvement on the reference  ``E_pi g_j - E_ref g_j >= t_j``: ``b_j = t_j``
``absolute_utility``  least mean utility            ``E_pi g_j >= t_j``: ``b_j = t_j - E_ref g_j``
``absolute_cost``     largest mean cost             ``E_pi c_j <= t_j``: ``b_j = E_ref c_j - t_j``
                                                    ``= -E_ref g_j - t_j``, with ``c_j = -g_j``
====================  ============================  ===================================================

SACPO states the second form (arXiv 2404.11049, eq. 9), Safe RLHF and PD-DPO the third.

Means named ``reference_mean`` and ``policy_mean`` are always means of *utilities*, under every form: the
global mean over prompts and responses, by utility name. Other names in the mapping (the reward, say) are
ignored. Under ``absolute_cost`` the cost of utility j is ``c_j = -g_j`` by definition, also where the utility
was never born as a cost (politeness, brevity): a threshold of -2 on it then reads "mean utility at least 2".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from alignbench.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "Form",
    "Problem",
    "cost_from_utility",
    "lambda_from_ratio",
    "ratio_from_lambda",
    "utility_from_cost",
    "violation",
]

Scores = TypeVar("Scores", float, "np.ndarray", "torch.Tensor")


class Form(StrEnum):
    """How the user's thresholds are to be read; see the table of this module."""

    margin = "margin"
    absolute_utility = "absolute_utility"
    absolute_cost = "absolute_cost"


@dataclass(frozen=True)
class Problem:
    """A constrained alignment problem: KL weight, utilities and one threshold per utility.

    Lists and plain strings (as a configuration file gives them) are converted on construction.

    Attributes:
        beta: Weight of the KL term, > 0, in reward units per nat.
        form: How ``thresholds`` are to be read.
        utilities: Names of the constrained utilities ``g_j``, distinct, at least one.
        thresholds: One finite number per utility, in that utility's units (of its cost, under
            ``absolute_cost``).

    Raises:
        ConfigError: On construction, naming the key at fault.
    """

    beta: float
    form: Form
    utilities: tuple[str, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta, where="problem.beta")
        # frozen: the normalised values can only be written this way
        object.__setattr__(self, "form", _form(self.form))
        object.__setattr__(self, "utilities", _names(self.utilities))
        object.__setattr__(self, "thresholds", _thresholds(self.thresholds, self.utilities))

    def margins(self, reference_mean: Mapping[str, float]) -> dict[str, float]:
        """The requested margin ``b_j`` of each utility, whatever the form.

        Source: CAN (arXiv 2405.19544, sec. 2), ``bbar_j = b_j + E_ref g_j``; PD-DPO and Safe RLHF with ``c =
            -g``.

        Args:
            reference_mean: ``E_ref g_j`` by utility name; needed by the absolute forms, unused by ``margin``
                (may be empty).

        Raises:
            DataError: An absolute form lacks a reference mean, or it is not finite.
        """
        if self.form is Form.margin:
            return self._by_name(self.thresholds)
        reference = self._means(reference_mean, "reference_mean")
        if self.form is Form.absolute_utility:
            floors = self._by_name(self.thresholds)
        else:
            floors = {name: utility_from_cost(limit) for name, limit in self._by_name(self.thresholds).items()}
        return {name: floors[name] - reference[name] for name in self.utilities}

    def requested_absolute(self, reference_mean: Mapping[str, float]) -> dict[str, float]:
        """The least mean utility asked of the policy, ``E_ref g_j + b_j``, in utility units under every form.

        Args:
            reference_mean: ``E_ref g_j`` by utility name.

        Raises:
            DataError: A reference mean is missing or not finite.
        """
        if self.form is Form.absolute_utility:
            return self._by_name(self.thresholds)
        if self.form is Form.absolute_cost:
            return {name: utility_from_cost(limit) for name, limit in self._by_name(self.thresholds).items()}
        reference = self._means(reference_mean, "reference_mean")
        return {name: reference[name] + margin for name, margin in self._by_name(self.thresholds).items()}

    def achieved_margin(
        self, policy_mean: Mapping[str, float], reference_mean: Mapping[str, float]
    ) -> dict[str, float]:
        """The improvement ``E_pi g_j - E_ref g_j`` of each utility.

        Args:
            policy_mean: ``E_pi g_j`` by utility name.
            reference_mean: ``E_ref g_j`` by utility name.

        Raises:
            DataError: A mean is missing or not finite.
        """
        policy = self._means(policy_mean, "policy_mean")
        reference = self._means(reference_mean, "reference_mean")
        return {name: policy[name] - reference[name] for name in self.utilities}

    def violations(self, policy_mean: Mapping[str, float], reference_mean: Mapping[str, float]) -> dict[str, float]:
        """How far each utility falls short of its margin, ``max(0, b_j - achieved_j)``; 0 means satisfied.

        Args:
            policy_mean: ``E_pi g_j`` by utility name.
            reference_mean: ``E_ref g_j`` by utility name.

        Raises:
            DataError: A mean is missing or not finite.
        """
        achieved = self.achieved_margin(policy_mean, reference_mean)
        margins = self.margins(reference_mean)
        return {name: violation(achieved[name], margins[name]) for name in self.utilities}

    def _by_name(self, values: tuple[float, ...]) -> dict[str, float]:
        return dict(zip(self.utilities, values, strict=True))

    def _means(self, means: Mapping[str, float], argument: str) -> dict[str, float]:
        missing = [name for name in self.utilities if name not in means]
        if missing:
            raise DataError(
                f"no mean for utility {', '.join(missing)}",
                where=f"{argument}, which has: {', '.join(sorted(means)) or 'nothing'}",
                mend="score the responses with every utility of the problem",
            )
        chosen = {name: float(means[name]) for name in self.utilities}
        for name, value in chosen.items():
            if not math.isfinite(value):
                raise DataError(f"the mean of utility {name} is {value}", where=argument, mend="check the scores")
        return chosen


def violation(achieved: float, margin: float) -> float:
    """``max(0, margin - achieved)``, in utility units.

    A NaN stays NaN: Python's ``max(0.0, nan)`` is 0, which would report an unmeasured constraint as
    satisfied.
    """
    gap = margin - achieved
    return gap if math.isnan(gap) else max(0.0, gap)


def lambda_from_ratio(beta: float, beta_over_lambda: float) -> float:
    """The multiplier that a second-stage KL weight ``beta / lambda`` stands for.

    Source: SACPO (arXiv 2404.11049, Theorem 1 and Algorithm 1), which tabulates ``beta / lambda`` and never
        lambda.

    Args:
        beta: KL weight of the reward stage, > 0, reward units per nat.
        beta_over_lambda: KL weight of the utility stage, > 0, utility units per nat.

    Returns:
        lambda > 0, in reward units per utility unit.

    Raises:
        ConfigError: An argument is not a finite number > 0.
    """
    _require_positive("beta", beta, where="lambda_from_ratio")
    _require_positive("beta_over_lambda", beta_over_lambda, where="lambda_from_ratio")
    return beta / beta_over_lambda


def ratio_from_lambda(beta: float, multiplier: float) -> float:
    """The second-stage KL weight ``beta / lambda``; the inverse of ``lambda_from_ratio``.

    Args:
        beta: KL weight of the reward stage, > 0.
        multiplier: lambda > 0. At lambda = 0 there is no second stage, and the caller must leave it out.

    Returns:
        ``beta / lambda`` > 0, in utility units per nat.

    Raises:
        ConfigError: An argument is not a finite number > 0.
    """
    _require_positive("beta", beta, where="ratio_from_lambda")
    _require_positive("lambda", multiplier, where="ratio_from_lambda; at lambda = 0 there is no utility stage to train")
    return beta / multiplier


def utility_from_cost(cost: Scores) -> Scores:
    """The utility ``g = -c`` of a cost; the one place where a sign is flipped.

    Args:
        cost: A number, numpy array or tensor of any shape; larger is worse.

    Returns:
        The same type and shape; larger is better.
    """
    # subtracting from zero gives 0.0 for a cost of 0.0 where negation gives -0.0, which would show in tables
    # and hashes
    return 0.0 - cost


def cost_from_utility(utility: Scores) -> Scores:
    """The cost ``c = -g`` of a utility; the inverse of ``utility_from_cost``.

    Args:
        utility: A number, numpy array or tensor of any shape; larger is better.

    Returns:
        The same type and shape; larger is worse.
    """
    return 0.0 - utility


def _form(form: str) -> Form:
    try:
        return Form(form)
    except ValueError:
        known = ", ".join(member.value for member in Form)
        raise ConfigError(f"unknown form {form!r}", where="problem.form", mend=f"use one of: {known}") from None


def _names(utilities: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(utilities, str):
        # tuple("safety") would be six utilities of one letter
        raise ConfigError(
            f"utilities is the single string {utilities!r}",
            where="problem.utilities",
            mend=f"write [{utilities}]",
        )
    names = tuple(utilities)
    if not names:
        raise ConfigError("no utility is named", where="problem.utilities", mend="name at least one, such as [safety]")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"utility {', '.join(repeated)} appears twice",
            where="problem.utilities",
            mend="name each utility once",
        )
    return names


def _thresholds(thresholds: tuple[float, ...], utilities: tuple[str, ...]) -> tuple[float, ...]:
    if isinstance(thresholds, (int, float)):
        raise ConfigError(
            f"thresholds is the single number {thresholds}",
            where="problem.thresholds",
            mend=f"write [{thresholds}]",
        )
    values = tuple(float(value) for value in thresholds)
    if len(values) != len(utilities):
        raise ConfigError(
            f"{len(values)} thresholds for {len(utilities)} utilities ({', '.join(utilities)})",
            where="problem.thresholds",
            mend="give one threshold per utility, in the same order",
        )
    for name, value in zip(utilities, values, strict=True):
        if not math.isfinite(value):
            raise ConfigError(
                f"the threshold of {name} is {value}",
                where="problem.thresholds",
                mend="give a finite number; to drop the constraint, drop the utility",
            )
    return values


def _require_positive(name: str, value: float, *, where: str) -> None:
    if not (math.isfinite(value) and value > 0.0):
        raise ConfigError(f"{name} is {value}", where=where, mend=f"{name} must be a finite number > 0")
