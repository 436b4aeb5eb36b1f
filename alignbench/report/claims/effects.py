"""An effect with its interval and one-sided p-values, and what they mean for a claim.

The rules (`RULES` is what the page prints) are stated before any number is read. Each has a *smallest effect of
interest* s > 0 in the effect's own unit, and every effect is signed so that the claimed direction is positive:

    above       the claim says the effect is positive. It is refuted by an effect that is surely below s: another
                direction, or too little to matter.
    same        the claim says there is no difference: |effect| < s (equivalence; two one-sided tests).
    not_below   the claim says the effect is at least zero up to a tolerance: effect > -s (non-inferiority).

A claim of several parts is *all* of them (intersection-union test: the largest p counts, Berger 1982; to refute it one
part is enough, so the smallest p is multiplied by their number) or *some* of them (the other way round).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import brentq

from alignbench.errors import DataError
from alignbench.report.crossed import CROSSED, FEWEST_SEEDS, Crossed, cross, holm, safe_reach
from alignbench.report.stats import NO_INTERVAL, NO_SPREAD, Estimate, FloatArray

LEVEL = 0.95
#: Of each one-sided test: an interval of LEVEL that excludes a value.
ALPHA = (1 - LEVEL) / 2
SEEDS_ONLY = "Student t over seeds"
KINDS = ("above", "same", "not_below")
RULES = {
    "above": "supported if the effect is surely above 0; not supported if it is surely below s",
    "same": "supported if the effect is surely within (-s, s); not supported if it is surely outside",
    "not_below": "supported if the effect is surely above -s; not supported if it is surely below -s",
}
_SMALLEST_P = 1e-12


@dataclass(frozen=True)
class Effect:
    """A mean effect, signed so that the claimed direction is positive.

    Attributes:
        mean: The estimate.
        parts: (variance, degrees of freedom) of its error, the seeds' among them; empty with fewer than three seeds.
        seeds: Trained policies behind it.
        prompts: Prompts behind each; 0 where a seed gives one number (an exact sum, a count, an absolute error).
        crossed: The two-way mean behind it; None where a seed gives one number.
        counted: Whether it is a count, for which agreement of all seeds is no accident.
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    seeds: int
    prompts: int
    crossed: Crossed | None = None
    counted: bool = False

    @property
    def error(self) -> float:
        """Standard error; NaN where nothing is known about other seeds."""
        return math.sqrt(sum(variance for variance, _ in self.parts)) if self.parts else math.nan

    def interval(self) -> Estimate:
        """Two-sided, at LEVEL: what the p-values do not exclude.

        Of seeds and prompts it is a little longer than in other reports, whose intervals are no tests.
        With fewer than three seeds it is that of the prompts alone, and says so.
        """
        if self.crossed is not None and not self.parts:
            return self.crossed.interval(LEVEL)
        found = Estimate(self.mean, math.nan, math.nan, 0, self.prompts, LEVEL, NO_INTERVAL)
        if not self.parts:
            return replace(found, method=f"fewer than {FEWEST_SEEDS} seeds: no interval")
        if self.error == 0.0:
            return replace(found, low=self.mean, high=self.mean, method=NO_SPREAD)
        reach = safe_reach(self.parts, ALPHA)
        method = SEEDS_ONLY if self.crossed is None else CROSSED
        return replace(found, low=self.mean - reach, high=self.mean + reach, method=method)

    def p_above(self, value: float) -> float:
        """One-sided p of "the effect is at most `value`"; NaN where it cannot be told."""
        distance = self.mean - value
        if not self.parts:
            return math.nan
        if self.error == 0.0:
            if distance <= 0.0:
                return 1.0
            return 0.0 if self.counted else math.nan
        p = self._p(abs(distance))
        return p if distance > 0 else 1.0 - p

    def p_below(self, value: float) -> float:
        """One-sided p of "the effect is at least `value`"; NaN where it cannot be told."""
        mirrored = replace(self, mean=-self.mean)
        return mirrored.p_above(-value)

    def _p(self, distance: float) -> float:
        """The p in (0, 1/2] whose one-sided reach is `distance`."""
        if distance == 0.0:
            return 0.5
        if safe_reach(self.parts, _SMALLEST_P) < distance:
            return _SMALLEST_P
        return float(brentq(lambda p: safe_reach(self.parts, p) - distance, _SMALLEST_P, 0.5, xtol=1e-14))


def effect_of(values: FloatArray, *, counted: bool = False) -> Effect:
    """The mean of ``x[s, k]`` with the error of random seeds and prompts.

    Args:
        values: Shape (seeds, prompts), finite; (seeds, 1) where a seed gives one number, whose error is then that of
            Student's t over seeds.
        counted: Whether the numbers are counts.

    Raises:
        DataError: Values that are not finite, or none.
    """
    values = np.asarray(values, dtype=np.float64)
    crossed = cross(values)
    seeds, prompts = values.shape
    if prompts > 1:
        # fewer seeds know nothing of other seeds, so nothing is judged on them
        parts = crossed.parts if seeds >= FEWEST_SEEDS else ()
        return Effect(crossed.mean, parts, seeds, prompts, crossed, counted)
    column = values[:, 0]
    if seeds < FEWEST_SEEDS:
        return Effect(crossed.mean, (), seeds, 0, None, counted)
    # measured from the first: equal numbers then have no spread, without rounding
    variance = float((column - column[0]).var(ddof=1)) / seeds
    return Effect(crossed.mean, ((variance, seeds - 1.0),), seeds, 0, None, counted)


@dataclass(frozen=True)
class Evidence:
    """What an effect says about a part of a claim, or its parts about a claim.

    Attributes:
        supports: p of the data if the claim does not hold; NaN: cannot be told.
        refutes: p of the data if the claim holds; NaN: cannot be told.
        weakest: Index of the part on which support rests.
        worst: Index of the part that speaks most against it.
    """

    supports: float
    refutes: float
    weakest: int = 0
    worst: int = 0


def evidence_of(effect: Effect, kind: str, smallest: float) -> Evidence:
    """One effect under one rule.

    Args:
        effect: Signed so that the claimed direction is positive.
        kind: One of `KINDS`.
        smallest: s, the smallest effect of interest; positive.

    Raises:
        DataError: Another kind, or s that is not positive.
    """
    if kind not in KINDS or not smallest > 0:
        raise DataError(f"rule {kind!r}, s = {smallest}", where="evidence_of", mend=f"one of {', '.join(KINDS)}; s > 0")
    if kind == "above":
        return Evidence(effect.p_above(0.0), effect.p_below(smallest))
    if kind == "not_below":
        return Evidence(effect.p_above(-smallest), effect.p_below(-smallest))
    inside = max(effect.p_above(-smallest), effect.p_below(smallest))
    # both sides could refute: their smaller p counts twice
    outside = min(effect.p_above(smallest), effect.p_below(-smallest))
    return Evidence(inside, min(1.0, 2.0 * outside))


def all_of(parts: Sequence[Evidence]) -> Evidence:
    """Every part must hold; one that cannot be told leaves the whole untold."""
    supports, refutes = [t.supports for t in parts], [t.refutes for t in parts]
    if any(math.isnan(p) for p in (*supports, *refutes)):
        return Evidence(math.nan, math.nan)
    return Evidence(
        max(supports), min(1.0, len(parts) * min(refutes)), int(np.argmax(supports)), int(np.argmin(refutes))
    )  # fmt: skip


def some_of(parts: Sequence[Evidence]) -> Evidence:
    """One part is enough; one that cannot be told leaves the whole untold."""
    supports, refutes = [t.supports for t in parts], [t.refutes for t in parts]
    if any(math.isnan(p) for p in (*supports, *refutes)):
        return Evidence(math.nan, math.nan)
    return Evidence(
        min(1.0, len(parts) * min(supports)), max(refutes), int(np.argmin(supports)), int(np.argmax(refutes))
    )  # fmt: skip


def verdicts(family: Sequence[Evidence]) -> list[tuple[str, float, float]]:
    """Verdict of each claim of a family that is judged together, with its two p-values after Holm's correction.

    The chance that any claim of the family is wrongly called supported is at most ALPHA, and so is the chance that any
    is wrongly called not supported.

    Returns:
        (supported, not supported or undecided; p that it holds; p that it does not); NaN where it cannot be told.
    """
    supports, refutes = (holm([getattr(one, name) for one in family]) for name in ("supports", "refutes"))
    found = []
    for for_it, against in zip(supports, refutes, strict=True):
        # surely positive and surely too small to matter: it does not matter
        verdict = "not supported" if against <= ALPHA else "supported" if for_it <= ALPHA else "undecided"
        found.append((verdict, for_it, against))
    return found
