"""The stage behind the dual's picture: its course around the minimiser, and the effect of fewer responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignbench import dual, dual_geometry
from alignbench.engine.runtime import derive_seed
from alignbench.jsonio import write_json
from alignbench.stages.dualize import ProblemSpec, read_bank
from alignbench.stages.stage import Context, Estimate, Stage, register


@dataclass(frozen=True)
class GeometrySpec:
    """The dual of a bank, looked at around its minimiser; feeds pictures, no method.

    Attributes:
        problem: Thresholds, their form, beta.
        points: Grid points along each multiplier.
        draws: Subsets of responses of each size.
    """

    problem: ProblemSpec
    points: int = dual_geometry.POINTS
    draws: int = dual_geometry.DRAWS


def _geometry(ctx: Context) -> None:
    spec: GeometrySpec = ctx.spec
    problem = spec.problem.problem
    bank = read_bank(ctx.inputs["responses"], ctx.inputs["scores"], ctx.inputs.get("weights"), problem.utilities)
    margins = np.array(list(problem.margins(bank.reference_means).values()))
    solution = dual.solve(bank, problem.beta, margins)
    found: dict[str, Any] = {
        "beta": problem.beta,
        "prompts": len(bank.prompts),
        "responses": int(bank.responses.sum()),
        "requested_margin": dict(zip(problem.utilities, map(float, margins), strict=True)),
        "multipliers": solution.named(),
        "value": solution.value,
        "standard_errors": dict(zip(problem.utilities, solution.to_dict()["standard_errors"], strict=True)),
        "course": dual_geometry.course(bank, solution, points=spec.points),
        "sample_effect": dual_geometry.sample_effect(
            bank, solution, seed=derive_seed(ctx.seed, "geometry"), draws=spec.draws
        ),
    }
    write_json(ctx.out / "geometry.json", found)


GEOMETRY = register(
    Stage(
        "geometry",
        2,
        "geometry",
        GeometrySpec,
        _geometry,
        lambda spec, inputs, runtime, hints: Estimate(overhead_seconds=1.0),
    )
)
