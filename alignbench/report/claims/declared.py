"""What the four papers claim, in our own words, and the experiment at embedded scale that tests each claim.

Everything here was written down before the runs of `sweeps/claims.sh`: which runs, what is measured, the smallest
effect of interest and the rule (`alignbench.report.claims.effects`). Units: scores are gold scores, whose standard
deviation under the SFT policy is near 1 in the embedded world; a tenth of it is the smallest difference we care about.
Margins are in the same unit; gaps and shares are exact sums over listed answers (`dataset=enumerable`).

Embedded scale tests the mechanism, not a number of a paper: a claim about a 7B model may hold there and fail here.
PD-DPO's body was not available to us: its claims are those of its abstract and of what its public reviews tell.
Where a paper counts a judge's wins, gold scores, for which a judge stands, are compared themselves.
The claims about two constraints were added after a first sweep of the others, and before any run of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from alignbench.report.claims.selection import FIRST, At, Role, UnusableError
from alignbench.report.stats import FloatArray

SACPO, CAN, CAID, PD_DPO = "SACPO", "CAN", "CAID", "PD-DPO"
PAPERS = {
    SACPO: "SACPO and P-SACPO (arXiv 2404.11049)",
    CAN: "CAN: MoCAN and PeCAN (arXiv 2405.19544)",
    CAID: "CAID: MoCAID and PeCAID (arXiv 2505.19387)",
    PD_DPO: "PD-DPO, offline and online (arXiv 2510.05703)",
}

_SEEDS = "seed=0,1,2,3,4"
# nothing of these seeds has been looked at while settings were chosen and earlier results were written down
_FRESH = "seed=5,6,7,8,9"
_GRID = "constraint.thresholds='[-0.2],[0.0],[0.1],[0.2],[0.4]'"
_EXACT = "constraint.thresholds='[-0.2],[0.0],[0.2]'"
_PAIRS = "constraint.utilities=[safety,politeness] constraint.thresholds='[0.1,0.05],[0.2,0.0],[0.0,0.1]'"

#: Name -> overrides of `python main.py -m`: the lines of sweeps/claims.sh.
RUNS = {
    "single objectives": f"method=dpo_helpful,dpo_safe {_SEEDS}",
    "methods over thresholds": f"method=sacpo,mocan,mocaid,pd_dpo {_GRID} {_SEEDS}",
    "stated beta/lambda": f"method=sacpo method.beta_over_lambda='[0.1],[0.2],[0.5],[1.0]' {_SEEDS}",
    "safe first": f"method=sacpo method.order=safe_first method.beta_over_lambda=[0.2] {_SEEDS}",
    "KTO safety step": "method=sacpo method.safety_step.loss=kto method.safety_step.kto_labels=is_safe "
    f"method.beta_over_lambda=[0.2] {_SEEDS}",
    "P-SACPO": f"method=p_sacpo {_SEEDS}",
    "naive merge": f"method=naive_merge method.beta_safe=0.1 {_SEEDS}",
    "stated multipliers": f"method=mocan,pecan method.multipliers='[0.5],[1.0],[1.5]' {_SEEDS}",
    "two constraints": f"method=mocan,mocaid {_PAIRS} {_SEEDS}",
    "dual alone": f"method=dual method.dual.samples=8,64 constraint.thresholds=[0.4] {_FRESH}",
    "more rounds": f"method=pd_dpo method.rounds=6 {_GRID} {_SEEDS}",
    "exact": f"experiment=certificate/mocan,certificate/sacpo,certificate/pd_dpo {_EXACT} {_FRESH}",
    "exact, multi-shot": f"experiment=certificate/mocaid method.step.train.epochs=0.5 {_EXACT} {_FRESH}",
    "exact, stated multiplier": "experiment=certificate/mocan,certificate/pecan method.multipliers=[0.7] "
    f"constraint.thresholds=[0.2] {_FRESH}",
    "online": "experiment=certificate/online method.online.bonus=objectives "
    "seed=8,9,10,11,12,13,14,15",
    "online, no bonus": "experiment=certificate/online method.online.bonus=objectives method.online.alpha_reward=0.0 "
    "method.online.alpha_cost=0.0 seed=8,9,10,11,12,13,14,15",
}  # fmt: skip

#: Training prompts by world; runs on fewer (debug=tiny) show the machinery, and no claim is judged on them.
SCALE = {"handbook": 400, "enumerable": 64}

SCORE, MARGIN = 0.1, 0.1


@dataclass(frozen=True)
class Part:
    """One measured quantity of a claim.

    Attributes:
        text: What it is, for the page; positive is the claimed direction.
        measure: Reads it at one point, (seeds, prompts) or (seeds, 1).
        kind: Its rule, see `alignbench.report.claims.effects`.
        smallest: Smallest effect of interest, in its unit.
        unit: Of the effect.
        counted: Whether it is a count.
    """

    text: str
    measure: Callable[[At], FloatArray]
    kind: str = "above"
    smallest: float = SCORE
    unit: str = "score"
    counted: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim and its experiment.

    Attributes:
        id: Short name.
        paper: Key of `PAPERS`.
        source: Section, theorem or table of the paper.
        statement: In our own words.
        roles: Who is compared.
        parts: What is measured; the claim is all of them.
        runs: Keys of `RUNS` that make its records.
        over: How points (thresholds, or a grid) come together: "mean" of the effects, "every" point must hold, "some"
            point is enough, or "slope" of the effects in `along`.
        along: For a slope: a point's abscissa.
        note: What a reader must know.
        constraints: How many utilities its runs constrain.
    """

    id: str
    paper: str
    source: str
    statement: str
    roles: Mapping[str, Role]
    parts: tuple[Part, ...]
    runs: tuple[str, ...]
    over: str = "mean"
    along: Callable[[At], FloatArray] | None = None
    note: str = ""
    constraints: int = 1


# ---------------------------------------------------------------- roles

_HANDBOOK = {"dataset.name": "handbook"}
_LISTED = {"dataset.name": "enumerable"}
_FROM_DUAL = {"method.multipliers": None}
_STATED = "method.multipliers"
_RATIO = "method.beta_over_lambda"
_DPO = {"method.order": "helpful_first", "method.safety_step.loss": "dpo"}

_SACPO = Role("sacpo", _HANDBOOK | _FROM_DUAL | _DPO | {_RATIO: None})
_SACPO_GRID = Role("sacpo", _HANDBOOK | _DPO | _FROM_DUAL, varies=_RATIO)
_SACPO_02 = Role("sacpo", _HANDBOOK | _DPO | {_RATIO: [0.2]}, anywhere=True)
_SAFE_FIRST = Role("sacpo", _HANDBOOK | {"method.order": "safe_first", _RATIO: [0.2]}, anywhere=True)
_KTO = Role("sacpo", _HANDBOOK | {"method.safety_step.loss": "kto", _RATIO: [0.2]}, anywhere=True)
_P_SACPO = Role("p_sacpo", _HANDBOOK | {_RATIO: [0.1]}, anywhere=True)
_NAIVE = Role("naive_merge", _HANDBOOK | {"method.beta_safe": 0.1}, anywhere=True)
_MOCAN = Role("mocan", _HANDBOOK | _FROM_DUAL)
_MOCAID = Role("mocaid", _HANDBOOK | _FROM_DUAL)
_PD_DPO = Role("pd_dpo", _HANDBOOK | {"method.rounds": 3})


def _exact(method: str, **where: object) -> Role:
    return Role(method, _LISTED | {f"method.{key.replace('__', '.')}": value for key, value in where.items()})


_BONUS = _exact("online_pd_dpo", online__alpha_reward=5.0, online__alpha_cost=5.0, online__bonus="objectives")


# ---------------------------------------------------------------- measures


def _difference(
    metric: str, a: str, b: str, row_a: str = "reported", row_b: str = "reported"
) -> Callable[..., FloatArray]:
    return lambda at: at.mean(a, metric, row_a) - at.mean(b, metric, row_b)


def _gain(metric: str, role: str, sign: float = 1.0) -> Callable[..., FloatArray]:
    return lambda at: sign * at.gain(role, metric)


def _doublings(role: str) -> Callable[..., FloatArray]:
    """Doublings of lambda: beta / lambda halved."""
    return lambda at: -np.log2(at.setting(role, _RATIO))


def _over_naive(at: At) -> FloatArray:
    """Gain in reward and safety together, mean over the paper's q."""
    found = [
        at.mean("P-SACPO", metric, f"p_sacpo q={q}") - at.mean("naive merge", metric, f"naive_merge q={q}")
        for q in ("0.25", "0.5", "0.75")
        for metric in ("reward", "utility")
    ]
    return np.sum(found, axis=0) / 3


def _lagrangian(at: At, role: str) -> FloatArray:
    """What both methods maximise: r + lambda g - beta KL at the stated multiplier."""
    weight, beta = at.setting(role, _STATED), at.setting(role, "constraint.beta")
    return at.mean(role, "reward") + weight * at.mean(role, "utility") - beta * at.mean(role, "kl")


def _exact_lagrangian(at: At, role: str) -> FloatArray:
    weight, beta = at.setting(role, _STATED), at.setting(role, "constraint.beta")
    return at.exact(role, "reward") + weight * at.exact(role, "utilities") - beta * at.exact(role, "kl")


def _exact_miss(at: At, role: str, row: str = "reported") -> FloatArray:
    return np.abs(at.exact(role, "margins", row=row) - at.exact(role, "requested", row=row))


def _two_misses(at: At) -> FloatArray:
    """How much farther MoCAN ends from the requested margins than MoCAID, mean over both."""
    return np.mean([at.miss("MoCAN", name) - at.miss("MoCAID", name) for name in ("safety", "politeness")], axis=0)


def _optimal(role: str) -> tuple[Part]:
    """How near the constrained optimum, exact; no broken and no over-satisfied margin flatters it."""

    def measure(at: At) -> FloatArray:
        best = at.exact(role, "optimum_objective") - at.exact(role, "reference_objective")
        if (best <= 0.0).any():
            raise UnusableError("the constrained optimum gains nothing over the reference here: no share of it")
        return -at.exact(role, "lagrangian_gap") / best

    text = "D(lambda*) - L(pi, lambda*) as a share of the optimum's gain, negative"
    return (Part(text, measure, "not_below", 0.1, "share"),)


# ---------------------------------------------------------------- the claims

CLAIMS = (
    Claim(
        "sacpo-over-single", SACPO, "Table 3, Fig. 2",
        "SACPO is safer than aligning with helpfulness alone and more helpful than aligning with safety alone.",
        {"SACPO": _SACPO, "helpful DPO": Role("dpo_helpful", _HANDBOOK, anywhere=True),
         "safe DPO": Role("dpo_safe", _HANDBOOK, anywhere=True)},
        (Part("safety, SACPO - helpful DPO", _difference("utility", "SACPO", "helpful DPO")),
         Part("reward, SACPO - safe DPO", _difference("reward", "SACPO", "safe DPO"))),
        ("single objectives", "methods over thresholds"),
        note="each single objective is beaten on the objective that it leaves out; lambda from the dual",
    ),
    Claim(
        "sacpo-over-sft", SACPO, "Table 3 (win rates over SFT above one half in both)",
        "At some beta/lambda SACPO is both more helpful and safer than the SFT policy.",
        {"SACPO": _SACPO_GRID},
        (Part("reward over SFT", _gain("reward", "SACPO")), Part("safety over SFT", _gain("utility", "SACPO"))),
        ("stated beta/lambda",), over="some",
    ),
    Claim(
        "sacpo-trade-off", SACPO, "Table 3 (beta/lambda .01 to .1)",
        "A smaller beta/lambda makes SACPO safer and less helpful.",
        {"SACPO": _SACPO_GRID},
        (Part("safety per doubling of lambda", _gain("utility", "SACPO"), smallest=0.05),
         Part("reward lost per doubling of lambda", _gain("reward", "SACPO", -1.0), smallest=0.05)),
        ("stated beta/lambda",), over="slope", along=_doublings("SACPO"),
    ),
    Claim(
        "sacpo-order", SACPO, "Remark 2 (commutative law)",
        "The order of the two steps does not matter.",
        {"helpful first": _SACPO_02, "safe first": _SAFE_FIRST},
        (Part("reward, helpful first - safe first", _difference("reward", "helpful first", "safe first"), "same"),
         Part("safety, helpful first - safe first", _difference("utility", "helpful first", "safe first"), "same")),
        ("stated beta/lambda", "safe first"),
        note="true of exact optima; in the paper's own Table 3 orders differ at .01 (report published, sacpo/table3)",
    ),
    Claim(
        "sacpo-optimal", SACPO, "Theorem 1",
        "Two alignments one after the other reach the constrained optimum.",
        {"SACPO": _exact("sacpo", multipliers=None, beta_over_lambda=None, order="helpful_first",
                         safety_step__loss="dpo")},
        _optimal("SACPO"), ("exact",), over="every",
    ),
    Claim(
        "p-sacpo-interpolates", SACPO, "Section 6, Table 3 (q .25 to .75)",
        "A larger merging weight q makes P-SACPO safer and less helpful.",
        {"P-SACPO": _P_SACPO},
        (Part("safety, q = 0.75 - q = 0.25",
              _difference("utility", "P-SACPO", "P-SACPO", "p_sacpo q=0.75", "p_sacpo q=0.25")),
         Part("reward, q = 0.25 - q = 0.75",
              _difference("reward", "P-SACPO", "P-SACPO", "p_sacpo q=0.25", "p_sacpo q=0.75"))),
        ("P-SACPO",),
    ),
    Claim(
        "p-sacpo-is-sacpo", SACPO, "Section 6 (merging in place of training at another lambda)",
        "The merge at q does what SACPO trained at q times the conservative lambda does.",
        {"P-SACPO": _P_SACPO, "SACPO": _SACPO_02},
        (Part("reward, merge at q = 0.5 - SACPO", _difference("reward", "P-SACPO", "SACPO", "p_sacpo q=0.5"), "same"),
         Part("safety, merge at q = 0.5 - SACPO", _difference("utility", "P-SACPO", "SACPO", "p_sacpo q=0.5"), "same")),
        ("P-SACPO", "stated beta/lambda"),
        note="exact for log-linear policies; beta/lambda is 0.1 at q = 1, so 0.2 at q = 0.5",
    ),
    Claim(
        "p-sacpo-over-naive", SACPO, "Section 7, Table 3 (against merging DPO(H) and DPO(S))",
        "P-SACPO trades better than merging two policies that were aligned apart.",
        {"P-SACPO": _P_SACPO, "naive merge": _NAIVE},
        (Part("reward + safety, P-SACPO - naive merge, mean over q .25, .5, .75", _over_naive),),
        ("P-SACPO", "naive merge"),
        note="equal weights: both scores have a standard deviation near 1; in Table 3 the naive merge leads at q = .25",
    ),
    Claim(
        "sacpo-kto", SACPO, "Table 3 (DPO to KTO against DPO to DPO)",
        "KTO in the safety step gains less safety than DPO.",
        {"DPO": _SACPO_02, "KTO": _KTO},
        (Part("safety, DPO step - KTO step", _difference("utility", "DPO", "KTO")),),
        ("stated beta/lambda", "KTO safety step"),
        note="the same beta/lambda; the paper leaves the reason open",
    ),
    Claim(
        "can-unique", CAN, "Theorem 1 (i, iii)",
        "The dual function is strictly convex at its minimiser, which is thus the only one.",
        {"MoCAN": _exact("mocan", multipliers=None)},
        (Part("curvature of the dual at its minimiser", lambda at: at.exact("MoCAN", "bounds", "strong_convexity"),
              unit="score^2 / beta"),),
        ("exact",), over="every",
        note="a theorem: what could fail here is its condition, that safety varies among the answers to a prompt",
    ),
    Claim(
        "can-prediction", CAN, "Table 4",
        "The margin that the dual predicts before training is the one that MoCAN achieves.",
        {"MoCAN": _MOCAN},
        (Part("achieved - predicted margin",
              lambda at: at.gain("MoCAN", "utility") - at.predicted("MoCAN"), "same", MARGIN),),
        ("methods over thresholds",), over="every",
        note="the paper's criterion is the achieved interval; ours asks for the same within a stated tolerance",
    ),
    Claim(
        "can-feasible", CAN, "Theorems 3 and 5",
        "One alignment at the dual's multiplier keeps the constraint.",
        {"MoCAN": _MOCAN},
        (Part("achieved - requested margin", lambda at: at.slack("MoCAN"), "not_below", MARGIN),),
        ("methods over thresholds",), over="every",
        note="at a requested margin of 0.1 the tolerance is as large as what was asked; fewer seeds than a dozen could "
        "not decide on a smaller one",
    ),
    Claim(
        "can-optimal", CAN, "Lemma 2, Theorem 3",
        "One alignment at the dual's multiplier reaches the constrained optimum.",
        {"MoCAN": _exact("mocan", multipliers=None)},
        _optimal("MoCAN"), ("exact",), over="every",
    ),
    Claim(
        "can-frontier", CAN, "Fig. 3, Table 4",
        "A larger multiplier makes MoCAN safer and less helpful.",
        {"MoCAN": Role("mocan", _HANDBOOK, varies=_STATED)},
        (Part("safety per unit of lambda", _gain("utility", "MoCAN")),
         Part("reward lost per unit of lambda", _gain("reward", "MoCAN", -1.0))),
        ("stated multipliers",), over="slope", along=lambda at: at.setting("MoCAN", _STATED),
    ),
    Claim(
        "can-pecan-below", CAN, "Fig. 3, section 5",
        "PeCAN, which learns its scores from preferences, does less well than MoCAN at the same multiplier.",
        {"MoCAN": Role("mocan", _HANDBOOK, varies=_STATED), "PeCAN": Role("pecan", _HANDBOOK, varies=_STATED)},
        (Part("r + lambda g - beta KL, MoCAN - PeCAN",
              lambda at: _lagrangian(at, "MoCAN") - _lagrangian(at, "PeCAN")),),
        ("stated multipliers",),
        note="compared in what both maximise; thresholds of the two are in different units",
    ),
    Claim(
        "can-pecan-calibration", CAN, "Fig. 6",
        "The cause is calibration: where the labels give calibrated scores, PeCAN does as well as MoCAN.",
        {"MoCAN": _exact("mocan", multipliers=[0.7]), "PeCAN": _exact("pecan", multipliers=[0.7])},
        (Part("r + lambda g - beta KL, MoCAN - PeCAN, exact",
              lambda at: _exact_lagrangian(at, "MoCAN") - _exact_lagrangian(at, "PeCAN"), "same"),),
        ("exact, stated multiplier",),
        note="gold probabilities as labels, all answers listed; no proof that calibration is the only cause",
    ),
    Claim(
        "can-few-responses", CAN, "Fig. 4",
        "With few responses per prompt the dual's multiplier comes out too large.",
        {"8 responses": Role("dual", _HANDBOOK | {"method.dual.samples": 8}),
         "64 responses": Role("dual", _HANDBOOK | {"method.dual.samples": 64})},
        (Part("lambda of 8 responses - of 64", lambda at: at.multiplier("8 responses") - at.multiplier("64 responses"),
              unit="lambda"),),
        ("dual alone",),
    ),
    Claim(
        "caid-closer", CAID, "Tables 4 and 5, Fig. 1",
        "Multi-shot alignment ends closer to the requested margin than one-shot with as many pair visits.",
        {"MoCAN": _MOCAN, "MoCAID": _MOCAID},
        (Part("|achieved - requested|, MoCAN - MoCAID", lambda at: at.miss("MoCAN") - at.miss("MoCAID"),
              smallest=0.05),),
        ("methods over thresholds",),
    ),
    Claim(
        "caid-closer-exact", CAID, "Tables 4 and 5, Fig. 1",
        "The same without sampling error, on listed answers and noise-free labels.",
        {"MoCAN": _exact("mocan", multipliers=None, step__train__epochs=2),
         "MoCAID": _exact("mocaid", multipliers=None, step__train__epochs=0.5)},
        (Part("|achieved - requested|, MoCAN - MoCAID", lambda at: _exact_miss(at, "MoCAN") - _exact_miss(at, "MoCAID"),
              smallest=0.02),),
        ("exact", "exact, multi-shot"),
    ),
    Claim(
        "caid-own-start", CAID, "Tables 4 and 5, section 4 (one-shot as a warm start)",
        "The iterations bring the policy closer to the requested margin than their own one-shot start was.",
        {"MoCAID": _exact("mocaid", multipliers=None, step__train__epochs=0.5)},
        (Part("|achieved - requested|, first - last iterate",
              lambda at: _exact_miss(at, "MoCAID", FIRST) - _exact_miss(at, "MoCAID"), smallest=0.02),),
        ("exact, multi-shot",),
        note="the start has a quarter of the pair visits: this says that iterations help, not that they beat one long "
        "one; on seeds 0 to 4 it was seen before this page (README)",
    ),
    Claim(
        "caid-one-shot-slope", CAID, "Tables 4 and 5",
        "One-shot alignment falls short of small margins and overshoots large ones.",
        {"MoCAN": _MOCAN},
        (Part("slope of the achieved in the requested margin, less 1", lambda at: at.slack("MoCAN"), smallest=0.1,
              unit="slope"),),
        ("methods over thresholds",), over="slope", along=lambda at: at.requested("MoCAN"),
    ),
    Claim(
        "caid-reward", CAID, "Table 4",
        "At the same thresholds multi-shot alignment is also the more helpful.",
        {"MoCAN": _MOCAN, "MoCAID": _MOCAID},
        (Part("reward, MoCAID - MoCAN", _difference("reward", "MoCAID", "MoCAN")),),
        ("methods over thresholds",),
    ),
    Claim(
        "caid-two-closer", CAID, "Tables 6 to 8, Fig. 4 (a, b)",
        "With two constraints, too, multi-shot alignment ends closer to what was requested than one-shot.",
        {"MoCAN": _MOCAN, "MoCAID": _MOCAID},
        (Part("|achieved - requested| over both margins, MoCAN - MoCAID", _two_misses, smallest=0.05),),
        ("two constraints",), constraints=2,
        note="mean over the two utilities (safety and politeness stand for the paper's harmlessness and humor)",
    ),
    Claim(
        "caid-two-reward", CAID, "Fig. 4 (c)",
        "With two constraints multi-shot alignment is also the more helpful.",
        {"MoCAN": _MOCAN, "MoCAID": _MOCAID},
        (Part("reward, MoCAID - MoCAN", _difference("reward", "MoCAID", "MoCAN")),),
        ("two constraints",), constraints=2,
        note="in the paper at all fourteen pairs of thresholds",
    ),
    Claim(
        "caid-bounds", CAID, "Theorem 4",
        "One-shot alignment's distance from the optimum stays below the theorem's bound.",
        {"MoCAN": _exact("mocan", multipliers=None, step__train__epochs=2)},
        (Part("bound - R-OPT", lambda at: at.exact("MoCAN", "bounds", "one_shot_reward")
              - at.exact("MoCAN", "reward_optimality")),
         Part("bound - U-OPT", lambda at: at.exact("MoCAN", "bounds", "one_shot_utility")
              - at.exact("MoCAN", "utility_optimality"))),
        ("exact",), over="every",
        note="with the policy's own nu for the class's, which makes the bound smaller; far from tight, and Theorem "
        "3's for the multi-shot policy is infinite in some of these runs, which leaves nothing to test",
    ),
    Claim(
        "pd-dpo-feasible", PD_DPO, "Abstract; Theorem 1 (as its reviews tell)",
        "PD-DPO keeps the constraint, and trains and holds no more than two models for it.",
        {"PD-DPO": _PD_DPO},
        (Part("achieved - requested margin", lambda at: at.slack("PD-DPO"), "not_below", MARGIN),
         Part("2 - models trained", lambda at: 2.0 - at.cost("PD-DPO", "models_trained"), "not_below", 0.5, "models",
              counted=True),
         Part("2 - models held", lambda at: 2.0 - at.cost("PD-DPO", "models_in_memory_while_training"), "not_below",
              0.5, "models", counted=True)),
        ("methods over thresholds",), over="every",
    ),
    Claim(
        "pd-dpo-optimal", PD_DPO, "Theorem 1 (as its reviews tell)",
        "PD-DPO's last policy is nearly optimal among those that keep the constraint (its regret is small).",
        {"PD-DPO": _exact("pd_dpo")},
        _optimal("PD-DPO"), ("exact",), over="every",
    ),
    Claim(
        "pd-dpo-over-sft", PD_DPO, "v1, Fig. 1 (by its reviews)",
        "At some threshold PD-DPO is both more helpful and safer than the SFT policy.",
        {"PD-DPO": _PD_DPO},
        (Part("reward over SFT", _gain("reward", "PD-DPO")), Part("safety over SFT", _gain("utility", "PD-DPO"))),
        ("methods over thresholds",), over="some",
    ),
    Claim(
        "pd-dpo-rounds", PD_DPO, "Theorem 1 (a bound that falls with K, as its reviews tell)",
        "More rounds end closer to the requested margin.",
        {"K = 3": _PD_DPO, "K = 6": Role("pd_dpo", _HANDBOOK | {"method.rounds": 6})},
        (Part("|achieved - requested|, K = 3 less K = 6", lambda at: at.miss("K = 3") - at.miss("K = 6"),
              smallest=0.05),),
        ("methods over thresholds", "more rounds"),
        note="every round trains, so six rounds also visit twice as many pairs",
    ),
    Claim(
        "pd-dpo-bonus", PD_DPO, "O-PD-DPO, Theorem 2 (as its reviews tell)",
        "Where the offline data miss good answers, the exploration bonus brings online PD-DPO closer to the optimum.",
        {"bonus": _BONUS, "no bonus": _exact("online_pd_dpo", online__alpha_reward=0.0, online__alpha_cost=0.0)},
        (Part("Lagrangian gap of the last round, without - with",
              lambda at: at.exact("no bonus", "lagrangian_gap") - at.exact("bonus", "lagrangian_gap"), smallest=0.02),),
        ("online", "online, no bonus"),
        note="bonus in the losses, as the paper has it; on seeds 0 to 7 it was seen before this page (README)",
    ),
    Claim(
        "pd-dpo-online-rounds", PD_DPO, "Theorem 2 (as its reviews tell)",
        "Online PD-DPO comes closer to the optimum from its first to its last round.",
        {"bonus": _BONUS},
        (Part("Lagrangian gap, first - last round",
              lambda at: at.exact("bonus", "lagrangian_gap", row=FIRST) - at.exact("bonus", "lagrangian_gap"),
              smallest=0.02),),
        ("online",),
        note="the last round has no bonus, which by itself lowers the gap",
    ),
)  # fmt: skip
