"""Claims measured on a folder's runs: effects, verdicts, and what could not be measured."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alignbench.errors import DataError
from alignbench.report.claims.declared import CLAIMS, RUNS, SCALE, Claim, Part
from alignbench.report.claims.effects import ALPHA, Effect, Evidence, all_of, effect_of, evidence_of, some_of, verdicts
from alignbench.report.claims.selection import Picked, Point, Setting, UnusableError, asked_of, pick, reader, settings
from alignbench.report.crossed import FEWEST_SEEDS
from alignbench.report.runs import Record, Runs, Table
from alignbench.report.stats import FloatArray

SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_RUN = "supported", "not supported", "undecided", "not run"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, UNDECIDED, NOT_RUN)
_MISSING = "declared and not there"


@dataclass(frozen=True)
class Measured:
    """One part of a claim at one point, or over all.

    Attributes:
        part: What was measured.
        where: The point in words; empty over all.
        effect: Its effect.
        evidence: What the effect says by itself.
    """

    part: Part
    where: str
    effect: Effect
    evidence: Evidence


@dataclass(frozen=True)
class Result:
    """A claim in one setting.

    Attributes:
        claim: The claim.
        setting: Where it was measured; empty if it was not.
        verdict: One of `VERDICTS`.
        reason: Why, in one line.
        measured: Every part.
        shown: Index of the part that decided (of an undecided one: on which support would rest).
        seeds: Seeds behind it.
        points: Thresholds or grid behind it, in words.
        supports: p after correction, that the claim holds (small: supported); NaN where it could not be told.
        refutes: The same for not supported.
        notes: Points and seeds left out.
        evidence: Before correction; None where nothing was measured.
    """

    claim: Claim
    setting: str
    verdict: str
    reason: str
    measured: tuple[Measured, ...] = ()
    shown: int = 0
    seeds: tuple[int, ...] = ()
    points: tuple[str, ...] = ()
    supports: float = float("nan")
    refutes: float = float("nan")
    notes: list[str] = field(default_factory=list)
    evidence: Evidence | None = None

    @property
    def key(self) -> Measured | None:
        """The part that decided."""
        return self.measured[self.shown] if self.measured else None


def results_of(runs: Runs, claims: Sequence[Claim] = CLAIMS) -> tuple[list[Result], list[Setting]]:
    """Every claim, in every setting that has its runs; and the settings.

    Claims of one paper are judged together (Holm's correction).
    """
    known, tables = settings(runs), reader(runs)
    found: list[Result] = []
    for claim in claims:
        found += _in_settings(claim, known, tables)
    judged: dict[int, Result] = {}
    for paper in dict.fromkeys(claim.paper for claim in claims):
        family = [i for i, result in enumerate(found) if result.claim.paper == paper and result.evidence is not None]
        evidence = [result.evidence for i in family if (result := found[i]).evidence is not None]
        for i, one in zip(family, verdicts(evidence), strict=True):
            judged[i] = _judged(found[i], *one)
    return [judged.get(i, result) for i, result in enumerate(found)], known


def _in_settings(claim: Claim, known: Sequence[Setting], tables: Callable[[Record], Table]) -> list[Result]:
    found, missing = [], []
    for setting in known:
        if setting.constraints != claim.constraints:
            continue
        picked = pick(claim.roles, setting, tables)
        if isinstance(picked, Picked):
            found.append(_measured(claim, picked))
        elif any(role.plays(record) for role in claim.roles.values() for record in setting.records):
            missing.append(f"{setting.name}: {picked}")
    if found:
        return found
    return [Result(claim, "", NOT_RUN, "; ".join(missing) or f"no run of: {', '.join(claim.roles)}")]


def _measured(claim: Claim, picked: Picked) -> Result:
    points = tuple(asked_of(point) for point in picked.points if point)
    notes = [*picked.notes, *undeclared(claim, picked)]
    blank = Result(claim, picked.setting.name, UNDECIDED, "", seeds=picked.seeds, points=points, notes=notes)
    try:
        measured, evidence = measure(claim, picked)
    except UnusableError as fault:
        return replace(blank, reason=str(fault))
    found = replace(blank, measured=tuple(measured))
    small = _too_small(picked.setting)
    return replace(found, reason=small, shown=evidence.weakest) if small else replace(found, evidence=evidence)


def _too_small(setting: Setting) -> str:
    """Why no claim is judged on a setting's runs, or nothing."""
    config = setting.records[0]["config"]
    there = (config["dataset"].get("world") or {}).get("train_prompts", 0)
    declared = SCALE.get(config["dataset"]["name"], 0)
    return f"{there} training prompts where {declared} are declared: too small to mean anything" * (there < declared)


def undeclared(claim: Claim, picked: Picked) -> list[str]:
    """How the seeds and points at hand differ from those of the claim's commands, which were chosen beforehand."""
    lines = [dict(part.split("=", 1) for part in shlex.split(RUNS[name])) for name in claim.runs]
    keys = {role.varies or "constraint.thresholds" for role in picked.roles.values() if not role.anywhere}
    found = []
    seeds = set.intersection(*({int(seed) for seed in line["seed"].split(",")} for line in lines))
    for what, declared, there in (
        ("seeds", {(seed,) for seed in seeds}, {(seed,) for seed in picked.seeds}),
        # a line that names no thresholds leaves the default ones, which are not declared here
        *(("points", _points(lines, key), set(picked.points)) for key in sorted(keys) if _points(lines, key)),
    ):
        for text, some in (("beyond those declared", there - declared), (_MISSING, declared - there)):
            if some:
                found.append(f"{what} {text}: {', '.join(map(asked_of, sorted(some)))}")
    return found


def _points(lines: Sequence[Mapping[str, str]], key: str) -> set[Point]:
    """The values of a swept list in the command lines."""
    return {tuple(json.loads(one)) for line in lines if key in line for one in re.findall(r"\[[^]]*\]", line[key])}


def measure(claim: Claim, picked: Picked) -> tuple[list[Measured], Evidence]:
    """A claim's parts, and what they say together.

    Raises:
        UnusableError: A number is not there or none, or a slope has no two points.
    """
    values = [[part.measure(picked.at(point)) for point in picked.points] for part in claim.parts]
    if claim.over in ("mean", "slope"):
        weights = _weights(claim, picked)
        measured = [
            _part(part, "", np.tensordot(weights, np.array(of_part), axes=1))
            for part, of_part in zip(claim.parts, values, strict=True)
        ]
        return measured, all_of([m.evidence for m in measured])
    if claim.over not in ("every", "some"):
        raise DataError(f"over = {claim.over!r}", where=claim.id, mend="mean, slope, every or some")
    by_point = [
        [_part(part, _where(point), values[i][k]) for i, part in enumerate(claim.parts)]
        for k, point in enumerate(picked.points)
    ]
    flat = [m for at_point in by_point for m in at_point]
    if claim.over == "every":
        return flat, all_of([m.evidence for m in flat])
    together = [all_of([m.evidence for m in at_point]) for at_point in by_point]
    whole = some_of(together)
    size = len(claim.parts)
    best, least = whole.weakest, whole.worst
    return flat, replace(
        whole, weakest=best * size + together[best].weakest, worst=least * size + together[least].worst
    )  # fmt: skip


def _where(point: Point) -> str:
    return asked_of(point) if point else ""


def _part(part: Part, where: str, values: FloatArray) -> Measured:
    effect = effect_of(values, counted=part.counted)
    return Measured(part, where, effect, evidence_of(effect, part.kind, part.smallest))


def _weights(claim: Claim, picked: Picked) -> FloatArray:
    """Equal ones, or those of the least-squares slope in the points' abscissa."""
    count = len(picked.points)
    if claim.over == "mean":
        return np.full(count, 1.0 / count)
    assert claim.along is not None
    x = np.array([float(claim.along(picked.at(point)).mean()) for point in picked.points])
    centred = x - x.mean()
    total = float(centred @ centred)
    if count < 2 or total < 1e-12:
        raise UnusableError("a slope needs two points or more")
    return np.asarray(centred / total)


def _judged(result: Result, verdict: str, supports: float, refutes: float) -> Result:
    """The verdict with its reason."""
    evidence = result.evidence
    assert evidence is not None
    shown = evidence.worst if verdict == NOT_SUPPORTED else evidence.weakest
    found = replace(result, verdict=verdict, shown=shown, supports=supports, refutes=refutes)
    few = len(result.seeds) < FEWEST_SEEDS
    if few:
        reason = f"{len(result.seeds)} seed{'s say' if len(result.seeds) > 1 else ' says'} nothing about others"
        reason += f", {FEWEST_SEEDS} or more do"
    elif np.isnan(supports):
        reason = "all prompts and seeds alike: no spread is no confidence"
    elif verdict == UNDECIDED:
        reason = _undecided(result, evidence)
    else:
        reason = _because(found)
    # what failed is seldom missing by chance
    part = any(_MISSING in note for note in result.notes)
    return replace(found, reason=f"{reason} (not on all that was declared)" if part else reason)


def _undecided(result: Result, evidence: Evidence) -> str:
    if min(evidence.supports, evidence.refutes) <= ALPHA:
        return "decided by itself, but not after the correction for all claims of this paper"
    # where one point is enough to hold, one that does not says nothing
    if result.claim.over != "some" and min(each.evidence.refutes for each in result.measured) <= ALPHA:
        return "a part speaks against it by itself, but not after the correction for the number of its parts"
    return "within its error"


def _because(result: Result) -> str:
    measured = result.key
    assert measured is not None
    kind, s, mean = measured.part.kind, measured.part.smallest, measured.effect.mean
    where = f" at {measured.where}" if measured.where else ""
    if result.verdict == SUPPORTED:
        return {
            "above": "surely positive", "same": f"surely within {s:g}", "not_below": f"surely above -{s:g}",
        }[kind] + ("" if len(result.measured) == 1 else f", also its weakest part{where}" if result.claim.over != "some"
                   else f"{where}")  # fmt: skip
    texts = {
        "above": "surely negative" if measured.effect.p_below(0.0) <= ALPHA else f"surely below {s:g}",
        "same": f"surely {'above' if mean > 0 else 'below -'}{' ' if mean > 0 else ''}{s:g}",
        "not_below": f"surely below -{s:g}",
    }
    return texts[kind] + where
