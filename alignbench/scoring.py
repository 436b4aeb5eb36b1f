"""Scorers that a configuration defines (`scorers`, conf/scorers/): which are used, and whether they can work.

A scorer is a table of columns, `reward` and utilities, and each column has a source: a score model's folder or hub id,
a model that this run trains itself, or a registered function. Every column is larger = better in the end; whether the
source's own number is must be said (`larger_is`), because that is what goes wrong: a cost model ranks backwards.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from alignbench.data.schema import label_column
from alignbench.data.score_text import ScoreText
from alignbench.errors import ConfigError
from alignbench.judging.protocols import COLUMNS
from alignbench.models.scorers import find_scorer, scorer_names

if TYPE_CHECKING:
    from alignbench.config import ColumnConfig, Config, ScorerConfig

REGISTERED, LEARNED = "registered", "learned"
BEAVER, CLASSIFIER, JUDGE = "beaver", "classifier", "judge"
#: What can be read of each kind's raw output.
READS = {
    REGISTERED: ("score",),
    LEARNED: ("score",),
    BEAVER: ("score",),
    CLASSIFIER: ("score", "probability", "log_odds"),
    JUDGE: ("log_odds", "probability"),
}


def named_scorers(value: Any, where: str = "") -> dict[str, str]:
    """Every place below `value` (containers or settings objects) that names a scorer: its key, and the name."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if not isinstance(value, dict):
        return {}
    found: dict[str, str] = {}
    for key, inner in value.items():
        path = f"{where}.{key}" if where else str(key)
        named = key in ("scorer", "annotator") and isinstance(inner, str)
        found |= {path: inner} if named else named_scorers(inner, path)
    return found


def used_scorers(config: Config, settings: Any) -> dict[str, str]:
    """Every place of the configuration that names a scorer of this run, and the name."""
    found = {"evaluate.scorer": config.evaluate.scorer} | named_scorers(settings, "method")
    judge = config.judge
    if judge is not None and judge.backend == "scorer" and judge.scorer is not None:
        found["judge.scorer"] = judge.scorer
    return found


def check_name(config: Config, name: str, where: str) -> None:
    """Refuse a scorer that is neither registered nor defined in the configuration."""
    if name not in config.scorers and name not in scorer_names():
        known = ", ".join(sorted({*scorer_names(), *config.scorers}))
        raise ConfigError(
            f"unknown scorer {name!r}", where=where, mend=f"known: {known}; scorers=[...] adds others (conf/scorers/)"
        )


def columns_of(config: Config, name: str) -> tuple[str, ...] | None:
    """Names of a defined scorer's columns; None for a registered one, whose code knows."""
    return tuple(config.scorers[name].columns) if name in config.scorers else None


def check_scorers(config: Config, settings: Any) -> None:
    """Refuse definitions that contradict themselves, and used ones that cannot score this problem.

    Raises:
        ConfigError: the message holds the mend. Nothing is loaded, and no file is looked at.
    """
    used = used_scorers(config, settings)
    for place in ("evaluate.scorer", "judge.scorer"):  # a method looks at those of its own that it uses
        if place in used:
            check_name(config, used[place], place)
    for name, scorer in config.scorers.items():
        where = f"scorers.{name}"
        if name in scorer_names():
            raise ConfigError(f"there is a registered scorer {name!r} already", where=where, mend="another name")
        if not scorer.columns:
            raise ConfigError(f"the scorer {name!r} has no columns", where=f"{where}.columns", mend="add reward: ...")
        for column, source in scorer.columns.items():
            _check_column(source, f"{where}.columns.{column}")
    for place, name in used.items():
        if name in config.scorers:
            _check_use(config, name, config.scorers[name], place)


def _check_column(column: ColumnConfig, where: str) -> None:
    if column.kind not in READS:
        raise ConfigError(f"kind = {column.kind!r}", where=f"{where}.kind", mend=f"one of: {', '.join(READS)}")
    if column.larger_is not in ("better", "worse"):
        raise ConfigError(
            f"larger_is = {column.larger_is!r}",
            where=f"{where}.larger_is",
            mend="better (a reward), or worse (a cost: it is turned around, so that every column is larger = better)",
        )
    if column.read not in READS[column.kind]:
        raise ConfigError(
            f"read = {column.read!r} of a {column.kind}",
            where=f"{where}.read",
            mend=f"one of: {', '.join(READS[column.kind])}",
        )
    if not math.isfinite(column.shift):
        raise ConfigError(f"shift = {column.shift}", where=f"{where}.shift", mend="a finite number")
    has_model = column.kind in (BEAVER, CLASSIFIER, JUDGE)
    if has_model and not column.path:
        raise ConfigError(
            "no model is given",
            where=f"{where}.path",
            mend=f"{where}.path=FOLDER, or owner/name with {where}.revision",
        )
    if column.kind == REGISTERED:
        if column.larger_is != "better":
            raise ConfigError(
                "registered scorers give utilities, larger = better",
                where=f"{where}.larger_is",
                mend="larger_is: better",
            )
        find_scorer(str(column.source))
        return
    if column.kind == JUDGE and (len(column.verdicts) != 2 or "{response}" not in column.template):
        raise ConfigError(
            "a judge needs a template of its own, with {prompt} and {response}, and two verdicts: of what is worse or "
            "better (larger_is), and of the opposite",
            where=where,
            mend="see conf/scorers/judge.yaml",
        )
    text_of(column).check(where)


def text_of(column: ColumnConfig) -> ScoreText:
    """How a column's model is given its texts."""
    return ScoreText(column.template, column.append_eos, column.max_length)


def _check_use(config: Config, name: str, scorer: ScorerConfig, place: str) -> None:
    from alignbench.config import check_train

    where = f"scorers.{name}"
    wanted, other = ("reward", *config.constraint.utilities), "constrain other utilities"
    if place == "judge.scorer" and config.judge is not None:
        wanted = tuple(COLUMNS[criterion] for criterion in config.judge.criteria if criterion in COLUMNS)
        other = "fewer judge.criteria"
    absent = [column for column in wanted if column not in scorer.columns]
    if absent:
        raise ConfigError(
            f"{place} = {name}, which has no column {', '.join(absent)}",
            where=f"{where}.columns",
            mend=f"its columns are {', '.join(scorer.columns)}: add the others, or {other}",
        )
    for column, source in scorer.columns.items():
        if source.kind == REGISTERED and source.source == "gold" and config.dataset.world is None:
            raise ConfigError(
                "gold scores belong to the embedded world, and these are files",
                where=f"{where}.columns.{column}.source",
                mend="take this column from a model",
            )
    learned = [column for column, source in scorer.columns.items() if source.kind == LEARNED]
    if not learned:
        return
    if scorer.train is None:
        raise ConfigError(f"{', '.join(learned)} cannot be trained without settings", where=f"{where}.train",
                          mend="see conf/scorers/learned.yaml")  # fmt: skip
    check_train(scorer.train, f"{where}.train")
    if scorer.train.batch_size % config.hardware.processes:
        raise ConfigError(
            f"{scorer.train.batch_size} pairs per optimiser step cannot be divided among "
            f"{config.hardware.processes} processes",
            where=f"{where}.train.batch_size",
            mend=f"a multiple of {config.hardware.processes}",
        )
    if not (math.isfinite(scorer.regularization) and scorer.regularization >= 0):
        raise ConfigError(
            f"regularization = {scorer.regularization}", where=f"{where}.regularization", mend="a number >= 0"
        )
    lora = scorer.lora
    if lora.rank < 0 or not 0 <= lora.dropout < 1 or (lora.rank > 0 and not lora.targets):
        raise ConfigError(
            f"LoRA rank {lora.rank}, dropout {lora.dropout}, targets {list(lora.targets)} cannot train",
            where=f"{where}.lora",
            mend="rank >= 0 (0 trains all weights), 0 <= dropout < 1, and at least one target module name",
        )
    known = ("reward", *config.constraint.utilities, *(("safety", "politeness") if config.dataset.world else ()))
    for column in learned:
        if column not in known:
            raise ConfigError(
                f"nothing labels {column}: it would be learned from {label_column(column)}",
                where=f"{where}.columns.{column}",
                mend=f"columns that pairs are labelled for: {', '.join(dict.fromkeys(known))}",
            )
