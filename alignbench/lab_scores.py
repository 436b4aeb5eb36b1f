"""The lab's scoring: which stages a scorer's name stands for.

A registered name is a function of texts. A name that the configuration defines (`scorers`) stands for a table of
columns, whose models are artifacts: brought in by content, or trained on the run's own pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench import stages
from alignbench.architecture import lora_parameter_count, parameter_count
from alignbench.config import WORLD_UTILITIES, ColumnConfig
from alignbench.models import score_models
from alignbench.models.policy import fingerprint, is_hub_id, shape_of
from alignbench.scoring import LEARNED, REGISTERED, text_of, used_scorers
from alignbench.stages.measure import ScoreSpec
from alignbench.stages.proxy import ProxySpec
from alignbench.stages.scoring import AssessSpec, BringScorerSpec, ColumnSpec, ScoreColumnsSpec, TrainScorerSpec

if TYPE_CHECKING:
    from alignbench.lab import Lab, Node


def score_table(lab: Lab, rows: Node, scorer: str, *, table: str, label: str) -> Node:
    """Reward and utilities of a table's responses by a registered or a defined scorer.

    Args:
        lab: The lab.
        rows: Responses or pairs.
        scorer: Its name.
        table: "responses" or "pairs".
        label: Name of the stage.
    """
    definition = lab.config.scorers.get(scorer)
    if definition is None:
        return lab._run(stages.SCORE, ScoreSpec(scorer, table), {"responses": rows}, label)
    inputs, columns, roles = {"responses": rows}, [], dict[str, str]()
    for name, column in definition.columns.items():
        if column.kind == REGISTERED:
            columns.append(ColumnSpec(name, REGISTERED, str(column.source), column.larger_is, shift=column.shift))
            continue
        model = learned(lab, scorer, name) if column.kind == LEARNED else brought(lab, scorer, name)
        role = roles.setdefault(model.key, f"model_{len(roles)}")  # columns of one model share it
        inputs[role] = model
        text = model.identity.spec.tokens if column.kind == LEARNED else text_of(column)
        reading = (column.larger_is, column.read, column.label, column.shift)
        columns.append(ColumnSpec(name, column.kind, role, *reading, text, tuple(column.verdicts)))
    spec = ScoreColumnsSpec(tuple(columns), table, lab.config.hardware.dtype)
    return lab._run(stages.SCORE_COLUMNS, spec, inputs, label)


def brought(lab: Lab, scorer: str, name: str) -> Node:
    """The score model behind a column, from its folder or the hub; looked at before anything loads."""
    column, where = lab.config.scorers[scorer].columns[name], f"scorers.{scorer}.columns.{name}"
    source = (str(column.path), column.revision)
    if (*source, where) not in lab.scorer_identities:
        # a plan names what it would bring in; a run looks whether it can
        hub = lab.config.plan and is_hub_id(source[0])
        found = (fingerprint(*source), None) if hub else _identity(column, where)
        lab.scorer_identities[*source, where] = found
    content, folder = lab.scorer_identities[*source, where]
    lab.scorer_sources[content] = source
    # of one that is not here yet: as large as the policy
    shape = shape_of(str(folder or source[0]), lab.config.model.architecture)
    hints = {"shape": shape, "parameters": parameter_count(shape)}
    spec = BringScorerSpec(content, column.kind)
    return lab._run(stages.BRING_SCORER, spec, {}, f"{scorer} model for {name}", seed=0, hints=hints)


def _identity(column: ColumnConfig, where: str) -> tuple[str, Path | None]:
    """A score model's fingerprint and, where its files are here, their folder; they have been looked at then."""
    path = str(column.path)
    fingerprint = score_models.identify(path, column.revision, where)
    folder = score_models.cached_folder(path, str(column.revision), where) if is_hub_id(path) else Path(path)
    if folder is not None:
        score_models.check_format(folder, column.kind, where)
        score_models.check_meaning(folder, column.kind, column.larger_is, column.label, where)
    return fingerprint, folder


def learned(lab: Lab, scorer: str, name: str) -> Node:
    """The reward or cost model that this run trains for a column, on the reference's decoder and the run's pairs."""
    definition = lab.config.scorers[scorer]
    assert definition.train is not None  # by the definition's check
    column, model = definition.columns[name], lab.config.model
    score_type = score_models.COST if column.larger_is == "worse" else score_models.REWARD
    spec = TrainScorerSpec(
        objective=name,
        score_type=score_type,
        train=definition.train,
        lora=definition.lora,
        # as long a text as the policy's own
        tokens=dataclasses.replace(text_of(column), template=model.template, max_length=model.max_length),
        regularization=definition.regularization,
        dtype=lab.config.hardware.dtype,
        optimizer=lab.config.hardware.optimizer,
    )
    rank = definition.lora.rank
    hints = {"trainable": lora_parameter_count(lab._shape, definition.lora)} if rank else {}
    inputs = {"start": lab.reference(), "pairs": lab.labelled(lab.pairs(), name)}
    return lab._run(stages.TRAIN_SCORER, spec, inputs, f"{score_type} model {scorer} for {name}", hints=hints)


def assess(lab: Lab, scorer: str) -> Node | None:
    """How good a scorer's learned columns are on labelled pairs; None where none is learned."""
    definition = lab.config.scorers.get(scorer)
    columns = tuple(
        (name, score_models.COST if column.larger_is == "worse" else score_models.REWARD)
        for name, column in (definition.columns if definition else {}).items()
        if column.kind == LEARNED
    )
    if not columns:
        return None
    pairs = lab.pairs()
    inputs = {"pairs": pairs, "scores": lab.pair_scores(pairs, scorer)}
    if lab.config.dataset.world is not None:
        inputs["gold"] = lab.pair_scores(pairs, "gold")
    return lab._run(stages.ASSESS, AssessSpec(columns), inputs, f"assess {scorer}", seed=0)


def proxies(lab: Lab, evaluations: Mapping[str, Node], settings: Any) -> dict[str, dict[str, Node]]:
    """Of every configured scorer that the run uses: each row's gains by it and by gold. Empty without gold scores."""
    config = lab.config
    if config.dataset.world is None:
        return {}
    ev = config.evaluate
    names = dict.fromkeys(used_scorers(config, settings).values())
    found: dict[str, dict[str, Node]] = {}
    for scorer in (name for name in names if name in config.scorers):
        columns = tuple(c for c in ("reward", *WORLD_UTILITIES) if c in config.scorers[scorer].columns)
        spec = ProxySpec(columns, ev.level, ev.resamples)
        for row, node in evaluations.items():
            inputs = {role: node.inputs[role] for role in ("logprobs", "reference_logprobs")}
            for prefix, whose in (("", row), ("reference_", "sft")):
                responses = node.inputs[f"{prefix}responses"]
                inputs[f"{prefix}responses"] = responses
                for role, name in (("proxy", scorer), ("gold", "gold")):
                    inputs[f"{prefix}{role}"] = lab.score(responses, name, label=f"{whose} by {name}")
            found.setdefault(scorer, {})[row] = lab._run(stages.PROXY, spec, inputs, f"{scorer} against gold: {row}")
    return found


def assessments(lab: Lab, settings: Any) -> dict[str, Node]:
    """How good each scorer is that the run uses and has trained itself, on labelled pairs."""
    names = dict.fromkeys(used_scorers(lab.config, settings).values())
    found = {name: assess(lab, name) for name in names}
    return {name: node for name, node in found.items() if node is not None}
