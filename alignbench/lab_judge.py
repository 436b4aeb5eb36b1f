"""Judging in a run: which pairs of policies are judged, and what the record keeps of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignbench import stages
from alignbench.architecture import parameter_count
from alignbench.errors import DataError, ModelError
from alignbench.jsonio import canonical
from alignbench.judging.local import LocalJudge
from alignbench.judging.ratings import Pairing, ratings, sequential_elo
from alignbench.judging.server import ServerJudge
from alignbench.judging.settings import JudgeConfig, protocol_of
from alignbench.lab import Lab, Node
from alignbench.models.policy import fingerprint, shape_of
from alignbench.stages.judge import JudgeSpec, ScorerJudge, VerdictsSpec


@dataclass(frozen=True)
class Contest:
    """Two rows of a run, and the verdicts on their answers."""

    row: str
    opponent: str
    verdicts: Node


def contests(lab: Lab, evaluations: Mapping[str, Node]) -> list[Contest]:
    """Judge the rows' answers in pairs: each against the reference, or all against all; none without a judge.

    Args:
        lab: Runs or plans.
        evaluations: Evaluation of each row, the reference's first.
    """
    judge = lab.config.judge
    if judge is None:
        return []
    names = list(evaluations)
    if judge.opponents == "all":
        pairs = [(later, earlier) for earlier, later in itertools.combinations(names, 2)]
    else:
        pairs = [(name, names[0]) for name in names[1:]]
    return [
        Contest(row, opponent, _judged(lab, judge, row, opponent, evaluations))
        for row, opponent in pairs
        # a policy is not judged against itself
        if evaluations[row].inputs["responses"].key != evaluations[opponent].inputs["responses"].key
    ]


def _judged(lab: Lab, judge: JudgeConfig, row: str, opponent: str, evaluations: Mapping[str, Node]) -> Node:
    protocol, ev = protocol_of(judge), lab.config.evaluate
    own, other = (evaluations[name].inputs["responses"] for name in (row, opponent))
    inputs = {"responses": own, "opponent_responses": other}
    hints: dict[str, Any] = {"prompts": float(lab._prompts_of(ev.split)), "asked": float(len(judge.criteria))}
    who: ScorerJudge | LocalJudge | ServerJudge
    if judge.backend == "scorer":
        assert judge.scorer is not None  # by validation
        who = ScorerJudge(judge.tie_margin)
        inputs |= {
            "scores": lab.score(own, judge.scorer, label=f"{row} with {judge.scorer}"),
            "opponent_scores": lab.score(other, judge.scorer, label=f"{opponent} with {judge.scorer}"),
        }
    else:
        hints["asked"] *= len(protocol.orders) * protocol.repeats
        who = _local(judge, lab.config.hardware.dtype) if judge.backend == "local" else _server(judge)
    if isinstance(who, LocalJudge):
        assert judge.local is not None
        shape = shape_of(judge.local.path, lab.config.model.architecture)
        hints |= {"shape": shape, "parameters": parameter_count(shape)}
    spec = JudgeSpec.of(who, protocol, judge.criteria, judge.samples_per_prompt)
    between = f"{row} against {opponent}"
    # a judge's answers depend on no seed of the run but through the answers that it reads
    judged = lab._run(stages.JUDGE, spec, inputs, f"judge {between}", seed=0, hints=hints)
    last: dict[str, Node] = {"judged": judged, "responses": own}
    if lab.config.dataset.world is not None and (judge.backend != "scorer" or judge.scorer != "gold"):
        last["gold"] = lab.score(own, "gold", label=f"{row} with gold")
        last["opponent_gold"] = lab.score(other, "gold", label=f"{opponent} with gold")
    return lab._run(
        stages.VERDICTS, VerdictsSpec(protocol.rule, protocol.tie, ev.level, ev.resamples), last, f"verdicts {between}"
    )


def _local(judge: JudgeConfig, dtype: str) -> LocalJudge:
    local = judge.local
    assert local is not None  # by validation
    try:
        content = fingerprint(local.path, local.revision)
    except ModelError as error:
        where = error.where.replace("model.", "judge.local.")
        mend = error.mend.replace("model.", "judge.local.")
        raise ModelError(error.what.replace("model.path", "judge.local.path"), where=where, mend=mend) from None
    return LocalJudge(content, local.template, local.max_length, local.read, local.least_mass, dtype)


def _server(judge: JudgeConfig) -> ServerJudge:
    server = judge.server
    assert server is not None  # by validation
    return ServerJudge(server.url, server.model, canonical(dict(server.extra)))


def entry(judge: JudgeConfig, found: Sequence[Contest], *, level: float, resamples: int, seed: int) -> dict[str, Any]:
    """What a record keeps of the judging: who judged and how, every contest with its counts, and ratings by criterion.

    Args:
        judge: The group.
        found: The run's contests.
        level: Two-sided coverage of the ratings' intervals.
        resamples: Their bootstrap draws.
        seed: Of these draws and of Elo's orders.
    """
    protocol = protocol_of(judge)
    rows = [
        {
            "row": contest.row,
            "opponent": contest.opponent,
            "criterion": criterion,
            "artifact": contest.verdicts.inputs["judged"].key,
            "cost": contest.verdicts.inputs["judged"].result.manifest["cost"],
            **verdicts,
        }
        for contest in found
        for criterion, verdicts in contest.verdicts.result.json("verdicts.json").items()
    ]
    return {
        "judge": judge.name,
        "backend": judge.backend,
        "protocol": {"name": protocol.name, "source": protocol.source, "rule": protocol.rule, "tie": protocol.tie},
        "contests": rows,
        "ratings": {
            criterion: rated(rows, criterion, level=level, resamples=resamples, seed=seed, elo=judge.elo)
            for criterion in (judge.criteria if rows else ())
        },
    }


def rated(
    rows: Sequence[Mapping[str, Any]], criterion: str, *, level: float, resamples: int, seed: int, elo: bool
) -> dict[str, Any]:
    """Ratings of the policies in some contests, the first opponent at 1000, or why there are none."""
    own = [row for row in rows if row["criterion"] == criterion]
    anchor = own[0]["opponent"]

    def pairings(column: str) -> list[Pairing]:
        return [
            Pairing(row["row"], row["opponent"], dict(zip(row["per_prompt"]["prompt_id"], counts, strict=True)))
            for row in own
            for counts in [[tuple(triple) for triple in row["per_prompt"][column]]]
        ]

    result: dict[str, Any] = {"anchor": anchor}
    try:
        found = ratings(pairings("verdicts"), anchor=anchor, level=level, resamples=resamples, seed=seed)
        result["bradley_terry"] = {name: value.to_dict() for name, value in found.items()}
    except DataError as error:
        result["none"] = error.what
    if elo and any(sum(map(sum, row["per_prompt"]["games"])) for row in own):
        by_name = sequential_elo(pairings("games"), anchor=anchor, seed=seed)
        result["sequential_elo"] = {name: {"mean": value.mean, "std": value.std} for name, value in by_name.items()}
    return result
