"""The result of a hyper-parameter search, from its records.

    python -m alignbench.report.search FOLDER OUT.json [OVERRIDE ...]

The overrides are those that all runs of the search had (`model=handbook_llama_lora`): what was chosen is read off conf/
with them. Every reported policy becomes one row: the settings that differ between the records, and the problem's own
objective on validation prompts, E r - beta KL, as a gain over the reference.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from alignbench.cli import CONF, register
from alignbench.errors import AlignbenchError, DataError
from alignbench.jsonio import atomic_write_json
from alignbench.record import read_records


def summarise(
    records: Sequence[Mapping[str, Any]], chosen: Callable[[str, list[str]], dict[str, Any]]
) -> dict[str, Any]:
    """Rows of a search, best first within each method, and what was chosen of it.

    Args:
        records: Every point of the search.
        chosen: (method, keys that the search varied) -> the values that were settled on.

    Raises:
        DataError: no record, or one that was evaluated on test prompts (settings are chosen on validation only).
    """
    if not records:
        raise DataError("no record to summarise", where="search", mend="run the search first")
    on_test = [r["run_id"] for r in records if r["config"]["evaluate"]["split"] != "validation"]
    if on_test:
        raise DataError(
            f"{len(on_test)} record(s) were evaluated on test prompts: {', '.join(on_test[:3])}",
            where="search",
            mend="search with evaluate.split=validation",
        )
    flat = [_flatten({key: r["config"][key] for key in ("method", "model", "dataset", "constraint")}) for r in records]
    varied = {
        method: _differing([row for row in flat if row["method.name"] == method])
        for method in sorted({str(row["method.name"]) for row in flat})
    }
    rows = [
        _row(record, {key: row[key] for key in varied[row["method.name"]]})
        for record, row in zip(records, flat, strict=True)
    ]
    rows.sort(key=lambda row: (row["method"], -row["objective_gain"]))
    return {
        "what": "validation results of a hyper-parameter search; objective_gain = reward gain - beta * KL",
        "commits": sorted({str(r["commit"]) for r in records}),
        "chosen": {method: chosen(method, keys) for method, keys in varied.items()},
        "rows": rows,
    }


def _differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(key for key in rows[0] if len({str(row.get(key)) for row in rows}) > 1)


def defaults_of(method: str, keys: list[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of `keys` in conf/ for a method: what was settled on."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=[f"method={method}", *overrides])
    found = {key: OmegaConf.select(composed, key) for key in keys}
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in found.items()
        if value is not None
    }


def _row(record: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    metrics = record["rows"][record["outcome"]["reported"]]["metrics"]
    beta = record["config"]["constraint"]["beta"]
    gains = {name: value["mean"] for name, value in metrics.items() if name.endswith("_gain")}
    return {
        "run_id": record["run_id"],
        "method": record["method"],
        "settings": settings,
        **{name: round(value, 4) for name, value in gains.items()},
        "kl": round(metrics["kl"]["mean"], 4),
        "objective_gain": round(gains["reward_gain"] - beta * metrics["kl"]["mean"], 4),
        "n": metrics["kl"]["n"],
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, child in value.items() for k, v in _flatten(child, f"{prefix}.{key}".lstrip(".")).items()}


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder, out, overrides = Path(arguments[0]), Path(arguments[1]), arguments[2:]
    try:
        atomic_write_json(out, summarise(read_records(folder), partial(defaults_of, overrides=overrides)))
    except AlignbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"search: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
