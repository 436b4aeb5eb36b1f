"""The papers' presets with their grids: `python -m alignbench.presets` lists them and what a plan says they cost.

Everything is composed and planned here, without a network, weights or data. `scale=embedded` lists their twins.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from alignbench.cli import CONF, register
from alignbench.config import TrackingConfig, resolve, validate
from alignbench.gpus import GPUS, PEAK_FLOPS
from alignbench.pins import plan_unpinned
from alignbench.plan import PlanLab, graph_of, union_of
from alignbench.run import planned
from alignbench.store import Store
from alignbench.tracking import Tracker

#: Folders of conf/experiment that hold a paper's presets.
PAPERS = ("sacpo", "can", "caid", "pd_dpo")
_NO_STORE = Path("/nonexistent/store")


def preset_names() -> list[str]:
    """Every preset, as `experiment=` takes it."""
    return [f"{paper}/{path.stem}" for paper in PAPERS for path in sorted((CONF / "experiment" / paper).glob("*.yaml"))]


def composed(preset: str, *overrides: str) -> tuple[DictConfig, dict[str, list[Any]]]:
    """A preset's configuration, and its grid: the values of each swept key, the single run's first."""
    whole = _whole(preset, *overrides)
    return _without_hydra(whole), _grid(whole)


def at_scale(preset: str, scale: str) -> tuple[DictConfig, dict[str, list[Any]], dict[str, list[Any]]]:
    """A preset's configuration at a scale, its grid there, and the paper's: the k-th values belong together."""
    whole = _whole(preset, f"scale={scale}")
    config, grid = _without_hydra(whole), _grid(whole)
    OmegaConf.update(whole, "scale", "paper")  # what `by_scale` looks at
    return config, grid, _grid(whole)


def _whole(preset: str, *overrides: str) -> DictConfig:
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(
            "config",
            overrides=[f"experiment={preset}", "plan=true", "tracking=disabled", *overrides],
            return_hydra_config=True,
        )


def _grid(whole: DictConfig) -> dict[str, list[Any]]:
    swept = [f"{key}={values}" for key, values in (whole.hydra.sweeper.params or {}).items()]
    grid = {}
    for override in OverridesParser.create().parse_overrides(swept):
        texts = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        grid[override.key_or_group] = [OmegaConf.create(f"value: {text}").value for text in texts]
    return grid


def _without_hydra(whole: DictConfig) -> DictConfig:
    config = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    assert isinstance(config, DictConfig)
    return config


def points(config: DictConfig, grid: dict[str, list[Any]]) -> Iterator[DictConfig]:
    """The configuration of each point of the grid, as `-m` would run it."""
    for values in itertools.product(*grid.values()):
        point = copy.deepcopy(config)
        for key, value in zip(grid, values, strict=True):
            OmegaConf.update(point, key, value)
        yield point


def plan_of(config: DictConfig) -> PlanLab:
    """The plan of a configuration in an empty store, after all of its checks."""
    typed, settings = resolve(config)
    validate(typed, settings)
    plan_unpinned(typed, settings)
    off = Tracker(TrackingConfig("disabled"), run_id="", group="", job_type="", config={}, folder=Path())
    return planned(typed, settings, Store(_NO_STORE), off)


def _row(preset: str, overrides: list[str]) -> str:
    config, grid = composed(preset, *overrides)
    whole = union_of([graph_of(plan_of(point)) for point in points(config, grid)])
    single = union_of([graph_of(plan_of(config))])

    def cost(union: dict[str, Any]) -> str:
        if not union["gpu"]:
            return f"{union['seconds'] / 60:.0f} min"
        return " / ".join(f"{s / 3600:,.0f}" if s >= 36000 else f"{s / 3600:.1f}" for s in union["gpu"].values())

    return f"| `{preset}` | {whole['runs']} | {cost(single)} | {cost(whole)} |"


def main(overrides: list[str]) -> None:
    """Print the table."""
    print(
        f"Estimates of GPU-hours on {' / '.join(PEAK_FLOPS)}, in hours on {GPUS} divided by {GPUS}; embedded: minutes\n"
    )
    print("| preset | runs | one run | whole grid |\n| --- | --- | --- | --- |")
    for preset in preset_names():
        print(_row(preset, overrides), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
