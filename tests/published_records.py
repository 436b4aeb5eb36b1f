"""Records of the papers' presets, made from their real configurations: `from published_records import record`."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

from omegaconf import OmegaConf
from record_files import constraint_of

from alignbench import presets
from alignbench.config import recorded
from alignbench.record import portable


def value(mean: float, reach: float | None = 0.1) -> dict[str, Any]:
    low, high = (None, None) if reach is None else (mean - reach, mean + reach)
    return {"mean": mean, "low": low, "high": high, "n": 512, "clusters": 128, "level": 0.95, "method": "bootstrap"}


@cache
def _composed(experiment: str, overrides: tuple[str, ...]) -> tuple[Any, dict[str, list[Any]]]:
    return presets.composed(experiment, *overrides)


def record(
    experiment: str,
    *overrides: str,
    scale: str = "embedded",
    point: int = 0,
    seed: int = 0,
    policies: tuple[str, ...] = (),
    mean: float = 0.25,
    **changes: Any,
) -> dict[str, Any]:
    """A finished run of a preset at one point of its grid.

    Args:
        experiment: The preset.
        overrides: Further ones, as on the command line.
        scale: "paper" or "embedded".
        point: Position in the grid, the last key fastest.
        seed: Of the run.
        policies: Rows besides the reference's; the last is reported. Default: one, called as the method.
        mean: Of every gain and margin; win rates are a half more.
        changes: Keys of the record to replace.
    """
    given = (*overrides, *(() if scale == "paper" else (f"scale={scale}",)))
    config, grid = _composed(experiment, given)
    config = config.copy()
    for key, chosen in zip(grid, list(itertools.product(*grid.values()))[point], strict=True):
        OmegaConf.update(config, key, chosen)
    plain = portable(recorded(config)) | {"seed": seed}
    utilities = plain["constraint"]["utilities"]
    method = plain["method"]["name"]

    def row(name: str, gain: float) -> dict[str, Any]:
        metrics = {f"{one}_gain": value(gain) for one in ("reward", *utilities)}
        metrics |= {f"{one}_win_rate": value(0.5 + gain) for one in ("reward", *utilities)}
        return {
            "policy": f"{name}-{seed}-{point}",
            "metrics": metrics,
            "constraints": {
                one: constraint_of(asked, value(gain + 0.01 * i))
                for i, (one, asked) in enumerate(zip(utilities, plain["constraint"]["thresholds"], strict=True))
            },
            "predicted": {
                "margins": dict.fromkeys(utilities, gain),
                "intervals": {one: [gain - 0.02, gain + 0.02] for one in utilities},
            },
            "multipliers": dict.fromkeys(utilities, 0.7 + point),
        }

    names = policies or ("sft" if method == "dual" else method,)
    made = {
        "run_id": f"{method}-{experiment.replace('/', '_')}-{scale}-{seed}-{point}-{'_'.join(overrides)}",
        "status": "finished",
        "created": "2026-01-01T00:00:00+00:00",
        "alignbench": "0.1.0",
        "commit": "a" * 40,
        "versions": {},
        "config": plain,
        "experiments": [experiment],
        "method": method,
        "seed": seed,
        "outcome": {"reported": names[-1], "multipliers": {}},
        "rows": {"sft": row("sft", 0.0)} | {name: row(name, mean + 0.1 * i) for i, name in enumerate(names)},
    }
    return made | changes
