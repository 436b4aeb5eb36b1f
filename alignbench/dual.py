"""The dual of the constrained alignment problem on scored reference responses: value, solver, reach, intervals.

Margin form (``alignbench.problem``): ``max E_pi[r] - beta KL(pi || ref)`` subject to ``E_pi g_j - E_ref g_j >= b_j``.
The Lagrangian's maximiser ``pi_lambda ~ ref exp((r + <lambda, g>) / beta)`` leaves the convex dual (CAN, arXiv
2405.19544, Lemma 2 and Theorem 1)::

    D(lambda) = beta E_x[ ln E_{y~ref} exp((r + <lambda, g>) / beta) ] - <lambda, E_ref g + b>
    gradient  = E_{pi_lambda} g - E_ref g - b          Hessian = E_x[ Cov_{pi_lambda}(g) ] / beta

A ``Bank`` stands for the reference: sampled responses (eq. 12; biased for few of them, lambda* too large) or listed
answers with their probabilities (exact). Implicit scores, beta times a log-ratio, make it the preference-based dual of
Algorithms 2 and 3, times beta and up to a constant. lambda is in reward units per utility unit, KL in nats.
Scores are centred per prompt, which cancels ``g + f(x)``; the solver works on ``x_j = lambda_j s_j / beta`` with
``s_j`` the within-prompt standard deviation of ``g_j``, so that scores may have any scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.special import gammaln, logsumexp

from alignbench.errors import ConfigError, DataError

Values = Mapping[str, float] | Sequence[float] | np.ndarray | float
SLACK = 1e-11  # margins closer than this to the edge of reach, in standard deviations, count as on the edge
NULL = 1e-10  # a direction with a smaller share of the largest eigenvalue carries no information
FAR = 50.0  # lambda s / beta at which an unreachable margin's effective sample size is quoted


class Record:
    """Base of the result classes."""

    def to_dict(self) -> dict[str, Any]:
        """Every field by name in plain JSON types: arrays as lists, numbers that are not finite as None."""
        text = json.dumps(asdict(self), default=lambda array: array.tolist())  # type: ignore[call-overload]
        return json.loads(text, parse_constant=lambda _: None)


@dataclass(frozen=True, eq=False)
class Bank:
    """Scored responses that stand for the reference policy: K prompts, at most I responses each, m utilities.

    ``reward`` (K, I) and ``utilities`` (K, I, m; larger is better) are ignored where padded; ``log_weights`` (K, I) is
    the log of the base measure, normalised per prompt, -inf where padded; ``sampled`` says that the responses are draws
    from the reference, of which more could be had. Raises DataError for shapes that disagree, scores that are not
    finite, weights that are not normalised, or a single response in every prompt.
    """

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    reward: np.ndarray
    utilities: np.ndarray
    log_weights: np.ndarray
    sampled: bool = True

    def __post_init__(self) -> None:
        reward, utilities, weights = (np.array(a, float) for a in (self.reward, self.utilities, self.log_weights))
        if weights.ndim != 2 or len(weights) != len(self.prompts) or reward.shape != weights.shape:
            raise DataError(
                f"reward {reward.shape}, log_weights {weights.shape}", where="Bank", mend="give (K, I) both"
            )
        if utilities.shape != (*weights.shape, len(self.names)) or not utilities.size:
            raise DataError(f"utilities {utilities.shape}", where="Bank", mend="give (K, I, m), m >= 1 of them named")
        listed = weights > -np.inf
        if np.isnan(weights).any() or np.abs(logsumexp(weights, axis=1)).max() > 1e-6:
            raise DataError("log_weights are not normalised per prompt", where="Bank", mend="use Bank.from_rows")
        if not (np.isfinite(reward[listed]).all() and np.isfinite(utilities[listed]).all()):
            raise DataError("a score is NaN or infinite", where="Bank", mend="score every response, or drop it")
        if listed.sum(1).max() < 2:
            what = "every prompt has a single response, so there is nothing to reweight"
            raise DataError(what, where=f"{len(listed)} prompts", mend="score several responses per prompt")
        for name, value in (("reward", reward), ("utilities", utilities), ("log_weights", weights)):
            if name != "log_weights":
                value[~listed] = 0.0  # a NaN there would survive a weight of zero
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    @classmethod
    def from_rows(
        cls,
        prompt_ids: Sequence[str],
        reward: np.ndarray,
        utilities: Mapping[str, np.ndarray],
        log_weights: np.ndarray | None = None,
    ) -> Bank:
        """A bank of n flat rows, grouped by prompt in order of appearance; prompts may differ in length.

        Args:
            prompt_ids: (n,) prompt of each row.
            reward: (n,) reward units.
            utilities: (n,) by utility name.
            log_weights: (n,) log of an unnormalised base measure (``ln pi_ref`` of listed answers); None for samples.

        Raises:
            DataError: No row, no utility, lengths that differ, scores that are not finite (with the first rows), a
                prompt without weight, or a single response in every prompt.
        """
        where, ids = "Bank.from_rows", list(prompt_ids)
        if not ids or not utilities:
            raise DataError(f"the bank has no {'utility' if ids else 'row'}", where=where, mend="give at least one")
        weights = np.zeros(len(ids)) if log_weights is None else log_weights
        columns = {"reward": reward, **utilities, "log_weights": weights}
        for name, values in columns.items():
            column = np.asarray(values, float)
            if column.shape != (len(ids),):
                what = f"{name} has shape {column.shape} for {len(ids)} prompt ids"
                raise DataError(what, where=where, mend="give one number per row")
            # an answer of probability zero (-inf) is legal, and simply takes no part
            wrong = np.flatnonzero(~np.isfinite(column) & ((name != "log_weights") | (column != -np.inf)))
            if len(wrong):
                where = ", ".join(f"row {i} ({ids[i]}: {column[i]})" for i in wrong[:3])
                what = f"{name} is NaN or infinite in {len(wrong)} of {len(ids)} rows"
                raise DataError(what, where=where, mend="score every response, or drop it")
        order = {prompt: k for k, prompt in enumerate(dict.fromkeys(ids))}
        row = np.array([order[prompt] for prompt in ids])
        counts = np.bincount(row)
        position = np.empty(len(row), int)  # of each row within its prompt
        position[np.argsort(row, kind="stable")] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        grid = np.full((len(order), counts.max(), len(columns)), -np.inf)
        grid[row, position] = np.stack(list(columns.values()), axis=1)
        total = logsumexp(grid[..., -1], axis=1, keepdims=True)
        if not np.isfinite(total).all():
            what = f"all answers of prompt {list(order)[int(total.argmin())]} have probability zero"
            raise DataError(what, where=where, mend="list an answer that the reference can give")
        return cls(
            tuple(order), tuple(utilities), grid[..., 0], grid[..., 1:-1], grid[..., -1] - total, log_weights is None
        )

    @property
    def reference_means(self) -> dict[str, float]:
        """``E_ref`` of each utility and of ``"reward"``: the mean over prompts of per-prompt weighted means."""
        return dict(zip((*self.names, "reward"), map(float, self._means.mean(1)), strict=True))

    @cached_property
    def responses(self) -> np.ndarray:
        """(K,) responses of positive weight per prompt."""
        return self._listed.sum(1)

    @cached_property
    def uniform(self) -> bool:
        """Whether the responses of each prompt weigh the same."""
        return bool(np.abs((self.log_weights + np.log(self.responses)[:, None])[self._listed]).max() < 1e-9)

    @cached_property
    def gain(self) -> np.ndarray:
        """(m, K, I) utilities less their reference means at the same prompt; 0 where padded."""
        gain = np.ascontiguousarray(np.moveaxis(self.utilities, -1, 0)) - self._means[:-1, :, None]
        return np.where(self._listed, gain, 0.0)

    @cached_property
    def _listed(self) -> np.ndarray:
        return self.log_weights > -np.inf

    @cached_property
    def _means(self) -> np.ndarray:  # (m + 1, K), utilities then reward
        return (np.stack([*np.moveaxis(self.utilities, -1, 0), self.reward]) * np.exp(self.log_weights)).sum(-1)

    @cached_property
    def _reward(self) -> np.ndarray:
        return np.where(self._listed, self.reward - self._means[-1][:, None], 0.0)

    @cached_property
    def _scale(self) -> np.ndarray:  # (m,) s_j; the size of g_j where it only depends on x
        scale, size = (
            np.sqrt((np.exp(self.log_weights) * self.gain**2).sum(-1).mean(1)),
            np.abs(self.utilities).max((0, 1)),
        )
        return np.where(scale > 1e-12 * size, scale, np.where(size > 0.0, size, 1.0))

    @cached_property
    def _covariance(self) -> np.ndarray:  # (m, m) E_x Cov_ref(g), in units of s
        flat = (self.gain / self._scale[:, None, None]).reshape(len(self.names), -1)
        return (flat * np.exp(self.log_weights).ravel()) @ flat.T / len(self.prompts)

    @cached_property
    def _corners(self) -> list[np.ndarray]:  # scaled margins (K, m) of the best-response policies found so far
        return [self._corner(v) for v in (*np.eye(len(self.names)), np.ones(len(self.names)))]

    def _corner(self, direction: np.ndarray) -> np.ndarray:
        score = np.where(self._listed, np.tensordot(direction / self._scale, self.gain, 1), -np.inf)
        return (self.gain[:, np.arange(len(score)), score.argmax(1)] / self._scale[:, None]).T


@dataclass(frozen=True)
class DualPoint(Record):
    """The dual at one multiplier: value (reward units), gradient (m,), Hessian (m, m)."""

    value: float
    gradient: np.ndarray
    hessian: np.ndarray


@dataclass(frozen=True)
class Prediction(Record):
    """What ``pi_lambda`` attains on the bank: means over prompts, by utility name where they are mappings.

    ``margins`` is ``E_pi g - E_ref g``, the map from lambda to b. ``kl`` is in sequence nats, ``objective`` is reward
    less ``beta kl``. Each ess is ``(sum w)^2 / sum w^2`` of the tilted weights w per prompt (mean, median, 5%):
    for samples the effective sample size, for listed answers (I_eff) how many share the probability. ``kl_ceiling`` is
    mean ``ln I``, which no reweighting of equal weights exceeds; None where weights differ.
    """

    reward: float
    utilities: dict[str, float]
    margins: dict[str, float]
    kl: float
    objective: float
    ess_mean: float
    ess_median: float
    ess_low: float
    largest_weight: float
    kl_ceiling: float | None


@dataclass(frozen=True)
class Reach(Record):
    """What reweightings of the bank can attain.

    ``slack`` is the largest ``min_j (margin_j - b_j) / s_j``, positive when ``reachable``; ``largest_alone`` the most
    of each margin with no regard to the others; ``common_scale`` the largest t for which ``t b`` is attained
    together (inf if no b is positive). ``direction`` weighs the utilities (sum 1) in the tight combination ``<v, g>``;
    when unreachable it is the proof, the best reweighting of ``<v, g>`` does not exceed ``<v, b>``.
    ``responses_needed`` per prompt let it exceed that: exact (mean over subsets) up to the bank's own number, beyond it
    an EXTRAPOLATION by growth in ``sqrt(2 ln n)``; None for listed answers or without growth to extrapolate.
    """

    reachable: bool
    slack: float
    largest_alone: dict[str, float]
    common_scale: float
    direction: dict[str, float]
    responses_needed: int | None


class UnreachableMargin(DataError):  # noqa: N818
    """No reweighting of the bank attains the margins, so the dual has no minimiser: ``reach`` says what can be had."""

    def __init__(self, bank: Bank, beta: float, margins: np.ndarray, reach: Reach) -> None:
        self.reach, self.margins = reach, dict(zip(bank.names, map(float, margins), strict=True))
        scaled = np.array(list(reach.direction.values())) * bank._scale
        spread = max(np.sqrt(max(scaled @ bank._covariance @ scaled, 0.0)), 1e-3 * scaled.sum())
        self.tried = FAR * beta / spread * scaled / bank._scale
        self.ess = predict(bank, beta, self.tried).ess_mean
        tight = [name for name, weight in reach.direction.items() if weight > 1e-9]
        asked = ", ".join(f"{n} >= {self.margins[n]:.4g} (largest alone {reach.largest_alone[n]:.4g})" for n in tight)
        jointly = len(tight) > 1 and all(self.margins[name] < reach.largest_alone[name] for name in tight)
        reason = "they conflict: reachable one by one, not together" if jointly else "no reweighting reaches it"
        share = f"; {reach.common_scale:.3g} of the margins can be had together" if len(bank.names) > 1 else ""
        more = ", or score more or better responses" if bank.sampled else ": these are all the answers there are"
        if (reach.responses_needed or 0) > bank.responses.max():
            more = f", or score about {reach.responses_needed} responses per prompt (extrapolated)"
        at = f"multiplier {', '.join(f'{value:.3g}' for value in self.tried)}"
        where = (
            f"{len(bank.prompts)} prompts with {bank.responses.mean():.4g} responses each; at {at} the weights rest on "
        )
        where += f"{self.ess:.3g} responses per prompt"
        super().__init__(f"margin {asked}: {reason}{share}", where=where, mend=f"lower the margin{more}")


@dataclass(frozen=True)
class Solution(Record):
    """A certified minimiser of the dual over ``0 <= lambda <= upper``; arrays are (m,) in the order of ``names``.

    ``kkt_residual`` is the largest entry of ``x - clip(x - gradient / s)``, ``x = lambda s / beta``: dimensionless, the
    same for rescaled scores. ``identified`` says that the minimiser is the only one (Theorem 1 (iii)); if not, it may
    move along ``null_directions`` (largest entry 1). ``standard_errors``: sandwich ``H^-1 S H^-1 / K``, NaN at a bound.
    """

    names: tuple[str, ...]
    beta: float
    margins: np.ndarray
    multipliers: np.ndarray
    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    kkt_residual: float
    iterations: int
    converged: bool
    identified: bool
    null_directions: tuple[dict[str, float], ...]
    at_bound: dict[str, str | None]
    standard_errors: np.ndarray
    prediction: Prediction

    def named(self) -> dict[str, float]:
        """The multipliers by utility name."""
        return dict(zip(self.names, map(float, self.multipliers), strict=True))


def evaluate(bank: Bank, beta: float, margins: Values, multipliers: Values) -> DualPoint:
    """The dual, its gradient and its Hessian (CAN, Lemma 2 and Theorem 1).

    Args:
        bank: Scored responses.
        beta: KL weight, > 0, reward units per nat.
        margins: (m,) b, as an array or by name, utility units.
        multipliers: (m,) lambda, as an array or by name.

    Raises:
        ConfigError: Wrong length or names, a value that is not finite, or beta not > 0.
    """
    point = _Point(bank, beta, _vector(bank, margins, "margins"), _vector(bank, multipliers, "multipliers"))
    return DualPoint(point.value, point.gradient, point.hessian())


def predict(bank: Bank, beta: float, multipliers: Values) -> Prediction:
    """What the policy ``pi_lambda`` attains; the arguments are those of ``evaluate``."""
    point = _Point(bank, beta, np.zeros(len(bank.names)), _vector(bank, multipliers, "multipliers"))
    reference, margins = bank.reference_means, dict(zip(bank.names, map(float, point.gradient), strict=True))
    utilities = {name: reference[name] + margin for name, margin in margins.items()}
    reward = reference["reward"] + float((point.weights * bank._reward).sum(1).mean())
    kl = float(((point.weights * point.tilt).sum(1) - point.log_norm).mean())
    ess = 1.0 / (point.weights**2).sum(1)
    figures = (float(ess.mean()), float(np.median(ess)), float(np.quantile(ess, 0.05)), float(point.weights.max()))
    ceiling = float(np.log(bank.responses).mean()) if bank.uniform else None
    return Prediction(reward, utilities, margins, kl, reward - beta * kl, *figures, ceiling)


def reachable(bank: Bank, margins: Values) -> Reach:
    """Exact test whether a reweighting of the responses attains all margins with room to spare.

    It does iff ``mean_k max_i <v, g - E_ref g> > <v, b>`` for all weights v >= 0 on the utilities: a closed form for
    one utility, for several a linear programme in v whose cuts are best-response policies.
    """
    b = _vector(bank, margins, "margins") / bank._scale
    slack, direction = _tightest(bank, b)
    scale = _tightest(bank, b, scaled=True)[0] if (b > 0.0).any() else np.inf
    best = [float(corner.mean(0)[j] * bank._scale[j]) for j, corner in enumerate(bank._corners[: len(b)])]
    weights = direction / bank._scale
    alone, proof = (dict(zip(bank.names, map(float, v), strict=True)) for v in (best, weights / weights.sum()))
    needed = _responses_needed(bank, weights, float(direction @ b))
    return Reach(bool(slack > SLACK), slack, alone, scale, proof, needed)


def solve(
    bank: Bank,
    beta: float,
    margins: Values,
    *,
    start: Values | None = None,
    upper: Values | None = None,
    tolerance: float = 1e-10,
    max_iterations: int = 200,
) -> Solution:
    """The certified minimiser of the dual, by damped projected Newton steps with a line search.

    Args:
        bank: Scored responses.
        beta: KL weight, > 0.
        margins: (m,) b.
        start: (m,) first multiplier, or one number for all; 0 by default.
        upper: (m,) bounds on the multipliers (inf for none), or one number for all; none by default.
        tolerance: Largest ``Solution.kkt_residual`` that counts as converged.
        max_iterations: Most Newton steps.

    Raises:
        UnreachableMargin: The dual is unbounded below, or has its infimum at infinity.
        ConfigError: As ``evaluate``.
    """
    b, begin = _vector(bank, margins, "margins"), _vector(bank, 0.0 if start is None else start, "start", spread=True)
    top = _vector(bank, np.inf if upper is None else upper, "upper", spread=True)
    if np.isinf(top).any():
        slack, v = _tightest(bank, b / bank._scale, among=np.isinf(top), sign_only=True)
        # on the edge a minimiser exists only if the tight direction is a function of the prompt alone
        if slack < -SLACK or (slack <= SLACK and v @ bank._covariance @ v > NULL):
            raise UnreachableMargin(bank, beta, b, reachable(bank, b))
    point, residual, iterations = _minimise(bank, beta, b, top, begin, tolerance, max_iterations)
    lam, slope, hessian = point.multipliers, point.gradient / bank._scale, point.hessian()
    low, high = (lam <= 0.0) & (slope > -tolerance), (lam >= top) & (slope < tolerance)
    null = _null_directions(bank, lam * bank._scale / beta, top * bank._scale / beta, slope, 100 * tolerance)
    return Solution(
        names=bank.names,
        beta=beta,
        margins=b,
        multipliers=lam,
        value=point.value,
        gradient=point.gradient,
        hessian=hessian,
        kkt_residual=residual,
        iterations=iterations,
        converged=residual <= tolerance,
        identified=not null,
        null_directions=tuple(dict(zip(bank.names, map(float, v), strict=True)) for v in null),
        at_bound={n: "lower" if a else "upper" if z else None for n, a, z in zip(bank.names, low, high, strict=True)},
        standard_errors=np.sqrt(np.diag(_sandwich(point, hessian, ~(low | high)))),
        prediction=predict(bank, beta, lam),
    )


def solve_path(bank: Bank, beta: float, margins_grid: np.ndarray) -> list[Solution | UnreachableMargin]:
    """``solve`` for each row of a (T, m) grid of margins, each started where the last one ended."""
    path: list[Solution | UnreachableMargin] = []
    start: np.ndarray | None = None
    for margins in np.asarray(margins_grid, float).reshape(-1, len(bank.names)):
        try:
            path.append(solution := solve(bank, beta, margins, start=start))
            start = solution.multipliers
        except UnreachableMargin as unreachable:
            path.append(unreachable)
    return path


class _Point:
    """The tilted weights (K, I) at one multiplier and what follows from them; ``share`` (K,) weighs the prompts."""

    def __init__(
        self, bank: Bank, beta: float, margins: np.ndarray, multipliers: np.ndarray, share: np.ndarray | None = None
    ) -> None:
        if not 0.0 < beta < np.inf:
            raise ConfigError(f"beta is {beta}", where="alignbench.dual", mend="beta must be a finite number > 0")
        self.bank, self.beta, self.multipliers = bank, beta, multipliers
        self.share = np.full(len(bank.prompts), 1.0 / len(bank.prompts)) if share is None else share
        self.tilt = (bank._reward + np.tensordot(multipliers, bank.gain, 1)) / beta
        logits = self.tilt + bank.log_weights
        top = logits.max(1, keepdims=True)
        self.weights = np.exp(np.subtract(logits, top, out=logits), out=logits)
        total = self.weights.sum(1, keepdims=True)
        self.weights /= total
        self.log_norm = (top + np.log(total))[:, 0]
        self.gains = np.einsum("ki,jki->kj", self.weights, bank.gain)  # per prompt, (K, m)
        self.gradient = self.share @ self.gains - margins
        self.centred = beta * float(self.share @ self.log_norm) - float(multipliers @ margins)
        self.value = self.centred + float(self.share @ bank._means[-1])

    def hessian(self) -> np.ndarray:
        # deviations from the tilted mean, since E g^2 - (E g)^2 loses all digits once the weights concentrate
        deviation = (self.bank.gain - self.gains.T[:, :, None]).reshape(len(self.gradient), -1)
        return (deviation * (self.weights * self.share[:, None]).ravel()) @ deviation.T / self.beta


def _minimise(
    bank: Bank,
    beta: float,
    b: np.ndarray,
    upper: np.ndarray,
    start: np.ndarray,
    tolerance: float,
    max_iterations: int,
    share: np.ndarray | None = None,
) -> tuple[_Point, float, int]:
    """Projected Newton (Bertsekas' two-metric method): the minimiser, its scaled KKT residual, the steps taken."""
    scale = bank._scale / beta  # x = lambda * scale; the objective is D / beta
    top = upper * scale

    def at(x: np.ndarray) -> tuple[np.ndarray, _Point, np.ndarray, float]:
        point = _Point(bank, beta, b, np.minimum(x / scale, upper), share)
        slope = point.gradient / bank._scale
        return x, point, slope, float(np.abs(x - np.clip(x - slope, 0.0, top)).max())

    x, point, slope, residual = at(np.clip(start * scale, 0.0, top))
    for iteration in range(max_iterations):
        if residual <= tolerance:
            return point, residual, iteration
        strip = min(1e-3, residual)
        free = ~(((x <= strip) & (slope > 0.0)) | ((x >= top - strip) & (slope < 0.0)))
        curvature = point.hessian() * beta / np.outer(bank._scale, bank._scale)
        # the damping vanishes with the residual, so that convergence stays superlinear; it moves flat directions too
        damping = 1e-3 * strip * max(np.trace(curvature), 1e-100)
        move = -slope
        move[free] = -np.linalg.solve(curvature[np.ix_(free, free)] + np.eye(free.sum()) * damping, slope[free])
        move[free] *= min(1.0, (10.0 + 2.0 * float(np.linalg.norm(x))) / max(float(np.linalg.norm(move[free])), 1e-300))
        for t in 0.5 ** np.arange(60):
            trial = at(np.clip(x + t * move, 0.0, top))
            change = (trial[1].centred - point.centred) / beta
            wanted = 1e-4 * (t * slope[free] @ move[free] + slope[~free] @ (trial[0] - x)[~free])
            # below round-off the value says nothing, and the residual decides
            noise = 1e-14 * (1.0 + abs(point.centred / beta))
            if change <= wanted or (abs(change) <= noise and trial[3] < residual):
                break
        else:
            return point, residual, iteration
        x, point, slope, residual = trial
    return point, residual, max_iterations


def _tightest(
    bank: Bank,
    b: np.ndarray,
    *,
    among: np.ndarray | None = None,
    prompts: np.ndarray | None = None,
    scaled: bool = False,
    sign_only: bool = False,
) -> tuple[float, np.ndarray]:
    """Least (best ``<v, margin>``) - ``<v, b>`` over directions v >= 0, in scaled units, and v, by cutting planes.

    v sums to one, or with ``scaled`` has ``<v, b> = 1`` and nothing subtracted. ``among`` marks the utilities v uses,
    ``prompts`` reweighs the prompts, ``sign_only`` stops as soon as the sign is proven.
    """
    m, share = len(b), np.full(len(bank.prompts), 1.0 / len(bank.prompts)) if prompts is None else prompts
    allowed = np.ones(m, bool) if among is None else among
    target, total = (np.zeros(m), b) if scaled else (b, np.ones(m))
    bounds = [(0.0, None if allow else 0.0) for allow in allowed] + [(None, None)]
    best, direction = np.inf, np.zeros(m)
    while True:
        cuts = np.stack([share @ corner for corner in bank._corners]) - target
        if m == 1:
            return float(cuts[0, 0] / total[0]), 1.0 / total
        table = np.hstack([cuts, -np.ones((len(cuts), 1))])
        plan = linprog([*np.zeros(m), 1.0], table, np.zeros(len(cuts)), [[*total, 0.0]], [1.0], bounds, "highs")
        v = np.maximum(plan.x[:m], 0.0)
        corner = bank._corner(v)
        cut = share @ corner - target
        if float(v @ cut) < best:
            best, direction = float(v @ cut), v
        # the mixture of best responses behind the plan attains this much for certain: the programme's own optimum
        # holds to the 1e-7 of its feasibility tolerance only
        mixture = np.maximum(-plan.ineqlin.marginals, 0.0)
        bound = float(plan.fun) if scaled else float((mixture @ cuts / mixture.sum())[allowed].min())
        if sign_only and bound > SLACK:
            return bound, direction
        known = (np.abs(cuts - cut).max(1) <= SLACK).any()
        if known or best - bound <= SLACK or (sign_only and best < -SLACK):
            return best, direction
        bank._corners.append(corner)


def _responses_needed(bank: Bank, weights: np.ndarray, target: float) -> int | None:
    """Smallest n with ``mean_k E[max of n of the prompt's responses] > target``; see ``Reach``."""
    smallest = int(bank.responses.min())
    if not (bank.sampled and bank.uniform) or smallest < 8:
        return None
    ordered = -np.sort(-np.where(bank._listed, np.tensordot(weights, bank.gain, 1), -np.inf), axis=1)
    grid = np.unique(np.geomspace(1, smallest, 40).round().astype(int))
    rank, count, means = np.arange(ordered.shape[1]), bank.responses[:, None], np.zeros(len(grid))
    for at, n in enumerate(grid):
        # P(the r-th largest is the best of n drawn without replacement) = C(count - 1 - r, n - 1) / C(count, n)
        left = np.maximum(count - rank - n, 0)
        log_share = gammaln(left + n) - gammaln(left + 1) + np.log(n) + gammaln(count - n + 1) - gammaln(count + 1)
        used = count - rank >= n
        means[at] = (np.exp(np.where(used, log_share, -np.inf)) * np.where(used, ordered, 0.0)).sum(1).mean()
    if means[-1] > target:
        return int(grid[np.argmax(means > target)])
    growth, late = np.sqrt(2.0 * np.log(grid)), grid >= smallest / 8
    slope = float(np.polyfit(growth[late], means[late], 1)[0])
    log_needed = (growth[-1] + (target - means[-1]) / slope) ** 2 / 2.0 if slope > 1e-12 else np.inf
    return int(np.ceil(np.exp(log_needed))) if log_needed < 27.0 else None


def _null_directions(bank: Bank, x: np.ndarray, top: np.ndarray, slope: np.ndarray, near: float) -> list[np.ndarray]:
    """Directions in lambda along which the dual is flat at a minimiser and that the bounds leave open."""
    loose, found = np.flatnonzero(np.abs(slope) <= near), []  # a strictly active bound pins its multiplier
    values, vectors = np.linalg.eigh(bank._covariance[np.ix_(loose, loose)])
    for vector in vectors[:, values <= NULL * max(1.0, values.max(initial=0.0))].T:
        direction = np.zeros(len(x))
        direction[loose] = np.where(np.abs(vector) > 1e-7, vector, 0.0)
        for v in (direction, -direction):
            if not (((x <= near) & (v < 0.0)) | ((x >= top - near) & (v > 0.0))).any():
                found.append(v / bank._scale / np.abs(v / bank._scale).max())
                break
    return found


def _inverse(hessian: np.ndarray, free: np.ndarray) -> np.ndarray:
    # rows and columns of zeros stay zero under the pseudo-inverse
    return np.linalg.pinv(np.where(np.outer(free, free), hessian, 0.0), rcond=NULL, hermitian=True)


def _sandwich(point: _Point, hessian: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Covariance (m, m) of the multipliers over draws of the prompts; NaN on the diagonal of fixed ones.

    One prompt says nothing of the others: NaN.
    """
    inverse, prompts = _inverse(hessian, free), len(point.gains)
    if prompts == 1:
        return np.full(inverse.shape, np.nan)
    covariance = inverse @ np.cov(point.gains.T).reshape(inverse.shape) @ inverse / prompts
    covariance[~free, ~free] = np.nan
    return covariance


def _pairs(bank: Bank, low: np.ndarray, high: np.ndarray) -> dict[str, tuple[float, float]]:
    return {name: (float(a), float(z)) for name, a, z in zip(bank.names, low, high, strict=True)}


def _vector(bank: Bank, values: Values, argument: str, *, spread: bool = False) -> np.ndarray:
    """(m,) floats from an array or a mapping by name; ``spread`` admits one number for all, and inf."""
    if isinstance(values, Mapping):
        fits = set(values) == set(bank.names)
        values = [values[name] for name in bank.names] if fits else np.full(0, np.nan)
    vector = np.atleast_1d(np.array(values, float))
    vector = np.repeat(vector, len(bank.names)) if spread and vector.shape == (1,) else vector
    if vector.shape != (len(bank.names),) or not (np.isfinite(vector) | (spread & (vector == np.inf))).all():
        names = ", ".join(bank.names)
        what = f"{argument} {vector.tolist() or 'of other names'} for {len(bank.names)} utilities"
        raise ConfigError(what, where=argument, mend=f"give one finite number for each of: {names}")
    return vector
