"""The verbs a recipe may use. Each looks up a stage's artifact in the store or runs the stage.

A `Lab` runs; a `PlanLab` (see `alignbench.plan`) only says what would run. A recipe cannot tell them apart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from alignbench import stages
from alignbench.config import ArchitectureConfig, Config, LoraConfig, SamplingConfig, SourceConfig, TrainConfig
from alignbench.data.readers import Source
from alignbench.data.readers import fingerprint as data_fingerprint
from alignbench.data.schema import Mode
from alignbench.errors import ConfigError
from alignbench.models.policy import fingerprint as model_fingerprint
from alignbench.models.policy import shape_of
from alignbench.problem import Problem
from alignbench.stages.data import LabelSpec, ReadSpec
from alignbench.stages.evaluate import EvaluateSpec
from alignbench.stages.measure import LogProbsSpec, SampleSpec, ScoreSpec
from alignbench.stages.policies import (
    BaseSpec,
    MergeSpec,
    PreferSpec,
    SftSpec,
    lora_parameter_count,
    parameter_count,
)
from alignbench.stages.stage import Context, Runtime, Stage
from alignbench.stages.tokens import TokenSpec
from alignbench.store import Artifact, Identity, Store, Workspace, plain
from alignbench.tracking import Tracker
from alignbench.worlds.handbook import WorldSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferSettings:
    """One preference stage of a recipe: its loss and its optimiser settings.

    Attributes:
        loss: "dpo", "ipo" or "kto".
        train: Optimiser settings.
        kto_labels: "preferred" or "is_safe": what makes a response desirable (KTO only).
        kto_balance: Weight undesirable responses by n_desirable / n_undesirable (KTO only).
    """

    loss: str
    train: TrainConfig
    kto_labels: str = "preferred"
    kto_balance: bool = True


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
    hints: dict[str, float] = field(default_factory=dict)
    artifact: Artifact | None = None
    built: bool = False
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """The artifact's key."""
        return self.identity.key

    @property
    def result(self) -> Artifact:
        """The artifact; an error in a plan that has not got it."""
        if self.artifact is None:
            raise ConfigError(f"{self.label} is not computed yet", where="plan", mend="run without plan=true")
        return self.artifact


@dataclass
class Lab:
    """Runs stages for one configuration and one seed, through the store.

    Attributes:
        config: The run's configuration.
        store: Where artifacts live.
        tracker: Mirror of metrics.
        nodes: Every stage used so far, by key, in order.
    """

    config: Config
    store: Store
    tracker: Tracker
    nodes: dict[str, Node] = field(default_factory=dict)

    # ---------------------------------------------------------------- verbs of the recipes

    def reference(self) -> Node:
        """pi_ref: the base model, supervised fine-tuned where the configuration says so."""
        model = self.config.model
        data = self.data()  # first: broken rows are found before a model is fetched
        if model.path is None:
            spec, inputs = BaseSpec(model.architecture, None), {"data": data}
        else:
            spec, inputs = BaseSpec(None, self._model_fingerprint), {}
        shape = {"parameters": parameter_count(self._shape)}
        # a model that is brought in is the same under every seed
        base = self._run(stages.BASE, spec, inputs, "base", seed=None if model.path is None else 0, hints=shape)
        if model.sft is None:
            return base
        return self._run(
            stages.SFT,
            SftSpec(
                model.sft,
                model.lora if model.lora_for_sft else LoraConfig(),
                self._tokens,
                self.config.hardware.dtype,
            ),
            {"start": base, "data": data},
            "sft",
            hints=self._trainable if model.lora_for_sft else {},
        )

    def data(self) -> Node:
        """Prompts and demonstrations (and, for files, the pairs)."""
        data = self.config.dataset
        if data.world is not None:
            world = data.world
            spec = WorldSpec(
                seed=data.seed,
                train_prompts=world.train_prompts,
                validation_prompts=world.validation_prompts,
                test_prompts=world.test_prompts,
                demonstrations=world.demonstrations,
                risky_fraction=world.risky_fraction,
            )
            return self._run(stages.WORLD, spec, {}, "world", seed=data.seed)
        files = data.files
        assert files is not None  # one of the two, by validation
        read = ReadSpec(
            pairs=self._data_fingerprints[0],
            demonstrations=self._data_fingerprints[1],
            objectives=("reward", *self.config.constraint.utilities),
            validation=cast(Mode, files.validation),
            validation_share=files.validation_share,
            test_share=files.test_share,
            split_seed=data.seed,
        )
        hints = {"rows": float(files.expected_pairs), "tokens": float(files.expected_tokens)}
        return self._run(stages.READ, read, {}, "data", seed=data.seed, hints=hints)

    def pairs(self) -> Node:
        """Preference pairs: read from files, or sampled from the reference and labelled by the world."""
        world = self.config.dataset.world
        if world is None:
            return self.data()
        responses = self.sample(
            self.reference(),
            ("train", "validation"),
            samples=2 * world.pairs_per_prompt,
            sampling=world.sampling,
            prompts=world.train_prompts + world.validation_prompts,
            label="sample pairs",
        )
        return self._run(
            stages.LABEL,
            LabelSpec(("politeness",), world.pairs_per_prompt),
            {
                "data": self.data(),
                "responses": responses,
                "scores": self.score(responses, "gold", label="score pairs"),
            },
            "label pairs",
        )

    def prefer(
        self,
        start: Node,
        reference: Node,
        pairs: Node,
        *,
        objective: str,
        beta: float,
        settings: PreferSettings,
        label: str,
    ) -> Node:
        """Preference training from `start` against `reference` (SACPO eqs. 6, 7); reference log-probs cached."""
        cached = self._run(
            stages.LOGPROBS,
            LogProbsSpec("pairs", self._tokens, self.config.hardware.dtype, mismatched=settings.loss == "kto"),
            {"policy": reference, "rows": pairs},
            f"reference log-probs for {label}",
        )
        spec = PreferSpec(
            objective=objective,
            loss=settings.loss,
            beta=beta,
            train=settings.train,
            lora=self.config.model.lora,
            tokens=self._tokens,
            dtype=self.config.hardware.dtype,
            # what only KTO reads must not give DPO another key
            kto_labels=settings.kto_labels if settings.loss == "kto" else "preferred",
            kto_balance=settings.kto_balance or settings.loss != "kto",
        )
        inputs = {"start": start, "reference": reference, "pairs": pairs, "reference_logprobs": cached}
        return self._run(stages.PREFER, spec, inputs, label, hints=self._trainable)

    def merge(self, parts: Sequence[tuple[Node, float]], *, label: str) -> Node:
        """Linear merge of policies' weights; the weights sum to one."""
        inputs = {f"policy_{i}": node for i, (node, _) in enumerate(parts)}
        return self._run(stages.MERGE, MergeSpec(tuple(w for _, w in parts)), inputs, label)

    def sample(
        self,
        policy: Node,
        splits: tuple[str, ...],
        *,
        samples: int,
        sampling: SamplingConfig,
        prompts: int,
        label: str,
    ) -> Node:
        """Responses of `policy` to the prompts of `splits` (`prompts`: how many a plan counts with)."""
        spec = SampleSpec(splits, samples, sampling, self._tokens, self.config.hardware.dtype)
        inputs = {"policy": policy, "data": self.data()}
        return self._run(stages.SAMPLE, spec, inputs, label, hints={"prompts": float(prompts)})

    def score(self, responses: Node, scorer: str, *, label: str) -> Node:
        """Reward and utilities of responses."""
        return self._run(stages.SCORE, ScoreSpec(scorer), {"responses": responses}, label)

    def logprobs(self, policy: Node, responses: Node, *, label: str) -> Node:
        """Log-probs of sampled responses under `policy`."""
        spec = LogProbsSpec("responses", self._tokens, self.config.hardware.dtype)
        return self._run(stages.LOGPROBS, spec, {"policy": policy, "rows": responses}, label)

    def evaluate(self, policy: Node, problem: Problem, *, label: str) -> Node:
        """Every metric of `policy` against the reference, on held-out prompts."""
        reference = self.reference()
        answers, scores = self._answers(policy, label)
        base_answers, base_scores = self._answers(reference, "sft")
        inputs = {
            "data": self.data(),
            "responses": answers,
            "scores": scores,
            "reference_responses": base_answers,
            "reference_scores": base_scores,
            "logprobs": self.logprobs(policy, answers, label=f"log-probs {label}"),
            "reference_logprobs": self.logprobs(reference, answers, label=f"log-probs of sft on {label}"),
        }
        ev = self.config.evaluate
        spec = EvaluateSpec(
            problem.form.value, problem.utilities, problem.thresholds, problem.beta, ev.level, ev.resamples
        )
        return self._run(stages.EVALUATE, spec, inputs, f"evaluate {label}")

    # ---------------------------------------------------------------- machinery

    def _answers(self, policy: Node, label: str) -> tuple[Node, Node]:
        ev = self.config.evaluate
        responses = self.sample(
            policy,
            (ev.split,),
            samples=ev.samples_per_prompt,
            sampling=ev.sampling,
            prompts=self._held_out(ev.split),
            label=f"sample {label}",
        )
        return responses, self.score(responses, ev.scorer, label=f"score {label}")

    def _held_out(self, split: str) -> int:
        world, files = self.config.dataset.world, self.config.dataset.files
        if world is not None:
            return int(getattr(world, f"{split}_prompts"))
        assert files is not None
        return int(files.expected_pairs * getattr(files, f"{split}_share"))

    @property
    def _tokens(self) -> TokenSpec:
        model = self.config.model
        return TokenSpec(model.template, model.max_length, model.max_prompt_length)

    # content is hashed once per run: a 7B model takes seconds

    @cached_property
    def _model_fingerprint(self) -> str:
        model = self.config.model
        assert model.path is not None
        return model_fingerprint(model.path, model.revision)

    @cached_property
    def _data_fingerprints(self) -> tuple[str, str | None]:
        """Of the pairs, and of the demonstrations where there are any."""
        files = self.config.dataset.files
        assert files is not None
        shown = files.demonstrations
        return data_fingerprint(_source(files.pairs)), None if shown is None else data_fingerprint(_source(shown))

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
        if files is not None:
            locations["pairs"] = _source(files.pairs)
            if files.demonstrations is not None:
                locations["demonstrations"] = _source(files.demonstrations)
        return Runtime(self.config.hardware, self.config.evaluate.every_steps, locations)

    def _run(
        self,
        stage: Stage,
        spec: Any,
        inputs: Mapping[str, Node],
        label: str,
        *,
        seed: int | None = None,
        hints: Mapping[str, float] | None = None,
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
            node.stage.run(
                Context(
                    spec=node.identity.spec,
                    inputs={role: source.result for role, source in node.inputs.items()},
                    seed=node.identity.seed,
                    out=workspace.out,
                    work=workspace.work,
                    cost=workspace.cost,
                    runtime=self.runtime,
                    on_metrics=lambda step, metrics: self.tracker.log(node.label, step, metrics),
                )
            )

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
    return Source(path=source.path, config=source.config, split=source.split, revision=source.revision)


def spec_of(node: Node) -> dict[str, Any]:
    """A node's spec as plain containers, for records."""
    return dict(plain(node.identity.spec))
