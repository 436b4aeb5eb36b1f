"""Typed schema of every configuration group, and the checks that run before anything loads.

Hydra composes `conf/` onto these dataclasses: an unknown key, a wrong type or an unset `???` is refused
there. `validate` then checks what no single field can say (thresholds against utilities, a data set against
its scorer, a LoRA reference, ...). The keys of a method's YAML belong to the method: its own settings
dataclass (registered in `alignbench.methods`) is their schema.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignbench.architecture import ArchitectureConfig, check_architecture
from alignbench.benchmark import BenchmarkConfig, check_benchmark
from alignbench.data.templates import check_template
from alignbench.data.text_measures import normalised
from alignbench.dataset import FilesConfig, check_data_scorer, check_files
from alignbench.errors import ConfigError
from alignbench.hardware import HardwareConfig, check_hardware
from alignbench.judging.settings import JudgeConfig, check_judge, scientific_part
from alignbench.problem import Form, Problem
from alignbench.scoring import check_scorers, named_scorers


@dataclass
class TrainConfig:
    """Optimiser settings of one training stage; every field changes the numbers and is part of its key."""

    learning_rate: float = MISSING
    epochs: float = MISSING
    batch_size: int = MISSING
    schedule: str = "cosine"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8


@dataclass
class SamplingConfig:
    """How responses are drawn from a policy."""

    max_new_tokens: int = MISSING
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass
class LoraConfig:
    """Low-rank adaptation; `rank: 0` trains every weight."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)


@dataclass
class ModelConfig:
    """The base model, its tokens and its supervised fine-tuning."""

    name: str = MISSING
    path: str | None = None
    revision: str | None = None
    not_finite: str = "refuse"
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    template: str = MISSING
    max_length: int = MISSING
    max_prompt_length: int = MISSING
    sft: TrainConfig | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    lora_for_sft: bool = False


@dataclass
class WorldConfig:
    """The embedded benchmark: its sizes, and how its preference pairs are drawn from the reference."""

    train_prompts: int = MISSING
    validation_prompts: int = MISSING
    test_prompts: int = MISSING
    risky_fraction: float = MISSING
    demonstrations: int = MISSING
    pairs_per_prompt: int = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    answers: int = 0
    mild_share: float = 0.25
    uncovered: list[str] = field(default_factory=list)


@dataclass
class DatasetConfig:
    """Either the embedded world or files; never both."""

    name: str = MISSING
    seed: int = MISSING
    world: WorldConfig | None = None
    files: FilesConfig | None = None


@dataclass
class ConstraintConfig:
    """The constrained problem: thresholds on utilities in one of three forms, and the KL weight."""

    form: str = MISSING
    utilities: list[str] = MISSING
    thresholds: list[float] = MISSING
    beta: float = MISSING


@dataclass
class EvaluateConfig:
    """What is measured, on which prompts, with how many samples and which interval."""

    scorer: str = MISSING
    split: str = MISSING
    prompts: int | None = None
    samples_per_prompt: int = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    level: float = 0.95
    resamples: int = 2000
    refusal_phrases: list[str] = field(default_factory=list)
    refusal_words: int = 30
    every_steps: int = MISSING
    every_examples: int | None = 256


@dataclass
class ColumnConfig:
    """Where one column of a scorer comes from; `alignbench.scoring` checks it."""

    kind: str = MISSING
    larger_is: str = MISSING
    source: str | None = None
    path: str | None = None
    revision: str | None = None
    template: str = "plain"
    append_eos: bool = True
    max_length: int = 512
    read: str = "score"
    label: str | None = None
    shift: float = 0.0
    verdicts: list[str] = field(default_factory=list)


@dataclass
class ScorerConfig:
    """A scorer made of columns, and how the learned ones among them are trained."""

    columns: dict[str, ColumnConfig] = field(default_factory=dict)
    train: TrainConfig | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)
    regularization: float = 0.0


@dataclass
class TrackingConfig:
    """Weights & Biases as a mirror of the record."""

    mode: str = MISSING
    project: str = "alignbench"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """The whole configuration of one run."""

    method: Any = MISSING
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    constraint: ConstraintConfig = MISSING
    hardware: HardwareConfig = MISSING
    evaluate: EvaluateConfig = MISSING
    scorers: dict[str, ScorerConfig] = field(default_factory=dict)
    judge: JudgeConfig | None = None
    benchmark: BenchmarkConfig | None = None
    tracking: TrackingConfig = MISSING
    seed: int = MISSING
    scale: str = "paper"
    plan: bool = False
    data: str | None = None
    output_dir: str = MISSING
    store_dir: str = MISSING
    tuned_by: str | None = None


# Keys that change no number: they stay out of the run id, so that a plan, another folder or another
# tracking mode name the same run.
_OUTSIDE_RUN_ID = ("hydra", "scale", "plan", "data", "output_dir", "store_dir", "tracking", "tuned_by")
_HARDWARE_IN_RUN_ID = ("dtype", "optimizer", "generator")
# What the embedded world scores and labels besides the reward.
WORLD_UTILITIES = ("safety", "politeness")


def recorded(config: DictConfig) -> dict[str, Any]:
    """The whole configuration for the record, as plain containers, without Hydra's own part and local folders."""
    return _plain(config, ("hydra", "output_dir", "store_dir"))


def scientific(config: DictConfig) -> dict[str, Any]:
    """The part of a configuration that decides the numbers, as plain containers (unset values as "???")."""
    science = _plain(config, _OUTSIDE_RUN_ID)
    if isinstance(science.get("evaluate"), dict):
        for name in ("every_steps", "every_examples"):  # how training is looked at moves nothing
            science["evaluate"].pop(name, None)
    if isinstance(science.get("hardware"), dict):
        science["hardware"] = {k: science["hardware"].get(k) for k in _HARDWARE_IN_RUN_ID}
        if science["hardware"]["optimizer"] in (None, "adamw"):  # what it always was keeps its id
            del science["hardware"]["optimizer"]
        if science["hardware"]["generator"] in (None, "built_in"):
            del science["hardware"]["generator"]
    if isinstance(science.get("model"), dict):  # what a plan counts with; a model that is built has one family only
        (science["model"].get("architecture") or {}).pop("family", None)
    # without them ids are what they were before there were judges and benchmarks
    judge, benchmark = science.pop("judge", None), science.pop("benchmark", None)
    if isinstance(judge, dict):
        science["judge"] = scientific_part(judge)
    if isinstance(benchmark, dict):
        science["benchmark"] = benchmark
    used = named_scorers(science)  # definitions that lie about decide nothing
    scorers = {name: one for name, one in (science.pop("scorers", None) or {}).items() if name in used.values()}
    return science | ({"scorers": scorers} if scorers else {})


def _plain(config: DictConfig, without: tuple[str, ...]) -> dict[str, Any]:
    # in place, where interpolations find their root; a copy would also take most of the time of a plan
    plain: dict[str, Any] = {}
    for key in map(str, config):
        if key in without:
            continue
        node = "???" if OmegaConf.is_missing(config, key) else config[key]
        plain[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return plain


def run_id(config: DictConfig) -> str:
    """A run's name: method, data set and a hash of the resolved configuration and seed.

    The same configuration has the same id on every machine and in every order of overrides.
    """
    science = scientific(config)
    text = json.dumps(_one_spelling(science), sort_keys=True, separators=(",", ":"), default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]

    def name(group: str) -> str:
        node = science.get(group)
        return str(node.get("name", group)) if isinstance(node, dict) else group

    return f"{name('method')}-{name('dataset')}-s{science.get('seed', 0)}-{digest}"


def _one_spelling(value: Any) -> Any:
    """The same value with whole floats as integers: a method's `epochs=2` and `epochs=2.0` are one run."""
    if isinstance(value, dict):
        return {key: _one_spelling(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_one_spelling(child) for child in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def resolve(config: DictConfig) -> tuple[Config, Any]:
    """Turn a composed configuration into typed objects.

    Returns:
        The frozen `Config`, and the method's own settings object.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or a required one is unset.
    """
    from alignbench.methods import METHODS, find_method

    # before the unset keys: half of the other source would otherwise be asked for
    _check_one_source(OmegaConf.select(config, "dataset.world"), OmegaConf.select(config, "dataset.files"))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(
            f"{len(missing)} required setting(s) not given: {', '.join(missing)}",
            where="the composed configuration",
            mend=_mend_missing(missing),
        )
    name = OmegaConf.select(config, "method.name")
    method = find_method(str(name))
    try:
        # resolved first: in the method's own schema there is no root that an interpolation could point to
        stated = OmegaConf.to_container(config.method, resolve=True)
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(method.settings), stated))
    except OmegaConfBaseException as error:
        known = ", ".join(f.name for f in dataclasses.fields(method.settings))
        raise ConfigError(
            f"method '{name}': {str(error).splitlines()[0]}",
            where=f"conf/method/{name}.yaml or an override method.*",
            mend=f"its settings are: {known}. Methods: {', '.join(sorted(METHODS))}.",
        ) from None
    # plain containers: merged as typed nodes, keys forced in with + would pass unseen
    plain = _plain(config, ("hydra", "method"))
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config(method=None)), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(
            str(error).splitlines()[0],
            where=f"configuration key {getattr(error, 'full_key', None) or '(unknown)'}",
            mend="compare with the group's file in conf/; every key there has a comment.",
        ) from None
    if not isinstance(typed, Config):
        raise TypeError("the configuration did not resolve to Config")
    return typed, settings


def _mend_missing(missing: list[str]) -> str:
    example = {
        "constraint.thresholds": "constraint.thresholds=[1.0]",
        "constraint.beta": "constraint.beta=0.5",
        "model.path": "model.path=/path/to/a/transformers/folder",
        "dataset.files.pairs.path": "dataset.files.pairs.path=pairs.jsonl",
        "judge.local.path": "judge.local.path=/path/to/a/transformers/folder",
        "judge.server.url": "judge.server.url=http://localhost:8000/v1",
        "benchmark.path": "benchmark.path=TruthfulQA.csv",
        "dataset.files.responses.path": "dataset.files.responses.path=responses.jsonl",
        "dataset.files.demonstrations.path": "dataset.files.demonstrations.path=demonstrations.jsonl",
    }
    mend = "add " + " ".join(example.get(key, f"{key}=VALUE") for key in missing) + " to the command"
    fine_tuned = any(key.startswith("model.sft.") for key in missing)
    return mend + (", or model.sft=null where the model is already fine-tuned" if fine_tuned else "")


def validate(config: Config, settings: Any) -> None:
    """Cross-field checks; nothing has been loaded yet.

    Raises:
        ConfigError: settings contradict each other; the message holds the mend.
    """
    if config.data not in (None, "show"):
        raise _unknown("data", config.data, ("show", "null for a run"))
    problem_of(config.constraint)
    _check_model(config.model, "model")
    _check_dataset(config)
    if config.data == "show":  # nothing below is used
        return
    check_hardware(config.hardware)
    _check_shares(config.hardware.processes, {"model": config.model, "method": settings})
    _check_evaluation(config)
    check_scorers(config, settings)
    check_benchmark(config.benchmark)
    if config.judge is not None:
        samples, embedded = config.evaluate.samples_per_prompt, config.dataset.world is not None
        check_judge(config.judge, samples=samples, embedded=embedded)
    if config.tracking.mode not in ("online", "offline", "disabled"):
        raise _unknown("tracking.mode", config.tracking.mode, ("online", "offline", "disabled"))
    if hasattr(settings, "check"):
        settings.check(config)


def problem_of(constraint: ConstraintConfig) -> Problem:
    """The constrained problem that a configuration states; its own checks raise ConfigError."""
    form = cast(Form, constraint.form)  # Problem converts it, and lists the known ones
    try:
        return Problem(constraint.beta, form, tuple(constraint.utilities), tuple(constraint.thresholds))
    except ConfigError as error:
        where = error.where.replace("problem.", "constraint.")
        raise ConfigError(error.what, where=where, mend=error.mend) from None


def check_train(train: TrainConfig, where: str) -> None:
    """Refuse optimiser settings that cannot train (`where` is their configuration key)."""
    rules = {
        "learning_rate": 0 < train.learning_rate < math.inf,
        "epochs": train.epochs > 0,
        "batch_size": train.batch_size >= 1,
        "warmup_ratio": 0 <= train.warmup_ratio < 1,
        "weight_decay": train.weight_decay >= 0,
        "max_grad_norm": train.max_grad_norm > 0,
        "adam_beta1": 0 <= train.adam_beta1 < 1,
        "adam_beta2": 0 <= train.adam_beta2 < 1,
        "adam_eps": train.adam_eps > 0,
    }
    for name, good in rules.items():
        if not good:
            raise ConfigError(
                f"{where}.{name} = {getattr(train, name)} is out of range",
                where=f"{where}.{name}",
                mend="learning_rate, epochs, batch_size, max_grad_norm and adam_eps are positive, weight_decay is not "
                "negative, warmup_ratio and the betas lie in [0, 1)",
            )
    if train.schedule not in ("cosine", "linear", "constant"):
        raise _unknown(f"{where}.schedule", train.schedule, ("cosine", "linear", "constant"))


def _unknown(key: str, value: object, known: tuple[str, ...]) -> ConfigError:
    return ConfigError(f"{key} = {value!r} is unknown", where=key, mend="one of: " + ", ".join(known))


def _check_one_source(world: object, files: object) -> None:
    if (world is None) == (files is None):
        raise ConfigError(
            "a data set is either the embedded world or files: exactly one of dataset.world, dataset.files",
            where="dataset",
            mend="choose dataset=handbook, or dataset=files dataset.files.pairs.path=... "
            "(debug=tiny shrinks the embedded world, and belongs to no other data set)",
        )


def _check_dataset(config: Config) -> None:
    data = config.dataset
    _check_one_source(data.world, data.files)
    if data.files is not None:
        check_files(data.files, config)
    if data.world is not None:
        for name in ("train_prompts", "test_prompts", "demonstrations", "pairs_per_prompt"):
            if getattr(data.world, name) < 1:
                raise ConfigError(f"{name} must be at least 1", where=f"dataset.world.{name}", mend="raise it")
        _check_sampling(data.world.sampling, "dataset.world.sampling", config.model)
        _check_listed(data.world)
        unknown = [name for name in config.constraint.utilities if name not in WORLD_UTILITIES]
        if unknown:
            raise ConfigError(
                f"the embedded world has no utility {', '.join(unknown)}: nothing scores or labels it",
                where="constraint.utilities",
                mend=f"choose among: {', '.join(WORLD_UTILITIES)}",
            )


def _check_listed(world: WorldConfig) -> None:
    from alignbench.worlds.enumerable import FEATURES, MILD_SHARE

    if world.answers not in (0, *range(2, 65)):
        raise ConfigError(
            f"{world.answers} listed answers per prompt",
            where="dataset.world.answers",
            mend="0 (free text), or 2 to 64",
        )
    if not 0 < world.mild_share < 1 or (world.mild_share != MILD_SHARE and not world.answers):
        raise ConfigError(
            f"mild_share = {world.mild_share}",
            where="dataset.world.mild_share",
            mend=f"above 0 and below 1, with listed answers (dataset=enumerable) only; elsewhere {MILD_SHARE}",
        )
    unknown = sorted(set(world.uncovered) - set(FEATURES))
    if unknown or (world.uncovered and not world.answers):
        raise ConfigError(
            f"uncovered = {list(world.uncovered)} leaves nothing out",
            where="dataset.world.uncovered",
            mend=f"features of listed answers (dataset=enumerable): {', '.join(sorted(FEATURES))}",
        )


def _check_sampling(sampling: SamplingConfig, where: str, model: ModelConfig) -> None:
    if sampling.temperature <= 0 or not 0 < sampling.top_p <= 1 or sampling.max_new_tokens < 1:
        raise ConfigError(
            f"temperature {sampling.temperature}, top_p {sampling.top_p}, "
            f"max_new_tokens {sampling.max_new_tokens} cannot sample",
            where=where,
            mend="temperature > 0, 0 < top_p <= 1, max_new_tokens >= 1",
        )
    if model.max_prompt_length + sampling.max_new_tokens > model.max_length:
        raise ConfigError(
            f"a prompt of {model.max_prompt_length} tokens plus {sampling.max_new_tokens} new ones "
            f"exceeds model.max_length = {model.max_length}",
            where=f"{where}.max_new_tokens",
            mend="raise model.max_length or lower max_new_tokens; longer texts could not be scored whole",
        )


def _check_model(model: ModelConfig, where: str) -> None:
    if not 0 < model.max_prompt_length < model.max_length:
        raise ConfigError(
            f"max_prompt_length {model.max_prompt_length} must lie between 1 and max_length {model.max_length} - 1",
            where=f"{where}.max_prompt_length",
            mend="leave room for at least one response token",
        )
    try:
        check_template(model.template)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{where}.template", mend=error.mend) from None
    if model.not_finite not in ("refuse", "zero"):
        raise _unknown(f"{where}.not_finite", model.not_finite, ("refuse", "zero"))
    check_architecture(model.architecture, f"{where}.architecture", built=model.path is None)
    if model.sft is not None:
        check_train(model.sft, f"{where}.sft")
    elif model.path is None:
        raise ConfigError(
            f"{where}.path is not given, and a model built from nothing needs supervised fine-tuning",
            where=f"{where}.path",
            mend=f"add {where}.path=/path/to/a/transformers/folder, or keep {where}.sft to build a model",
        )
    if model.path is None:
        _check_built(model, where)
    lora = model.lora
    if lora.rank < 0 or not 0 <= lora.dropout < 1 or (lora.rank > 0 and not lora.targets):
        raise ConfigError(
            f"LoRA rank {lora.rank}, dropout {lora.dropout}, targets {list(lora.targets)} cannot train",
            where=f"{where}.lora",
            mend="rank >= 0 (0 trains all weights), 0 <= dropout < 1, and at least one target module name",
        )


def _check_built(model: ModelConfig, where: str) -> None:
    """A model built from nothing: a shape that exists, long enough, all of its weights trained by SFT."""
    if model.max_length > model.architecture.max_positions:
        raise ConfigError(
            f"max_length {model.max_length} exceeds the model's {model.architecture.max_positions} positions",
            where=f"{where}.max_length",
            mend=f"lower it, or raise {where}.architecture.max_positions",
        )
    if model.lora_for_sft and model.lora.rank > 0:
        raise ConfigError(
            "adapters on random weights learn nothing: a model built from nothing needs SFT of all weights",
            where=f"{where}.lora_for_sft",
            mend=f"{where}.lora_for_sft=false, or give {where}.path",
        )


def _check_shares(processes: int, where: dict[str, Any]) -> None:
    """Every optimiser step must divide among the processes."""
    for name, value in where.items():
        if isinstance(value, TrainConfig) and value.batch_size % processes:
            what = f"{value.batch_size} examples per optimiser step cannot be divided among {processes} processes"
            raise ConfigError(what, where=f"{name}.batch_size", mend=f"a multiple of {processes}, or other processes")
        if dataclasses.is_dataclass(value):
            _check_shares(processes, {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)})


def check_prompts(most: int | None, where: str, config: Config) -> None:
    """Refuse a number of prompts that draws none, and one where every listed prompt is used."""
    world, files = config.dataset.world, config.dataset.files
    listed = world.answers > 0 if world is not None else files is not None and files.answers_are_listed
    if most is not None and (most < 1 or listed):
        raise ConfigError(
            f"prompts = {most}" + (", and where answers are listed all prompts are used" if listed else ""),
            where=where,
            mend="null" if listed else "at least 1, or null for all",
        )


def _check_evaluation(config: Config) -> None:
    ev = config.evaluate
    check_prompts(ev.prompts, "evaluate.prompts", config)
    check_data_scorer(ev.scorer, "evaluate.scorer", config)
    if ev.split not in ("validation", "test"):
        raise ConfigError(
            f"evaluate.split = {ev.split!r}: a result is reported on prompts that trained nothing",
            where="evaluate.split",
            mend="evaluate.split=test (or validation while choosing hyper-parameters)",
        )
    if ev.refusal_words < 0 or not all(map(normalised, ev.refusal_phrases)):
        raise ConfigError(
            f"refusal_words {ev.refusal_words}, refusal_phrases {list(ev.refusal_phrases)}",
            where="evaluate",
            mend="at least 0 words, and phrases with a word in each",
        )
    if not 0 < ev.level < 1 or ev.resamples < 100 or ev.samples_per_prompt < 1 or ev.every_steps < 0:
        raise ConfigError(
            f"level {ev.level}, resamples {ev.resamples}, samples_per_prompt {ev.samples_per_prompt}, "
            f"every_steps {ev.every_steps}",
            where="evaluate",
            mend="0 < level < 1, at least 100 resamples, at least one sample per prompt, every_steps >= 0",
        )
    if ev.every_examples is not None and ev.every_examples < 1:
        raise ConfigError(
            f"every_examples = {ev.every_examples}",
            where="evaluate.every_examples",
            mend="at least 1; null: all held-out examples",
        )
    _check_sampling(ev.sampling, "evaluate.sampling", config.model)
