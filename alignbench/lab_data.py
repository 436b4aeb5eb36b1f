"""The verbs that bring data and the base model in; `alignbench.lab` has the others."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from alignbench import stages
from alignbench.data.schema import Mode
from alignbench.errors import ConfigError
from alignbench.lab_base import LabBase, Node
from alignbench.models.weights import check_lora_targets
from alignbench.stages.files import FitSpec, ReadSpec, SelectSpec
from alignbench.stages.listed import ListedWorldSpec
from alignbench.stages.policies import BaseSpec
from alignbench.stages.prompts import SomePromptsSpec
from alignbench.stages.truthfulqa import check_fit
from alignbench.worlds.handbook import WorldSpec


class DataLab(LabBase):
    """What a run starts from."""

    def base(self) -> Node:
        """The base model and its tokenizer, before any fine-tuning: built from nothing, or brought in."""
        model = self.config.model
        if model.path is None:
            spec, inputs = BaseSpec(model.architecture, None), {"data": self.data()}
        else:
            spec, inputs = BaseSpec(None, self._model_fingerprint), {}
        # a model that is brought in is the same under every seed
        base = self._run(
            stages.BASE, spec, inputs, "base", seed=None if model.path is None else 0, hints={"shape": self._shape}
        )
        if base.artifact is not None:
            self._check_base(base.artifact.path("policy"))
        elif model.path is not None and Path(model.path).is_dir():
            self._check_base(Path(model.path))
        return base

    def _check_base(self, folder: Path) -> None:
        """What would otherwise be found when something has trained: before anything does.

        Adapters' targets that match nothing, and answers of the benchmark that are longer than the policy.
        """
        lora = self.config.model.lora
        if lora.rank:
            check_lora_targets(folder, lora.targets)
        if self.config.benchmark is not None:
            check_fit(folder, self.questions, self._asked)

    def data(self) -> Node:
        """Prompts and demonstrations (and, for files, the pairs), checked; rows that are too long are seen to."""
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
            if world.answers:
                listed = ListedWorldSpec(spec, world.answers, world.mild_share)
                return self._run(stages.LISTED_WORLD, listed, {}, "world", seed=data.seed)
            return self._run(stages.WORLD, spec, {}, "world", seed=data.seed)
        files = data.files
        assert files is not None  # one of the two, by validation
        read = ReadSpec(
            tables=self._tables,
            validation=cast(Mode, files.validation),
            validation_share=files.validation_share,
            test_share=files.test_share,
            split_seed=data.seed,
            pairs_per_prompt=files.pairs_per_prompt if files.responses is not None else 0,
            most_prompts=files.most_prompts or 0,
            responses_per_prompt=files.responses_per_prompt or 0,
        )
        hints = {"rows": files.counted_pairs, "tokens": float(files.expected_tokens)}
        rows = self._run(stages.READ, read, {}, "data", seed=data.seed, hints=hints)
        inputs = {"data": rows, "policy": self.base()}
        fit = self._run(stages.FIT, FitSpec(self.tokens, files.over_long), inputs, "lengths", seed=data.seed)
        return fit if files.over_long == "drop" else rows

    def prompts(self, splits: tuple[str, ...], most: int | None) -> tuple[Node, float]:
        """A table with at most `most` of the splits' prompts (None: all), and how many a plan counts with."""
        data, count = self.data(), float(sum(map(self._prompts_of, splits)))
        if most is None:
            return data, count
        hints = {"prompts": min(count, float(most))}
        label = f"{most} prompts, {' and '.join(splits)}"
        # by the data set's seed, as the splits: runs of other seeds share them
        some = self._run(
            stages.SOME_PROMPTS, SomePromptsSpec(splits, most), {"data": data}, label,
            seed=self.config.dataset.seed, hints=hints,
        )  # fmt: skip
        return some, hints["prompts"]

    def labelled(self, pairs: Node, objective: str) -> Node:
        """The pairs that carry labels of `objective`, where a data set's tables do not all carry them."""
        files = self.config.dataset.files
        if files is None:
            return pairs
        if files.responses is None:
            carried = [spec.labels for _, spec in self._tables if spec.table == "pairs"]
            if not any(objective in labels for labels in carried):
                raise ConfigError(
                    f"no pairs are labelled for {objective!r}: the tables carry "
                    + "; ".join(", ".join(labels) for labels in carried),
                    where="dataset.files.pairs.labels",
                    mend="choose a method that needs no such labels, or add pairs that have them",
                )
            if all(objective in labels for labels in carried):
                return pairs
        # of pairs made from scores, those with equal scores have no label
        return self._run(stages.SELECT, SelectSpec(objective), {"pairs": pairs}, f"pairs labelled for {objective}")

    def refuse_no_pairs(self) -> None:
        """Refuse a method that trains on pairs on a data set of demonstrations alone."""
        if not any(spec.table in ("pairs", "responses") for _, spec in self._tables):
            raise ConfigError(
                "the data set has demonstrations only, and this method trains on pairs",
                where="dataset.files.pairs",
                mend="method=sft, or dataset=files_with_demonstrations with the pairs as well",
            )
