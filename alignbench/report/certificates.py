"""The exact certificates of `dataset=enumerable`, over methods, thresholds and seeds; and CAID's claim.

    python -m alignbench.report certificates FOLDER [--split train|test] [--out NAME]

reads every record below FOLDER, prints the table (means over seeds), and writes NAME.md (every seed as well), NAME.png
and NAME.pdf; NAME is FOLDER/certificates unless it is given. A record without certificates is passed over.

What stands in the table, of each run's reported policy, exact on the prompts of the split:

    gain share              gain in E r - beta KL over the reference, as a share of the constrained optimum's gain
    constraint gap          distance of the margin from what the problem asks, as a share of the range between the
                            unconstrained and the most constrained policy; several utilities: the largest one
    Lagrangian gap          beta KL(pi || pi*) = D(lambda*) - L(pi, lambda*): neither a broken nor an over-satisfied
                            margin flatters it
    optimality, primal-dual gaps, |lambda - lambda*|, R-OPT, U-OPT: the quantities that the papers bound
    mass                    probability that the policy gives to the listed answers before it is renormalised

The claim (CAID, arXiv 2505.19387): the multi-shot policy's constraint error |margin - requested| is below that of its
own one-shot start. Every run of MoCAID or PeCAID gives one pair of errors (of equal ones where the first iterate is
the reported one); a seed's differences are averaged over the thresholds that all seeds have, and the interval is over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignbench.errors import DataError
from alignbench.report.plot import arms, named, pyplot, save, style
from alignbench.report.table import cell
from alignbench.report.thresholds import Record, Value, asked, distinct, markdown, over_seeds, series_of, thresholds_of

SPLITS = ("train", "test")
# the goals that the picture draws
GAIN_GOAL, GAP_GOAL = 0.9, 0.1
# the claim's methods, and the row of their one-shot start (the first round of PD-DPO is no such start)
MULTI_SHOT = ("mocaid", "pecaid")
ONE_SHOT = "iterate 1"
# fewer seeds give no interval that a verdict could rest on
_SEEDS_FOR_A_VERDICT = 3

# The names in a certificate, as `alignbench.certificate` writes them; no other line of this module knows them.
# (key, heading, whether the number is a share and printed as a percentage)
MEASURES = (
    ("gain_share", "gain share", True),
    ("constraint_gap_share", "constraint gap", True),
    ("optimality_gap", "optimality gap", False),
    ("primal_dual_gap", "primal-dual gap", False),
    ("lagrangian_gap", "Lagrangian gap", False),
    ("lambda_error", "|lambda - lambda*|", False),
    ("reward_optimality", "R-OPT", False),
    ("utility_optimality", "U-OPT", False),
    ("mass", "mass", True),
)
_GAIN, _GAP, _MARGINS = "gain_share", "constraint_gap_share", "margins"
# magnitudes: errors of opposite signs must not cancel in a mean over seeds
_MAGNITUDES = ("constraint_gap_share", "lambda_error")
_MASS = "mass"
_NOT_NEGATIVE = (*_MAGNITUDES, _MASS)


@dataclass(frozen=True)
class Line:
    """The measures of one run's reported policy, or their means over seeds.

    Attributes:
        series: Method, and the settings that tell it from others.
        thresholds: The user's thresholds.
        requested: Requested margin by utility.
        seeds: The seeds behind it.
        values: Each of `MEASURES` that is known, as mean and interval.
    """

    series: str
    thresholds: tuple[float, ...]
    requested: Mapping[str, float]
    seeds: tuple[int, ...]
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Claim:
    """CAID's claim for one series.

    Attributes:
        series: Method, and the settings that tell it from others.
        seeds: The seeds compared.
        thresholds: The thresholds that every seed has.
        left_out: Thresholds that only some seeds have.
        one_shot: Constraint error of the first iterate, mean over seeds.
        multi_shot: Constraint error of the reported policy.
        difference: multi_shot - one_shot, paired; negative supports the claim.
        verdict: One line.
    """

    series: str
    seeds: tuple[int, ...]
    thresholds: tuple[tuple[float, ...], ...]
    left_out: int
    one_shot: Value
    multi_shot: Value
    difference: Value
    verdict: str


def certificate_of(row: Mapping[str, Any], split: str) -> Mapping[str, Any] | None:
    """A row's certificate on a split; None where there is none."""
    return (row.get("certificate") or {}).get(split)


# ---------------------------------------------------------------- the table


def lines_of(records: Sequence[Record], split: str) -> list[Line]:
    """One line per run with a certificate, sorted by series, thresholds and seed."""
    records = distinct(records)
    lines = []
    for record, series in zip(records, series_of(records), strict=True):
        row = record["rows"][record["outcome"]["reported"]]
        certificate = certificate_of(row, split)
        if certificate is None:
            continue
        known = {key: _number(key, certificate.get(key)) for key, _, _ in MEASURES}
        lines.append(
            Line(
                series=series,
                thresholds=thresholds_of(record),
                requested=requested_of(record, row),
                seeds=(record["seed"],),
                values={k: {"mean": v, "low": None, "high": None} for k, v in known.items() if v is not None},
            )
        )
    return sorted(lines, key=lambda line: (line.series, line.thresholds, line.seeds))


def requested_of(record: Record, row: Mapping[str, Any]) -> dict[str, float]:
    """Requested margin of each utility; the thresholds themselves where a row measures no constraint."""
    constraint = record["config"]["constraint"]
    given = dict(zip(constraint["utilities"], map(float, constraint["thresholds"]), strict=True))
    measured = row.get("constraints") or {}
    return {u: measured[u]["requested_margin"] if u in measured else value for u, value in given.items()}


def groups_of(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines that differ in the seed only."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.series, line.thresholds), []).append(line)
    return list(groups.values())


def mean_of(group: Sequence[Line]) -> Line:
    """The mean of one group over its seeds; a measure that some seed lacks has none."""
    if len(group) == 1:
        return group[0]
    first = group[0]
    keys = [key for key in first.values if all(key in line.values for line in group)]
    return Line(
        series=first.series,
        thresholds=first.thresholds,
        requested={u: over_seeds([line.requested[u] for line in group])["mean"] for u in first.requested},
        seeds=tuple(seed for line in group for seed in line.seeds),
        values={
            key: over_seeds(
                [line.values[key]["mean"] for line in group],
                least=0.0 if key in _NOT_NEGATIVE else -math.inf,
                most=1.0 if key == _MASS else math.inf,
            )
            for key in keys
        },
    )


def cells_of(lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; the last column says which of the two goals the line reaches."""
    seeds = len({line.seeds for line in lines}) > 1 or any(len(line.seeds) > 1 for line in lines)
    headings = ["method", "requested", *(["seed"] if seeds else []), *(heading for _, heading, _ in MEASURES), "goals"]
    cells = []
    for line in lines:
        row = [line.series, _asked(line)]
        if seeds:
            row.append(str(line.seeds[0]) if len(line.seeds) == 1 else f"mean of {len(line.seeds)}")
        row += [_share(line.values.get(key)) if share else cell(line.values.get(key), 3) for key, _, share in MEASURES]
        cells.append([*row, goals_of(line)])
    return headings, cells


def goals_of(line: Line) -> str:
    """Which of the goals a line's point estimates reach: both, gain, gap, neither; "-" where one is not known."""
    gain, gap = line.values.get(_GAIN), line.values.get(_GAP)
    if gain is None or gap is None:
        return "-"
    reached = (gain["mean"] >= GAIN_GOAL, gap["mean"] <= GAP_GOAL)
    return {(True, True): "both", (True, False): "gain", (False, True): "gap", (False, False): "neither"}[reached]


def caption_of(lines: Sequence[Line], split: str) -> str:
    """What the numbers are."""
    kinds = sorted({str(value["method"]) for line in lines if len(line.seeds) > 1 for value in line.values.values()})
    spread = f"[{' or '.join(kinds)}] over seeds" if kinds else "one seed each: no interval"
    return (
        f"exact sums over the listed answers of the {split} prompts; {spread}; constraint gap and multiplier error of "
        f"several utilities: the largest; goals: gain share >= {GAIN_GOAL:.0%}, constraint gap <= {GAP_GOAL:.0%}, "
        "by the line's mean"
    )


def _number(key: str, value: Any) -> float | None:
    """A measure as one number: of a mapping by utility the largest in size."""
    if isinstance(value, Mapping):
        known = [float(v) for v in value.values() if v is not None and not math.isnan(v)]
        value = max(known, key=abs) if known else None
    if value is None or math.isnan(value):
        return None
    return abs(float(value)) if key in _MAGNITUDES else float(value)


def _asked(line: Line) -> str:
    if len(line.requested) == 1:
        return asked(next(iter(line.requested.values())))
    return ", ".join(f"{u} {asked(value)}" for u, value in line.requested.items())


def _share(value: Value | None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value['mean']:z.1f}%"
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{100 * value['low']:z.1f}, {100 * value['high']:z.1f}]"


# ---------------------------------------------------------------- the claim


def claims_of(records: Sequence[Record], split: str) -> list[Claim]:
    """CAID's claim for every series whose records hold the first iterate beside the reported policy."""
    records = distinct(records)
    errors: dict[str, dict[int, dict[tuple[float, ...], tuple[float, float]]]] = {}
    for record, series in zip(records, series_of(records), strict=True):
        pair = _errors(record, split)
        if pair is not None:
            errors.setdefault(series, {}).setdefault(record["seed"], {})[thresholds_of(record)] = pair
    return [_claim(series, by_seed) for series, by_seed in sorted(errors.items())]


def _errors(record: Record, split: str) -> tuple[float, float] | None:
    """Constraint error of the one-shot start and of the reported policy, mean over utilities."""
    start = _one_shot(record)
    if start is None:
        return None
    reported = record["rows"][record["outcome"]["reported"]]
    # what is asked is one number per run: both errors are measured from it
    requested = requested_of(record, reported)
    found = []
    for row in (start, reported):
        certificate = certificate_of(row, split)
        if certificate is None:
            return None
        margins = certificate[_MARGINS]
        found.append(sum(abs(margins[u] - b) for u, b in requested.items()) / len(requested))
    return found[0], found[1]


def _one_shot(record: Record) -> Mapping[str, Any] | None:
    """The row of the first iterate.

    Where the first iterate is the reported one it has the method's name and no row of its own; leaving such runs out
    would leave out exactly those in which further shots did not help.
    """
    if record["method"] not in MULTI_SHOT:
        return None
    rows, outcome = record["rows"], record["outcome"]
    if ONE_SHOT in rows:
        return rows[ONE_SHOT]
    if (outcome.get("diagnostics") or {}).get("reported_iteration") == 1:
        return rows[outcome["reported"]]
    first = [entry.get("policy") for entry in outcome.get("trajectory") or [] if entry["iteration"] == 1]
    return rows.get(first[0]) if first else None


def _claim(series: str, by_seed: Mapping[int, Mapping[tuple[float, ...], tuple[float, float]]]) -> Claim:
    every = {t for pairs in by_seed.values() for t in pairs}
    common = sorted(t for t in every if all(t in pairs for pairs in by_seed.values()))
    # without a common grid the seeds' means would be over different thresholds: then nothing is compared
    chosen = common or sorted(every)
    per_seed = []
    for pairs in by_seed.values():
        kept = [pairs[t] for t in chosen if t in pairs]
        per_seed.append(tuple(sum(side) / len(kept) for side in zip(*kept, strict=True)))
    difference = over_seeds([multi - one for one, multi in per_seed])
    return Claim(
        series=series,
        seeds=tuple(sorted(by_seed)),
        thresholds=tuple(common),
        left_out=len(every) - len(common),
        one_shot=over_seeds([one for one, _ in per_seed]),
        multi_shot=over_seeds([multi for _, multi in per_seed]),
        difference=difference,
        verdict=_verdict(difference, len(by_seed), bool(common)),
    )


def _verdict(difference: Value, seeds: int, common: bool) -> str:
    if not common:
        return "undecided: no threshold was run with every seed"
    if seeds < _SEEDS_FOR_A_VERDICT:
        return f"undecided: {seeds} seed(s) give no interval to decide on, {_SEEDS_FOR_A_VERDICT} or more do"
    if difference["high"] < 0.0:
        return "supported: the multi-shot error is the smaller one, and the interval excludes zero"
    if difference["low"] > 0.0:
        return "not supported: the multi-shot error is the larger one, and the interval excludes zero"
    return "undecided: the interval contains zero"


def claim_text(claim: Claim) -> str:
    """The claim in two lines of text."""
    left_out = f" ({claim.left_out} that not every seed has left out)" if claim.left_out else ""
    return (
        f"{claim.series}: constraint error |margin - requested|, {len(claim.thresholds)} threshold(s){left_out}, "
        f"{len(claim.seeds)} seed(s): one-shot {cell(claim.one_shot, 4)}, multi-shot {cell(claim.multi_shot, 4)}, "
        f"difference {cell(claim.difference, 4)} [{claim.difference['method']}]\n"
        f"  verdict: {claim.verdict}"
    )


# ---------------------------------------------------------------- what is written


def picture(lines: Sequence[Line], path: Path, title: str) -> None:
    """Gain share and constraint gap against the requested margin, a series per method, both goals drawn.

    Args:
        lines: Lines of single seeds; they are averaged here.
        path: Base name; a .png and a .pdf are written.
        title: Above both panels.
    """
    means = [mean_of(group) for group in groups_of(lines)]
    series = sorted({line.series for line in means})
    # of several utilities the axis can show one: the first
    utility = next(iter(means[0].requested))
    width = max(m.requested[utility] for m in means) - min(m.requested[utility] for m in means)
    figure, panels = pyplot().subplots(1, 2, figsize=(11.6, 4.6), layout="constrained")
    for axes, key, goal, better in ((panels[0], _GAIN, GAIN_GOAL, "at least"), (panels[1], _GAP, GAP_GOAL, "at most")):
        axes.axhline(
            100 * goal, color="0.6", linestyle="--", linewidth=1, zorder=0, label="goal" if key == _GAIN else None
        )
        for index, name in enumerate(series):
            marker, colour = style(index)
            aside = 0.012 * width * (index - (len(series) - 1) / 2)
            own = [m for m in means if m.series == name and key in m.values]
            own.sort(key=lambda m: m.requested[utility])
            xs = [m.requested[utility] + aside for m in own]
            values = [_percent(m.values[key]) for m in own]
            axes.plot(xs, [v["mean"] for v in values], color=colour, linewidth=1, alpha=0.6)
            for i, (x, value) in enumerate(zip(xs, values, strict=True)):
                axes.errorbar(
                    x, value["mean"], yerr=arms(value), fmt=marker, color=colour, markersize=6, capsize=2, elinewidth=1,
                    label=name if i == 0 and key == _GAIN else None,
                )  # fmt: skip
        heading = next(text for measure, text, _ in MEASURES if measure == key)
        axes.set_xlabel(f"requested margin of {utility}")
        axes.set_ylabel(f"{heading}, percent (goal: {better} {100 * goal:.0f})")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _percent(value: Value) -> dict[str, Any]:
    return {k: None if value.get(k) is None else 100 * value[k] for k in ("mean", "low", "high")}


def terminal_table(lines: Sequence[Line], split: str) -> Table:
    """The table for a terminal: several seeds as their mean."""
    means = [mean_of(group) for group in groups_of(lines)]
    headings, cells = cells_of(means)
    table = Table(title=f"certificates, {split} prompts", caption=escape(caption_of(means, split)))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    for i, row in enumerate(cells):
        table.add_row(*map(escape, row), end_section=i + 1 == len(means) or means[i + 1].series != means[i].series)
    return table


def markdown_report(lines: Sequence[Line], claims: Sequence[Claim], split: str) -> str:
    """Every seed and the means, then the claim."""
    every: list[Line] = []
    for group in groups_of(lines):
        every += [*group, mean_of(group)] if len(group) > 1 else group
    text = markdown(*cells_of(every)) + f"\n\n{caption_of(every, split)}\n"
    if claims:
        text += "\n## The multi-shot claim (CAID): less constraint error than the one-shot start\n\n"
        text += "\n".join(f"- {claim_text(claim)}" for claim in claims) + "\n"
    return text


def report(records: Sequence[Record], split: str, base: Path, console: Console) -> None:
    """Print table and claim, and write .md, .png and .pdf.

    Args:
        records: Records; those without certificates are passed over.
        split: Whose prompts.
        base: Base name of the files.
        console: Where to print.

    Raises:
        DataError: no record has a certificate on this split.
    """
    lines, claims = lines_of(records, split), claims_of(records, split)
    if not lines:
        raise DataError(
            f"none of {len(records)} record(s) has a certificate on the {split} prompts",
            where="rows.*.certificate",
            mend="run on the enumerable world, whose optimum is known: python main.py dataset=enumerable ...",
        )
    base.parent.mkdir(parents=True, exist_ok=True)
    console.print(terminal_table(lines, split))
    for claim in claims:
        console.print(claim_text(claim), highlight=False, soft_wrap=True, markup=False)
    named(base, ".md").write_text(markdown_report(lines, claims, split), encoding="utf-8")
    names = ", ".join(dict.fromkeys(str(record["config"]["dataset"]["name"]) for record in records))
    picture(lines, base, f"{names}: distance from the exact optimum, {split} prompts")


# (heading, path in a certificate) of one run's own table
_RUN_COLUMNS = (
    ("gain share", ("gain_share",)),
    ("constraint gap", ("constraint_gap",)),
    ("optimality gap", ("optimality_gap",)),
    ("primal-dual gap", ("primal_dual_gap",)),
    ("Lagrangian gap", ("lagrangian_gap",)),
    ("|lambda - lambda*|", ("lambda_error",)),
    ("R-OPT", ("reward_optimality",)),
    ("its bound, Thm 4 / 3", ("bounds", "one_shot_reward"), ("bounds", "multi_shot_reward")),
    ("U-OPT", ("utility_optimality",)),
    ("its bound, Thm 4 / 3", ("bounds", "one_shot_utility"), ("bounds", "multi_shot_utility")),
    ("M", ("bounds", "largest_score")),
    ("L_D", ("bounds", "smoothness")),
    ("mu_D", ("bounds", "strong_convexity")),
    ("nu_1", ("bounds", "nu_l1")),
    ("nu_KL", ("bounds", "nu_kl")),
    ("mass", ("mass", "mean")),
)


def run_cells(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one run's certificates: every policy on every split, bounds' parts beside the gaps."""
    cells = []
    for name, row in record["rows"].items():
        for split, found in row.get("certificate", {}).items():
            line = [f"{name} *" if name == record["outcome"]["reported"] else name, split]
            line += [" / ".join(_plain(found, path) for path in paths) for _, *paths in _RUN_COLUMNS]
            cells.append(line)
    return ["policy", "prompts", *(heading for heading, *_ in _RUN_COLUMNS)], cells


def _plain(certificate: Mapping[str, Any], path: Sequence[str]) -> str:
    value: Any = certificate
    for key in path:
        value = None if value is None else value.get(key)
    if isinstance(value, Mapping):
        value = max((abs(v) for v in value.values() if v is not None), default=None)
    return "-" if value is None else f"{value:z.3g}"


RUN_CAPTION = (
    "exact sums over the listed answers; several utilities: the largest; the bounds are CAID's with this policy's own "
    "nu, a lower bound on the class's, so they are indicative; - where a quantity does not exist"
)


def run_table(record: Record) -> Table:
    """One run's certificates for a terminal."""
    headings, cells = run_cells(record)
    table = Table(title="against the exact optimum", caption=RUN_CAPTION)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for line in cells:
        table.add_row(*line)
    return table
