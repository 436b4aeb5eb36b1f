"""Stages: pure functions (spec, inputs, seed) -> artifact. Importing this package registers all of them."""

from alignbench.stages.data import LABEL, READ, WORLD
from alignbench.stages.evaluate import EVALUATE
from alignbench.stages.measure import LOGPROBS, SAMPLE, SCORE
from alignbench.stages.policies import BASE, MERGE, PREFER, SFT
from alignbench.stages.stage import STAGES, Context, Estimate, Facts, Runtime, Stage

__all__ = [
    "BASE",
    "EVALUATE",
    "LABEL",
    "LOGPROBS",
    "MERGE",
    "PREFER",
    "READ",
    "SAMPLE",
    "SCORE",
    "SFT",
    "STAGES",
    "WORLD",
    "Context",
    "Estimate",
    "Facts",
    "Runtime",
    "Stage",
]
