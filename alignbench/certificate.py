"""Exact certificate of a policy on listed answers: how far it is from the constrained optimum, and why.

Where every answer of a prompt is listed, rewards, utilities, KL, the dual and its minimiser are finite sums, so the
distances that the papers bound can be stated as numbers: the optimality and constraint gaps of CAN (arXiv 2405.19544),
the R-OPT and U-OPT of CAID (arXiv 2505.19387, sec. 4) with the constants of its Theorems 3 and 4, and the split of an
error into a wrong multiplier (``lambda_error``) and a policy that misses its target (``kl_to_target``).

Margins, utilities and signs are those of ``alignbench.problem``; rewards and objectives are in reward units, KL in
nats, all averaged over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from alignbench.dual import Bank, Record, Solution, UnreachableMargin, Values, evaluate, predict, reachable, solve
from alignbench.errors import DataError

__all__ = ["Bounds", "Certificate", "certify", "tilted"]


@dataclass(frozen=True)
class Bounds(Record):
    """The measurable parts of CAID's bounds, and the right-hand sides they give.

    The nu of the theory belongs to the policy *class* (a worst case over targets); here it is measured for this policy
    against its own target, a lower bound on the class's nu. The bound values are therefore indicative, no guarantee.

    Attributes:
        largest_score: ``M = max(|h_j|, |r|)`` over listed answers, ``h_j = g_j - E_{ref|x} g_j - b_j``.
        multiplier_norm: ``||lambda*||_1``.
        smoothness_at_optimum: Largest eigenvalue of the dual's Hessian at lambda*.
        smoothness: ``L_D``, the largest over a grid of multipliers (0 to 2 lambda*, and lambda* to lambda_hat).
        strong_convexity: ``mu_D``, the smallest eigenvalue at lambda*.
        nu_l1: Mean over prompts of ``||pi - pi_lambda_hat||_1``, at most 2.
        nu_kl: ``|KL(pi || ref) - KL(pi_lambda_hat || ref)|``.
        one_shot_reward: Theorem 4's bound on R-OPT, with the factor ``||lambda*||_1`` of its proof (B.9).
        one_shot_utility: Theorem 4's bound on U-OPT.
        multi_shot_reward: Theorem 3's bound on R-OPT, with lambda_hat for ``lambda_p*``; inf where
            ``lambda_nu* = argmin D(lambda) - M nu ||lambda||_1`` does not exist or ``mu_D`` is 0.
        multi_shot_utility: Theorem 3's bound on U-OPT.
    """

    largest_score: float
    multiplier_norm: float
    smoothness_at_optimum: float
    smoothness: float
    strong_convexity: float
    nu_l1: float
    nu_kl: float
    one_shot_reward: float
    one_shot_utility: float
    multi_shot_reward: float
    multi_shot_utility: float


@dataclass(frozen=True)
class Certificate(Record):
    """Exact standing of one policy against the optimum of its constrained problem; mappings are by utility name.

    Attributes:
        beta: KL weight.
        requested: Margins b.
        reward: ``E_pi r``.
        utilities: ``E_pi g_j``.
        margins: ``E_pi g_j - E_ref g_j``.
        kl: ``KL(pi || ref)``.
        objective: ``J = reward - beta kl``.
        optimum_multipliers: lambda*.
        optimum_objective: ``J*``, of the best policy that keeps the margins.
        optimum_margins: Its margins.
        reference_objective: ``J`` of the reference, its reward.
        unconstrained_objective: ``J`` at lambda = 0.
        unconstrained_margins: Margins at lambda = 0.
        most_constrained_margins: Largest margin of each utility that any policy on the list has (its supremum, with
            no regard to the KL or the other utilities).
        gain_share: ``(J - J_ref) / (J* - J_ref)``; NaN where the constraints cost as much as the reward gains.
        optimality_gap: ``J* - J``; negative only for a policy that breaks a margin.
        constraint_gap: ``max(0, b_j - margin_j)``.
        constraint_gap_share: The same as a share of the range from the unconstrained to the most constrained margin;
            NaN where there is no such range.
        primal_dual_gap: ``D(lambda_hat) - J``; at least 0 for a policy that keeps the margins.
        optimal_dual_gap: ``D(lambda*) - J``.
        lagrangian_gap: ``D(lambda*) - L(pi, lambda*) = beta KL(pi || pi*)``: distance to the optimum that neither a
            broken nor an over-satisfied margin flatters.
        multipliers: lambda_hat, those the method used; lambda* if none were given.
        lambda_error: ``|lambda_hat_j - lambda*_j|``.
        kl_to_target: ``KL(pi || pi_lambda_hat)``, what training and parametrisation left over.
        reward_optimality: CAID's R-OPT, ``|E_pi[r - beta ln(pi/ref)] - E_pi*[r - beta ln(pi*/ref)]|``.
        utility_optimality: CAID's U-OPT, ``||E_pi h - E_pi* h||_inf``.
        bounds: What CAID's theory says about the last two.
    """

    beta: float
    requested: dict[str, float]
    reward: float
    utilities: dict[str, float]
    margins: dict[str, float]
    kl: float
    objective: float
    optimum_multipliers: dict[str, float]
    optimum_objective: float
    optimum_margins: dict[str, float]
    reference_objective: float
    unconstrained_objective: float
    unconstrained_margins: dict[str, float]
    most_constrained_margins: dict[str, float]
    gain_share: float
    optimality_gap: float
    constraint_gap: dict[str, float]
    constraint_gap_share: dict[str, float]
    primal_dual_gap: float
    optimal_dual_gap: float
    lagrangian_gap: float
    multipliers: dict[str, float]
    lambda_error: dict[str, float]
    kl_to_target: float
    reward_optimality: float
    utility_optimality: float
    bounds: Bounds


def certify(
    reference: Bank,
    policy_log_weights: np.ndarray,
    margins: Values,
    beta: float,
    *,
    multipliers: Values | None = None,
    optimum: Solution | None = None,
) -> Certificate:
    """The certificate of a policy on listed answers.

    Args:
        reference: The list, with ``log_weights = ln pi_ref`` and gold reward and utilities.
        policy_log_weights: (K, I) ``ln pi`` in the layout of ``reference.log_weights``; renormalised on the list, -inf
            where padded and for answers the policy never gives.
        margins: (m,) requested b, as an array or by name.
        beta: KL weight, > 0.
        multipliers: (m,) lambda_hat that the method used, as an array or by name; lambda* by default.
        optimum: ``solve(reference, beta, margins)``, where it is known already.

    Raises:
        DataError: The policy's layout does not fit, it has a prompt without an answer, it gives answers that the
            reference cannot give (infinite KL), or the optimum was solved for other margins or did not converge.
        UnreachableMargin: No policy on the list keeps the margins.
    """
    policy = _normalised(reference, policy_log_weights)
    if optimum is None:
        optimum = solve(reference, beta, margins)
    names, b = reference.names, optimum.margins
    # evaluate checks the margins' length and names on the way
    expected = evaluate(reference, beta, margins, optimum.multipliers).gradient
    if optimum.beta != beta or optimum.names != names or np.abs(expected - optimum.gradient).max() > 1e-9:
        raise DataError(
            "the optimum was solved for another problem",
            where="certify, optimum",
            mend="pass solve(reference, beta, margins)",
        )
    if not optimum.converged:
        raise DataError(
            f"the optimum did not converge (residual {optimum.kkt_residual:.3g})",
            where="certify, optimum",
            mend="solve with more iterations, or with margins further from the edge of reach",
        )
    given = optimum.multipliers if multipliers is None else multipliers
    lam = (
        np.array([float(given[name]) for name in names])
        if isinstance(given, Mapping)
        else np.atleast_1d(np.asarray(given, float))
    )
    best, free, target = optimum.prediction, predict(reference, beta, 0.0 * b), predict(reference, beta, given)
    p, base = np.exp(policy), reference.reference_means
    reward = _mean(p * reference.reward)
    achieved = (p * reference.gain).sum(-1).mean(1)
    kl = _divergence(policy, reference.log_weights)
    objective = reward - beta * kl
    gap = np.maximum(b - achieved, 0.0)
    most = np.array(list(reachable(reference, b).largest_alone.values()))
    best_margins, free_margins = (np.array(list(each.margins.values())) for each in (best, free))
    room = most - free_margins
    gain = best.objective - base["reward"]
    target_policy = tilted(reference, beta, lam)

    def named(values: np.ndarray) -> dict[str, float]:
        return dict(zip(names, map(float, values), strict=True))

    return Certificate(
        beta=beta,
        requested=named(b),
        reward=reward,
        utilities={name: base[name] + margin for name, margin in named(achieved).items()},
        margins=named(achieved),
        kl=kl,
        objective=objective,
        optimum_multipliers=optimum.named(),
        optimum_objective=best.objective,
        optimum_margins=best.margins,
        reference_objective=base["reward"],
        unconstrained_objective=free.objective,
        unconstrained_margins=free.margins,
        most_constrained_margins=named(most),
        gain_share=(objective - base["reward"]) / gain if gain > 0.0 else np.nan,
        optimality_gap=best.objective - objective,
        constraint_gap=named(gap),
        constraint_gap_share=named(np.divide(gap, room, out=np.full(len(b), np.nan), where=room > 0.0)),
        primal_dual_gap=evaluate(reference, beta, b, lam).value - objective,
        optimal_dual_gap=optimum.value - objective,
        lagrangian_gap=beta * _divergence(policy, tilted(reference, beta, optimum.multipliers)),
        multipliers=named(lam),
        lambda_error=named(np.abs(lam - optimum.multipliers)),
        kl_to_target=_divergence(policy, target_policy),
        reward_optimality=abs(objective - best.objective),
        utility_optimality=float(np.abs(achieved - best_margins).max()),
        bounds=_bounds(
            reference,
            optimum,
            lam,
            nu_l1=float(np.abs(p - np.exp(target_policy)).sum(1).mean()),
            nu_kl=abs(kl - target.kl),
        ),
    )


def tilted(bank: Bank, beta: float, multipliers: np.ndarray) -> np.ndarray:
    """Log-probabilities (K, I) of ``pi_lambda ~ ref exp((r + <lambda, g>) / beta)``; multipliers (m,)."""
    logits = bank.log_weights + (bank.reward + bank.utilities @ multipliers) / beta
    return logits - logsumexp(logits, axis=1, keepdims=True)


def _bounds(reference: Bank, optimum: Solution, lam: np.ndarray, *, nu_l1: float, nu_kl: float) -> Bounds:
    beta, b, star = optimum.beta, optimum.margins, optimum.multipliers
    listed = reference.log_weights > -np.inf
    slack = np.abs(reference.gain - b[:, None, None])[:, listed].max()
    largest = float(max(slack, np.abs(reference.reward[listed]).max()))
    nu, norm = max(nu_l1, nu_kl), float(np.abs(star).sum())
    spectrum = np.linalg.eigvalsh(optimum.hessian)
    grid = [*(t * star for t in np.linspace(0.0, 2.0, 21)), *(star + t * (lam - star) for t in np.linspace(0, 1, 5))]
    smooth = max(float(np.linalg.eigvalsh(evaluate(reference, beta, b, at).hessian)[-1]) for at in grid)

    def price(size: float) -> float:
        return (largest + beta + largest * size) * nu

    one_utility = np.sqrt(2.0 * smooth * price(norm))
    lowest = float(max(spectrum[0], 0.0))
    many_utility = many_reward = np.inf
    if lowest > 0.0:
        used = float(np.abs(lam).sum())
        many_utility = 2.0 * np.sqrt((smooth + smooth**2 / lowest) * price(used))
        try:
            # D(lambda) - M nu ||lambda||_1 is the dual of the problem with margins b + M nu
            raised = solve(reference, beta, b + largest * nu).multipliers
            many_reward = used * many_utility + price(float(raised.sum()))
        except UnreachableMargin:
            pass
    return Bounds(
        largest_score=largest,
        multiplier_norm=norm,
        smoothness_at_optimum=float(spectrum[-1]),
        smoothness=smooth,
        strong_convexity=lowest,
        nu_l1=nu_l1,
        nu_kl=nu_kl,
        one_shot_reward=float(norm * one_utility + price(norm)),
        one_shot_utility=float(one_utility),
        multi_shot_reward=float(many_reward),
        multi_shot_utility=float(many_utility),
    )


def _normalised(reference: Bank, log_weights: np.ndarray) -> np.ndarray:
    policy = np.array(log_weights, float)
    if policy.shape != reference.log_weights.shape or np.isnan(policy).any() or (policy == np.inf).any():
        raise DataError(
            f"policy log-weights have shape {policy.shape} or are NaN or infinite; expected finite numbers, or -inf "
            f"where padded, in shape {reference.log_weights.shape}",
            where="certify, policy_log_weights",
            mend="score the policy on the listed answers, in the reference's layout",
        )
    outside = np.argwhere((policy > -np.inf) & (reference.log_weights == -np.inf))
    if len(outside):
        k, i = outside[0]
        raise DataError(
            f"the policy gives answer {i} of prompt {reference.prompts[k]}, which the reference cannot give",
            where=f"certify, policy_log_weights, {len(outside)} answers",
            mend="put -inf where the list is padded",
        )
    total = logsumexp(policy, axis=1, keepdims=True)
    if not np.isfinite(total).all():
        prompt = reference.prompts[int(np.flatnonzero(~np.isfinite(total))[0])]
        raise DataError(
            f"the policy gives no listed answer of prompt {prompt}",
            where="certify, policy_log_weights",
            mend="score the policy on the listed answers",
        )
    return policy - total


def _divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    given = log_p > -np.inf  # 0 ln 0 = 0
    difference = np.where(given, log_p, 0.0) - np.where(given, log_q, 0.0)
    return _mean(np.exp(log_p) * difference)


def _mean(values: np.ndarray) -> float:
    return float(values.sum(1).mean())
