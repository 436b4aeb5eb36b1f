"""The dual seen from around its minimiser: its course along each multiplier, and what fewer responses would have given.

Numbers for pictures and notebooks; the solver itself is `alignbench.dual`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignbench.dual import Bank, Solution, UnreachableMargin, evaluate, predict, solve

POINTS = 49
DRAWS = 16
_LEAST = 4
_CENTRAL = (0.05, 0.95)


def course(bank: Bank, solution: Solution, *, points: int = POINTS) -> dict[str, dict[str, list[float]]]:
    """The dual along each multiplier, the others at the minimiser.

    Args:
        bank: The scored responses that were solved on.
        solution: Their minimiser.
        points: Grid points, equally apart from 0 to well beyond the minimiser; one more stands on it.

    Returns:
        By utility: `multiplier`, `value` D (CAN, arXiv 2405.19544, Lemma 2; reward units), `slack` dD/dlambda =
        predicted - requested margin (utility units), `reward`, `kl` (nats), `ess_mean` and `ess_low` (mean, 5%-quantile
        over prompts of the effective sample size), each as long as the grid.
    """
    found = {}
    for j, name in enumerate(bank.names):
        at = float(solution.multipliers[j])
        # without a multiplier to stand around: as far as tilts the responses by two standard deviations
        far = max(2.2 * at, 2.0 * solution.beta / float(bank._scale[j]))
        grid = np.union1d(np.linspace(0.0, far, points), [at])
        columns: dict[str, list[float]] = {"multiplier": [float(value) for value in grid]}
        for value in grid:
            multipliers = np.array(solution.multipliers, float)
            multipliers[j] = value
            point = evaluate(bank, solution.beta, solution.margins, multipliers)
            seen = predict(bank, solution.beta, multipliers)
            row = {"value": point.value, "slack": float(point.gradient[j]), "reward": seen.reward, "kl": seen.kl}
            for key, number in (row | {"ess_mean": seen.ess_mean, "ess_low": seen.ess_low}).items():
                columns.setdefault(key, []).append(float(number))
        found[name] = columns
    return found


def sample_effect(
    bank: Bank, solution: Solution, *, seed: int, draws: int = DRAWS, responses: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """The minimiser on random subsets of each prompt's responses: the plug-in dual's bias, and its spread.

    Of sampled responses subsets are drawn without replacement, of listed answers samples with their probabilities. The
    inner expectation stands within a logarithm, so a bank of few responses overstates what weights can reach.

    Args:
        bank: The whole bank.
        solution: Its minimiser.
        seed: Of the draws.
        draws: Subsets of each size.
        responses: Sizes; halves of the smallest prompt's responses down to 4 by default (of listed answers 4 to 256).

    Returns:
        By size, ascending: `responses`, `draws`, `unreachable` (draws in which the margin is out of reach), and by
        utility `multipliers`: mean, low, high (central 90 % of the draws), None where every draw is out of reach.
    """
    rng = np.random.default_rng(seed)
    sizes = list(responses) if responses is not None else _sizes(bank)
    found = []
    for size in sizes:
        solved = []
        for _ in range(draws):
            try:
                solved.append(solve(_some(bank, size, rng), solution.beta, solution.margins).multipliers)
            except UnreachableMargin:
                continue
        found.append(
            {
                "responses": size,
                "draws": draws,
                "unreachable": draws - len(solved),
                "multipliers": {
                    name: _spread([float(values[j]) for values in solved]) for j, name in enumerate(bank.names)
                },
            }
        )
    return found


def _sizes(bank: Bank) -> list[int]:
    if not (bank.sampled and bank.uniform):
        return [4, 16, 64, 256]
    size, sizes = int(bank.responses.min()) // 2, []
    while size >= _LEAST:
        sizes.append(size)
        size //= 2
    return sizes[::-1]


def _some(bank: Bank, size: int, rng: np.random.Generator) -> Bank:
    """A bank of `size` of each prompt's responses; all of those that a prompt has, where it has fewer."""
    if bank.sampled and bank.uniform:
        keys = np.where(bank.log_weights > -np.inf, rng.random(bank.reward.shape), np.inf)
        chosen = np.argsort(keys, axis=1)[:, :size]
        kept = np.take_along_axis(bank.log_weights, chosen, 1) > -np.inf
    else:
        ends = np.cumsum(np.exp(bank.log_weights), axis=1)
        draws = rng.random((len(ends), size, 1)) * ends[:, -1:, None]
        chosen = np.minimum((draws >= ends[:, None, :]).sum(-1), ends.shape[1] - 1)
        kept = np.ones(chosen.shape, bool)
    weights = np.where(kept, 0.0, -np.inf) - np.log(kept.sum(1, keepdims=True))
    utilities = np.take_along_axis(bank.utilities, chosen[..., None], 1)
    return Bank(bank.prompts, bank.names, np.take_along_axis(bank.reward, chosen, 1), utilities, weights)


def _spread(values: Sequence[float]) -> Mapping[str, float] | None:
    if not values:
        return None
    low, high = np.quantile(values, _CENTRAL)
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}
