"""What a learned reward or cost is worth: accuracy, sign accuracy, calibration; and its reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from alignbench.data.schema import label_column
from alignbench.problem import cost_from_utility
from alignbench.report.plot import pyplot, save, style
from alignbench.report.stats import wilson
from alignbench.report.tails import rate_interval


def reliability(probability: np.ndarray, happened: np.ndarray, bins: int) -> dict[str, Any]:
    """How often what is given a probability happens.

    Args:
        probability: (n,) in [0, 1].
        happened: bool (n,).
        bins: Bins of equal width.

    Returns:
        ece, the expected calibration error: the mean over examples of |mean probability - frequency| of their bin;
        brier, the mean squared error; and the filled bins (low, high, n, predicted, observed).
    """
    probability, happened = np.asarray(probability, float), np.asarray(happened, float)
    which = np.minimum((probability * bins).astype(int), bins - 1)
    found = []
    for k in range(bins):
        own = which == k
        if own.any():
            edge = {"low": k / bins, "high": (k + 1) / bins, "n": int(own.sum())}
            found.append(edge | {"predicted": float(probability[own].mean()), "observed": float(happened[own].mean())})
    gaps = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in found)
    return {
        "ece": float(gaps / len(probability)),
        "brier": float(((probability - happened) ** 2).mean()),
        "bins": found,
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """P(score of a positive > score of a negative), ties half; None where one of the two is lacking."""
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    ranks = scipy_stats.rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def best_threshold(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The threshold with the largest sum of true positive and true negative rate, in the middle between two scores.

    A cost model's zero is where training put it, and the released ones call a third of safe answers unsafe there.
    """
    positive = np.asarray(positive, dtype=bool)
    if positive.all() or not positive.any():
        return None
    values = np.unique(scores)
    middles = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    safe, unsafe = np.sort(scores[~positive]), np.sort(scores[positive])
    true_negative = np.searchsorted(safe, middles, "right") / len(safe)
    true_positive = 1 - np.searchsorted(unsafe, middles, "right") / len(unsafe)
    return float(middles[np.argmax(true_negative + true_positive)])


def assess(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    utilities: np.ndarray,
    is_cost: bool,
    gold: np.ndarray | None,
    bins: int,
) -> dict[str, Any]:
    """One learned column against labelled pairs.

    Args:
        rows: The pairs.
        column: "reward" or a utility.
        utilities: (n, 2) the column's values for response 0 and 1; larger is better.
        is_cost: Whether it was trained as a cost model, whose sign says unsafe.
        gold: (n, 2) the world's own values, where there are any.
        bins: Of the reliability diagrams.

    Returns:
        pairs, accuracy (with an interval clustered by prompt), preference (the calibration of P(1 preferred)); of a
        cost sign_accuracy, auroc, threshold (cost at which it separates best), unsafe (calibration of P(unsafe)); with
        gold values gold_correlation, and gold_accuracy: the order of pairs without the labels' noise.
    """
    label = np.array([row[label_column(column)] for row in rows])
    prompts = np.array([str(row.get("prompt_id", row["prompt"])) for row in rows])
    difference = utilities[:, 1] - utilities[:, 0]
    found: dict[str, Any] = {
        "pairs": len(rows),
        "accuracy": rate_interval(_agrees(difference, label), prompts).to_dict(),
        "preference": reliability(_sigmoid(difference), label == 1, bins),
    }
    if is_cost:
        cost = np.asarray(cost_from_utility(utilities)).reshape(-1)
        unsafe = ~np.array([[row[f"is_response_{k}_safe"] for k in (0, 1)] for row in rows], dtype=bool).reshape(-1)
        right = np.where(cost == 0, 0.5, (cost > 0) == unsafe)
        found |= {
            "sign_accuracy": rate_interval(right, np.repeat(prompts, 2)).to_dict(),
            "auroc": auroc(cost, unsafe),
            "threshold": best_threshold(cost, unsafe),
            "unsafe": reliability(_sigmoid(cost), unsafe, bins),
        }
    if gold is not None:
        spread = utilities.std() > 0 and gold.std() > 0
        found |= {
            "gold_correlation": float(np.corrcoef(utilities.reshape(-1), gold.reshape(-1))[0, 1]) if spread else None,
            "gold_accuracy": float(_agrees(difference, (gold[:, 1] > gold[:, 0]).astype(int)).mean()),
        }
    return found


def _agrees(difference: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 where the sign of u_1 - u_0 is the label's, 1/2 at a tie."""
    return np.where(difference == 0, 0.5, (difference > 0) == (label == 1)).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def calibration_plot(record: Mapping[str, Any], path: Path) -> bool:
    """Reliability diagrams of a run's learned columns on held-out pairs: predicted against observed frequency.

    Args:
        record: A run's record.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether there was something to draw.
    """
    panels = []
    for scorer, columns in (record.get("scorers") or {}).items():
        for column, entry in columns.items():
            split = "validation" if "validation" in entry else "train"
            panels.append((f"{scorer}: {column}", split, entry[split]))
    if not panels:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.6), squeeze=False, layout="constrained")
    for axis, (title, split, entry) in zip(axes[0], panels, strict=True):
        draw_reliability(axis, curves_of(entry))
        facts = f"accuracy {entry['accuracy']['mean']:.3f}"
        if "sign_accuracy" in entry:
            facts += f", of signs {entry['sign_accuracy']['mean']:.3f}"
        axis.set_title(f"{title}, {entry['pairs']} {split} pairs\n{facts}", fontsize=10)
    save(figure, path)
    return True


def curves_of(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a learned column (as `assess` gives it) says about pairs, and of a cost about single responses."""
    curves = {"P(response 1 preferred)": entry["preference"]}
    return curves | ({"P(unsafe)": entry["unsafe"]} if "unsafe" in entry else {})


def draw_reliability(axis: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    """Observed frequency over predicted probability of each curve, with Wilson's 95 % interval of every bin.

    Args:
        axis: Matplotlib axes.
        curves: Name -> what `reliability` gives.
    """
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, zorder=0)
    for index, (name, curve) in enumerate(curves.items(), 1):
        marker, colour = style(index)
        bins = curve["bins"]
        axis.plot(
            [b["predicted"] for b in bins], [b["observed"] for b in bins], marker=marker, color=colour,
            markersize=5, clip_on=False, label=f"{name}: ECE {curve['ece']:.3f}",
        )  # fmt: skip
        for b in bins:
            sure = wilson(min(b["n"], b["observed"] * b["n"]), b["n"])
            axis.plot([b["predicted"]] * 2, [sure.low, sure.high], color=colour, linewidth=1, alpha=0.7)
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="observed frequency")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")


def pooled(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several reliabilities over the same bins as one: every example counts the same."""
    cells: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for curve in curves:
        for cell in curve["bins"]:
            cells.setdefault((cell["low"], cell["high"]), []).append(cell)
    bins = []
    for (low, high), found in sorted(cells.items()):
        n = sum(cell["n"] for cell in found)
        means = {key: sum(cell["n"] * cell[key] for cell in found) / n for key in ("predicted", "observed")}
        bins.append({"low": low, "high": high, "n": n, **means})
    counts = [sum(cell["n"] for cell in curve["bins"]) for curve in curves]
    total = sum(counts)
    return {
        "ece": sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / total,
        "brier": sum(n * curve["brier"] for n, curve in zip(counts, curves, strict=True)) / total,
        "bins": bins,
    }
