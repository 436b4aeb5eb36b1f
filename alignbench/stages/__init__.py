"""Stages: pure functions (spec, inputs, seed) -> artifact. Importing this package registers all of them."""

from alignbench.stages.certify import CERTIFY
from alignbench.stages.data import LABEL, PAIR_UP, WORLD
from alignbench.stages.dualize import AVERAGE, COST, DUAL, GIVEN, PREDICT, SLACK, STEP
from alignbench.stages.evaluate import EVALUATE
from alignbench.stages.explore import BONUS, FEATURES, JOIN, TILT
from alignbench.stages.files import FIT, READ, SELECT
from alignbench.stages.geometry import GEOMETRY
from alignbench.stages.judge import JUDGE, VERDICTS
from alignbench.stages.listed import DRAW, LIST, LISTED_WORLD, LOOKUP, RATIO
from alignbench.stages.measure import LOGPROBS, SAMPLE, SAMPLE_VLLM, SCORE
from alignbench.stages.policies import BASE, MERGE, PREFER, SFT
from alignbench.stages.prompts import SOME_PROMPTS
from alignbench.stages.proxy import PROXY
from alignbench.stages.relabel import ANNOTATE, IMPLICIT, RELABEL
from alignbench.stages.scoring import ASSESS, BRING_SCORER, SCORE_COLUMNS, TRAIN_SCORER
from alignbench.stages.stage import STAGES, Context, Estimate, Facts, Runtime, Stage
from alignbench.stages.truthfulqa import TRUTHFULQA

__all__ = [
    "ANNOTATE",
    "ASSESS",
    "AVERAGE",
    "BASE",
    "BONUS",
    "BRING_SCORER",
    "CERTIFY",
    "COST",
    "DRAW",
    "DUAL",
    "EVALUATE",
    "FEATURES",
    "FIT",
    "GEOMETRY",
    "GIVEN",
    "IMPLICIT",
    "JOIN",
    "JUDGE",
    "LABEL",
    "LIST",
    "LISTED_WORLD",
    "LOGPROBS",
    "LOOKUP",
    "MERGE",
    "PAIR_UP",
    "PREDICT",
    "PREFER",
    "PROXY",
    "RATIO",
    "READ",
    "RELABEL",
    "SAMPLE",
    "SAMPLE_VLLM",
    "SCORE",
    "SCORE_COLUMNS",
    "SELECT",
    "SFT",
    "SLACK",
    "SOME_PROMPTS",
    "STAGES",
    "STEP",
    "TILT",
    "TRAIN_SCORER",
    "TRUTHFULQA",
    "VERDICTS",
    "WORLD",
    "Context",
    "Estimate",
    "Facts",
    "Runtime",
    "Stage",
]
