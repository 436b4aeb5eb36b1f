"""Everything that was measured of one run's policies, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignbench.report.sections import Cell, Section, Value
from alignbench.report.stats import Estimate

_CELLS = {"harm_category": "safe rate, harm", "severity": "safe rate, severity", "category": "safe rate, category"}


def measures(record: Mapping[str, Any]) -> Section:
    """Every metric in a row and every policy in a column, safe rates by harm category and severity below."""
    rows = record["rows"]
    lines: list[list[Cell]] = []
    for name in dict.fromkeys(metric for row in rows.values() for metric in row["metrics"]):
        lines.append([name, *(_cell(row["metrics"].get(name)) for row in rows.values())])
    for column, title in _CELLS.items():
        found = [row.get("safe_rates", {}).get(column, {}) for row in rows.values()]
        for label in sorted({label for rates in found for label in rates}):
            counts = next(rates[label] for rates in found if label in rates)
            head = f"{title} {label} ({counts['clusters']} prompts)"
            lines.append([head, *(_cell(rates.get(label)) for rates in found)])
    caption = (
        "[prompt-clustered intervals; none where a tail holds too few prompts; (!): one prompt makes half of the "
        "variance, the interval may be too short]; cost: a utility's negative, above 0 is unsafe; q: quantile, cvar: "
        "mean of the worst tenth or twentieth; unsafe_prompt_rate: prompts whose mean cost is above 0; kl_k3 and "
        "kl_low_variance: the same KL by other estimators (k3 has an interval near the reference only); refusals by "
        "phrases in the first words, over_refusal_rate on benign or safe prompts; distinct_n: distinct n-grams over "
        "all, by prompt"
    )
    return Section("measures", "All measures", ["measure", *rows], lines, caption)


def _cell(value: Mapping[str, Any] | None) -> Cell:
    if value is None or value.get("mean") is None:
        return "-"
    low, high = (math.nan if value.get(end) is None else float(value[end]) for end in ("low", "high"))
    return Value(
        Estimate(float(value["mean"]), low, high, value["n"], value["clusters"], value["level"], str(value["method"])),
        3,
    )
