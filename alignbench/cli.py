"""The command line: Hydra's grammar, with unknown keys explained before Hydra sees them."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from alignbench.config import Config, run_id
from alignbench.errors import AlignbenchError, ConfigError
from alignbench.hardware import register_resolvers

CONF = Path(__file__).resolve().parents[1] / "conf"
SWEEP_ENV = "ALIGNBENCH_SWEEP"


def register() -> None:
    """Give Hydra the schema, and the resolvers that name a run's folder and look at this machine."""
    ConfigStore.instance().store(name="base_config", node=Config)
    register_resolvers()
    OmegaConf.register_new_resolver("by_scale", by_scale, replace=True)
    OmegaConf.register_new_resolver("by_lora", by_lora, replace=True)
    OmegaConf.register_new_resolver("run_id", lambda *, _root_: run_id(_root_), replace=True, use_cache=False)


def by_scale(paper: Any, embedded: Any, *, _root_: DictConfig) -> Any:
    """`${by_scale:A,B}` in a preset: A as the paper states it, B in the embedded world (`scale=embedded`)."""
    return embedded if _root_.get("scale") == "embedded" else paper


def by_lora(full: Any, adapters: Any, *, _root_: DictConfig) -> Any:
    """`${by_lora:A,B}`: A where preference steps train all weights, B where they train adapters."""
    return adapters if _root_.model.lora.rank > 0 else full


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def app(config: DictConfig) -> float:
    """One Hydra job."""
    quieten()
    from alignbench.run import execute

    try:
        return execute(config)
    except AlignbenchError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def main() -> int:
    """Entry point of `main.py`."""
    register()
    arguments = sys.argv[1:]
    if {"-m", "--multirun"} & set(arguments):
        # Hydra's parser wants it before the overrides; users write it anywhere
        arguments = ["-m", *(a for a in arguments if a not in ("-m", "--multirun"))]
        sys.argv[1:] = arguments
        # launchers that start processes of their own (submitit) must find this package, which is nowhere installed
        known = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(CONF.parent), *([known] if known else [])])
        words = " ".join(sorted(a for a in arguments if "=" in a))
        os.environ.setdefault(SWEEP_ENV, f"sweep-{hashlib.sha256(words.encode()).hexdigest()[:8]}")
    try:
        explain_overrides([a for a in arguments if "=" in a and not a.startswith("-")])
    except ConfigError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    app()
    return 0


def explain_overrides(overrides: list[str]) -> None:
    """Refuse an override whose key is unknown, with the nearest known ones.

    Raises:
        ConfigError: a key is unknown. What this check does not understand is left to Hydra.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException:
        return
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir())
    chosen = []
    for override in parsed:
        if override.key_or_group in groups and not override.is_delete():
            if override.value() is None:
                raise ConfigError(
                    f"{override.key_or_group} is a group, and no option of it is called null",
                    where=f"override {override.input_line}",
                    mend=f"leave it out, or write ~{override.key_or_group}",
                )
            if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
                return
            # of a sweep the first option: a key that only others have is an error of the first one's run
            chosen.append(f"{override.key_or_group}={_first(override)}")
    known = _known_keys(chosen)
    if known is None:
        return
    for override in parsed:
        key = override.key_or_group.split("@")[0]
        if key in groups or key == "hydra" or key.startswith(("hydra.", "hydra/")):
            continue
        if not any(k == key or k.startswith(f"{key}.") for k in known):
            parent = next((k for k in known if key.startswith(f"{k}.") and known[k]), None)
            if parent is not None:
                raise ConfigError(
                    f"{parent} is null in this configuration, so {key!r} has no place",
                    where=f"override {override.input_line}",
                    mend=f"choose an option of the group {parent.split('.')[0]} that sets it (see --help), "
                    "or write one of your own in conf/",
                )
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            raise ConfigError(
                f"unknown option {key!r}",
                where=f"override {override.input_line}",
                mend=f"did you mean {', '.join(near)}?" if near else "see `python main.py --cfg job` for all keys",
            )


def _first(override: Override) -> str:
    return next(override.sweep_string_iterator()) if override.is_sweep_override() else override.get_value_string()


def _known_keys(choices: list[str]) -> dict[str, bool] | None:
    """Every key that these group choices compose, and whether it is a mapping left null; None if they do not."""
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra.compose("config", overrides=choices)
    except (HydraException, ValueError):
        return None
    return _paths(composed)


def _paths(node: DictConfig, prefix: str = "") -> dict[str, bool]:
    paths: dict[str, bool] = {}
    for key in map(str, node):
        name = f"{prefix}{key}"
        child = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        paths[name] = isinstance(child, DictConfig) and child._is_none()
        if isinstance(child, DictConfig) and not child._is_none():
            paths |= _paths(child, f"{name}.")
    return paths


def quieten() -> None:
    """Turn other libraries' chatter down; each suppressed warning is harmless here and says why."""
    for name in ("DeepSpeed", "compilers", "datasets", "httpx", "filelock", "matplotlib", "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # ZeRO's own hooks still call torch's old collective names (deepspeedai/DeepSpeed uses them up to 0.19)
    warnings.filterwarnings("ignore", message=".*_base.* is deprecated", category=UserWarning)
