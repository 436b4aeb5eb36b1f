"""Data from files or the hub: the typed schema of `dataset.files`, and the checks that need no row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from omegaconf import MISSING

from alignbench.data.layouts import Table, find_layout
from alignbench.errors import ConfigError

if TYPE_CHECKING:
    from alignbench.config import Config

#: Scorer of responses that carry their own scores.
DATA_SCORER = "data"
OVER_LONG = ("cut", "drop", "refuse")
RESPONSES_AS = ("samples", "answers", "pairs")


@dataclass
class SourceConfig:
    """One table of rows: a file, a pattern of files, a folder, or a hub id with a pinned revision; and its layout."""

    path: str | None = MISSING
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    layout: str = "rows"
    columns: list[str] = field(default_factory=list)
    labels: list[str] | None = None

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """(name that the layout expects, name in the source) of every renamed column."""
        pairs = [text.partition(":") for text in self.columns]
        return tuple(sorted((wanted.strip(), own.strip()) for wanted, _, own in pairs))


@dataclass
class FilesConfig:
    """Data of your own or of a paper: pairs or scored responses, demonstrations where SFT is wanted, prompts."""

    pairs: SourceConfig | None = None
    more_pairs: dict[str, SourceConfig] = field(default_factory=dict)
    responses: SourceConfig | None = None
    pairs_per_prompt: int = 16
    most_prompts: int | None = None
    responses_per_prompt: int | None = None
    responses_as: str = "samples"
    demonstrations: SourceConfig | None = None
    prompts: SourceConfig | None = None
    validation_share: float = MISSING
    test_share: float = MISSING
    validation: str = "strict"
    over_long: str = "cut"
    expected_pairs: int = 0
    expected_tokens: int = 0
    expected_prompts: int = 0

    def sources(self) -> Iterator[tuple[str, Table, SourceConfig]]:
        """(configuration key below dataset.files, table, source) of every table that is given."""
        if self.pairs is not None:
            yield "pairs", "pairs", self.pairs
        for name, source in self.more_pairs.items():
            yield f"more_pairs.{name}", "pairs", source
        if self.responses is not None:
            yield "responses", "responses", self.responses
        if self.demonstrations is not None:
            yield "demonstrations", "demonstrations", self.demonstrations
        if self.prompts is not None and self.prompts.path is not None:
            yield "prompts", "prompts", self.prompts

    @property
    def counted_pairs(self) -> float:
        """Pairs that a plan counts with; one of a prompt, where they are no scored responses'."""
        if self.most_prompts is None:
            return float(self.expected_pairs)
        return float(min(self.expected_pairs, self.most_prompts * self._pairs_of_a_prompt))

    @property
    def counted_prompts(self) -> float:
        """Distinct prompts that a plan counts with."""
        return self.counted_pairs / self._pairs_of_a_prompt

    @property
    def _pairs_of_a_prompt(self) -> int:
        return self.pairs_per_prompt if self.responses is not None else 1

    @property
    def answers_are_listed(self) -> bool:
        """Whether policies are weights on each prompt's responses."""
        return self.responses is not None and self.responses_as != "pairs"

    @property
    def has_prompt_set(self) -> bool:
        """Whether results are reported on a prompt set of its own."""
        return self.prompts is not None and self.prompts.path is not None


def labels_of(source: SourceConfig, objectives: tuple[str, ...]) -> tuple[str, ...]:
    """The objectives whose labels a table of pairs carries: as stated, or all of the problem's."""
    return objectives if source.labels is None else tuple(source.labels)


def check_files(files: FilesConfig, config: Config) -> None:
    """Refuse what cannot be read or used.

    Raises:
        ConfigError: before anything is read.
    """
    shares = (files.validation_share, files.test_share)
    if min(shares) < 0 or sum(shares) >= 1:
        raise ConfigError(
            f"validation_share + test_share = {sum(shares):g} leaves nothing to train on",
            where="dataset.files",
            mend="both are fractions of the distinct prompts, for instance 0.05 and 0.1",
        )
    choices = {"validation": ("strict", "lenient"), "over_long": OVER_LONG, "responses_as": RESPONSES_AS}
    for name, known in choices.items():
        if getattr(files, name) not in known:
            raise ConfigError(
                f"dataset.files.{name} = {getattr(files, name)!r} is unknown",
                where=f"dataset.files.{name}",
                mend="one of: " + ", ".join(known),
            )
    _check_tables(files)
    if config.evaluate.scorer == "gold" and config.data is None:
        raise ConfigError(
            "the gold scorer knows the embedded world only; files have no gold scores",
            where="evaluate.scorer",
            mend="evaluate=unscored (KL, length and win counts without scores), evaluate=data where responses carry "
            "scores, or dataset=handbook",
        )
    if config.model.path is None:
        raise ConfigError(
            "files need a model with a tokenizer of its own; this model is built from the embedded world",
            where="model",
            mend="model=folder model.path=/path/to/a/transformers/folder",
        )
    if config.model.sft is not None and config.data is None and files.demonstrations is None:
        raise ConfigError(
            "model.sft asks for supervised fine-tuning, but the data set has no demonstrations",
            where="dataset.files.demonstrations",
            mend="dataset=files_with_demonstrations dataset.files.demonstrations.path=..., "
            "or model.sft=null to start from the model as it is",
        )


def _check_tables(files: FilesConfig) -> None:
    given = list(files.sources())
    if not any(table != "prompts" for _, table, _ in given):
        raise ConfigError(
            "the data set has no pairs, no scored responses and no demonstrations",
            where="dataset.files",
            mend="dataset=files dataset.files.pairs.path=..., dataset=responses or dataset=instructions",
        )
    if files.responses is not None and (files.pairs is not None or files.more_pairs):
        raise ConfigError(
            "pairs are made from the scored responses, and others are given as well",
            where="dataset.files.pairs, dataset.files.responses",
            mend="leave one of the two null",
        )
    for name, least in {"pairs_per_prompt": 1, "most_prompts": 1, "responses_per_prompt": 2}.items():
        value = getattr(files, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} = {value}", where=f"dataset.files.{name}", mend=f"at least {least}")
    if files.responses_per_prompt is not None and files.responses is None:
        raise ConfigError(
            "responses_per_prompt is of scored responses, and there are none",
            where="dataset.files.responses_per_prompt",
            mend="null; of pairs, dataset.files.most_prompts draws prompts with all of their pairs",
        )
    if files.has_prompt_set and (files.answers_are_listed or files.test_share > 0):
        raise ConfigError(
            "a prompt set is reported on in place of held-out prompts, and its prompts have no listed responses",
            where="dataset.files.prompts",
            mend="dataset.files.test_share=0 (with responses_as=pairs), or dataset.files.prompts.path=null",
        )
    for name, table, source in given:
        find_layout(table, source.layout, f"dataset.files.{name}.layout")
        if not all(all(pair) for pair in source.renamed):
            raise ConfigError(
                f"columns = {list(source.columns)}",
                where=f"dataset.files.{name}.columns",
                mend="NAME:NAME_IN_THE_SOURCE for each, as in [prompt:question]",
            )
        if source.labels is not None and (table != "pairs" or not source.labels):
            raise ConfigError(
                f"labels = {list(source.labels)} of a table of {table}",
                where=f"dataset.files.{name}.labels",
                mend="of pairs: the objectives that they are labelled for, as in [reward]; else null",
            )


def check_data_scorer(name: str, where: str, config: Config) -> None:
    """Refuse the data set's own scores where there are none, or where responses are asked for that have none.

    Raises:
        ConfigError: With what would have scores.
    """
    files = config.dataset.files
    if name != DATA_SCORER or (files is not None and files.answers_are_listed):
        return
    raise ConfigError(
        "the scorer 'data' is the scores that responses in files carry, and "
        + ("a policy's own responses have none" if files is not None and files.responses else "there are none here"),
        where=where,
        mend="dataset=responses with dataset.files.responses_as=samples: policies are then weights on those responses",
    )
