"""The machinery under the lab's verbs: nodes, keys, looking up or running a stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from alignbench.architecture import lora_parameter_count
from alignbench.config import ArchitectureConfig, Config
from alignbench.data.readers import Source
from alignbench.data.readers import fingerprint as data_fingerprint
from alignbench.dataset import DATA_SCORER, SourceConfig, labels_of
from alignbench.errors import ConfigError
from alignbench.jsonio import plain
from alignbench.launch import run_on_ranks
from alignbench.models.policy import fingerprint as model_fingerprint
from alignbench.models.policy import shape_of
from alignbench.stages.files import TableSpec
from alignbench.stages.stage import Context, Runtime, Stage
from alignbench.stages.tokens import TokenSpec
from alignbench.stages.truthfulqa import Questions, TruthfulQASpec
from alignbench.store import Artifact, Identity, Store, Workspace
from alignbench.tracking import Tracker

log = logging.getLogger(__name__)


@dataclass
class Node:
    """One use of a stage: what it is, what it needs, and (once there) its artifact.

    Attributes:
        stage: The stage.
        label: What the recipe calls it, for progress, W&B and the plan.
        identity: Key material.
        inputs: Nodes by role.
        hints: Sizes that a plan counts with.
        artifact: The result; None in a plan where it is not cached.
        built: Whether this run built it.
        seconds: Wall seconds this run spent on it (0 when found).
    """

    stage: Stage
    label: str
    identity: Identity
    inputs: dict[str, Node]
    hints: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    built: bool = False
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.identity.key

    @property
    def is_shared(self) -> bool:
        """Whether several processes share its work."""
        return self.stage.shares(self.identity.spec)

    def source(self, role: str) -> Node:
        """The nearest node of that role among the inputs and theirs (of listed answers the log-probs lie deeper)."""
        node = self
        while role not in node.inputs:
            node = node.inputs["logprobs"]
        return node.inputs[role]

    @property
    def result(self) -> Artifact:
        """The artifact; an error in a plan that has not got it."""
        if self.artifact is None:
            raise ConfigError(f"{self.label} is not computed yet", where="plan", mend="run without plan=true")
        return self.artifact


@dataclass
class LabBase:
    """Runs stages for one configuration and one seed, through the store.

    Attributes:
        config: The run's configuration.
        store: Where artifacts live.
        tracker: Mirror of metrics.
        nodes: Every stage used so far, by key, in order.
        scorer_identities: Content and folder of score models from outside, by path, revision and configuration key.
        scorer_sources: Where they lie (path, revision), by content.
    """

    config: Config
    store: Store
    tracker: Tracker
    nodes: dict[str, Node] = field(default_factory=dict)
    scorer_identities: dict[tuple[str, str | None, str], tuple[str, Path | None]] = field(default_factory=dict)
    scorer_sources: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    @property
    def _answers_are_listed(self) -> bool:
        world, files = self.config.dataset.world, self.config.dataset.files
        return world.answers > 0 if world is not None else files is not None and files.answers_are_listed

    @property
    def _reported_in_own_words(self) -> bool:
        """Whether policies answer freely in the evaluation, although responses from files are listed.

        They do, unless the scores are those of the files themselves.
        """
        config = self.config
        return config.dataset.files is not None and config.evaluate.scorer != DATA_SCORER

    @property
    def _labelled_objectives(self) -> tuple[str, ...]:
        return ("reward", *self.config.constraint.utilities)

    def _prompts_of(self, split: str) -> int:
        """How many prompts of a split a plan counts with."""
        world, files = self.config.dataset.world, self.config.dataset.files
        if world is not None:
            return int(getattr(world, f"{split}_prompts"))
        assert files is not None
        if split == "test" and files.has_prompt_set:
            return files.expected_prompts
        held_out = {"validation": files.validation_share, "test": files.test_share}
        return int(files.counted_prompts * held_out.get(split, 1 - sum(held_out.values())))

    @property
    def tokens(self) -> TokenSpec:
        """How text becomes tokens in this run."""
        model = self.config.model
        return TokenSpec(model.template, model.max_length, model.max_prompt_length)

    @cached_property
    def questions(self) -> Questions:
        """The benchmark's questions."""
        benchmark = self.config.benchmark
        assert benchmark is not None
        return Questions.of(benchmark.path, benchmark.preamble)

    @cached_property
    def _asked(self) -> TruthfulQASpec:
        """How the benchmark asks its questions."""
        asked, ev = self.config.benchmark, self.config.evaluate
        assert asked is not None
        preamble = self.questions.preamble if asked.form == "qa" else ""
        dtype = self.config.hardware.dtype
        return TruthfulQASpec(self.questions.content, asked.form, preamble, self.tokens, dtype, ev.level)

    # content is hashed once per run: a 7B model takes seconds

    @cached_property
    def _model_fingerprint(self) -> str:
        model = self.config.model
        assert model.path is not None
        found = model_fingerprint(model.path, model.revision)
        return found if model.not_finite == "refuse" else f"{found}, not finite: {model.not_finite}"

    @cached_property
    def _tables(self) -> tuple[tuple[str, TableSpec], ...]:
        """The tables of a data set from files, by content."""
        files = self.config.dataset.files
        assert files is not None
        found = []
        for name, table, source in files.sources():
            labels = {"pairs": labels_of(source, self._labelled_objectives), "responses": self._labelled_objectives}
            spec = TableSpec(
                table=table,
                fingerprint=data_fingerprint(_source(source)),
                layout=source.layout,
                columns=source.renamed,
                labels=labels.get(table, ()),
            )
            found.append((name, spec))
        return tuple(found)

    @property
    def _shape(self) -> ArchitectureConfig:
        model = self.config.model
        return model.architecture if model.path is None else shape_of(model.path, model.architecture)

    @property
    def _trainable(self) -> dict[str, float]:
        """Trained weights of a LoRA stage, for the plan; empty where all weights train."""
        lora = self.config.model.lora
        return {"trainable": lora_parameter_count(self._shape, lora)} if lora.rank else {}

    @property
    def runtime(self) -> Runtime:
        """Device, batch sizes and where outside inputs lie."""
        model, files = self.config.model, self.config.dataset.files
        locations: dict[str, Any] = {"model": model}
        if self.scorer_sources:
            locations["scorers"] = dict(self.scorer_sources)
        if files is not None:
            locations |= {name: _source(source) for name, _, source in files.sources()}
        if self.config.judge is not None:
            locations["judge"] = self.config.judge
        if self.config.benchmark is not None:
            locations["truthfulqa"] = self.questions
        ev = self.config.evaluate
        return Runtime(self.config.hardware, ev.every_steps, locations, ev.every_examples)

    def _run(
        self,
        stage: Stage,
        spec: Any,
        inputs: Mapping[str, Node],
        label: str,
        *,
        seed: int | None = None,
        hints: Mapping[str, Any] | None = None,
    ) -> Node:
        """The node of (stage, spec, inputs, seed): known, found in the store, or built now."""
        identity = Identity(
            stage=stage.name,
            version=stage.version,
            kind=stage.kind,
            spec=spec,
            inputs={role: node.key for role, node in inputs.items()},
            seed=self.config.seed if seed is None else seed,
        )
        known = self.nodes.get(identity.key)
        if known is not None:
            return known
        node = Node(stage, label, identity, dict(inputs), dict(hints or {}))
        self._realise(node)
        self.nodes[node.key] = node
        return node

    def _realise(self, node: Node) -> None:
        """Fill in the node's artifact."""

        def produce(workspace: Workspace) -> None:
            log.info("%s: running (%s %s)", node.label, node.stage.name, node.key[:12])
            context = Context(
                spec=node.identity.spec,
                inputs={role: source.result for role, source in node.inputs.items()},
                seed=node.identity.seed,
                out=workspace.out,
                work=workspace.work,
                cost=workspace.cost,
                runtime=self.runtime,
                on_metrics=lambda step, metrics: self.tracker.log(node.label, step, metrics),
            )
            if node.is_shared and self.config.hardware.processes > 1:
                run_on_ranks(node.stage, context)
            else:
                node.stage.run(context)

        started = time.perf_counter()
        node.artifact, node.built = self.store.obtain(node.identity, produce)
        if node.built:
            node.seconds = time.perf_counter() - started
            log.info("%s: done in %.1f s", node.label, node.seconds)
        else:
            log.info("%s: found in the store (%s)", node.label, node.key[:12])
            if "log.jsonl" in node.artifact.manifest["files"]:
                self.tracker.replay(node.label, node.artifact.jsonl("log.jsonl"))


def _source(source: SourceConfig) -> Source:
    assert source.path is not None  # of the sources that are given
    return Source(path=source.path, config=source.config, split=source.split, revision=source.revision)


def spec_of(node: Node) -> dict[str, Any]:
    """A node's spec as plain containers, for records."""
    return dict(plain(node.identity.spec))
