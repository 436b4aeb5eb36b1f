"""`python main.py data=show`: the data as a model will see them, before anything is trained.

Rows are read, checked and tokenised as in a run (the same stages, through the same store); then three rows are printed
with what is masked and what is trained on, the lengths in tokens, what was dropped by which rule, and the labels.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignbench.config import Config, TrackingConfig
from alignbench.data.templates import render_prompt
from alignbench.data.tokenize import Encoded, encode
from alignbench.lab import Lab
from alignbench.models.policy import load_tokenizer
from alignbench.plan import PlanLab
from alignbench.stages.files import measure_lengths
from alignbench.stages.tokens import TokenSpec
from alignbench.store import Artifact, Store
from alignbench.tracking import Tracker

_ROWS = 3
_SIDES = {"pairs": ("response_0", "response_1"), "demonstrations": ("response",)}


def show_data(config: Config, store: Store, console: Console) -> None:
    """Print the data set of `config`; nothing is trained.

    Raises:
        DataError: Rows are absent or broken.
        ModelError: The tokenizer cannot be had.
    """
    off = Tracker(TrackingConfig("disabled"), run_id="", group="", job_type="", config={}, folder=store.root)
    lab = Lab(config, store, off)
    data, base = lab.data().result, lab.base().result
    tokenizer = load_tokenizer(base.path("policy"))
    tokens = lab.tokens
    tables = {name: data.jsonl(f"{name}.jsonl") for name in _SIDES if f"{name}.jsonl" in data.manifest["files"]}
    tables = {name: rows for name, rows in tables.items() if rows}
    if "pairs" not in tables and config.dataset.world is not None:
        found = _sampled_pairs(config, store, off)
        if found is None:
            console.print(
                "pairs: none yet; this world's are sampled from the SFT policy and labelled (run once to see them)"
            )
        else:
            tables["pairs"] = found.jsonl("pairs.jsonl")
    for name, rows in sorted(tables.items(), reverse=True):
        console.print(f"\n[bold]{name}[/]: {len(rows)} rows, template {tokens.template!r}, the first {_ROWS}:")
        for number, row in enumerate(rows[:_ROWS], 1):
            _show_row(number, row, _SIDES[name], tokenizer, tokens, console)
    lengths = next((node for node in lab.nodes.values() if node.stage.name == "fit"), None)
    if lengths is None:
        measured = {n: measure_lengths(rows, _SIDES[n], tokenizer, tokens)[1] for n, rows in tables.items()}
    else:
        measured = lengths.result.json("report.json")
    _show_lengths(measured, tokens, console)
    if "report.json" in data.manifest["files"]:
        reports = next(node for node in lab.nodes.values() if node.stage.name == "read").result.json("report.json")
        _show_report(reports, console)


def _sampled_pairs(config: Config, store: Store, off: Tracker) -> Artifact | None:
    """The embedded world's pairs where an earlier run has left them in the store."""
    return PlanLab(config, store, off).pairs().artifact


def _show_row(
    number: int, row: dict[str, Any], sides: tuple[str, ...], tokenizer: Any, tokens: TokenSpec, console: Console
) -> None:
    text = render_prompt(tokens.template, row["prompt"], tokenizer)
    labels = {name: row[name] for name in row if name.endswith("_response_id") or name.startswith("is_response_")}
    said = ", ".join(f"{name} {value}" for name, value in labels.items())
    console.print(f"\n  row {number}, split {row.get('split', 'train')}" + (f": {said}" if said else ""))
    for k, side in enumerate(sides):
        encoded = encode(
            tokenizer, text, row[side], max_length=tokens.max_length, max_prompt_length=tokens.max_prompt_length
        )
        if k == 0:
            _line("masked", encoded.prompt_ids, encoded.truncated_prompt, tokenizer, "dim", console)
        name = f"trained {k}" if len(sides) > 1 else "trained"
        _line(name, encoded.response_ids, encoded.truncated_response, tokenizer, "green", console)
        _warn(encoded, console)


def _line(name: str, ids: tuple[int, ...], cut: bool, tokenizer: Any, style: str, console: Console) -> None:
    # token by token, so that the borders of tokens and the special ones among them are seen
    pieces = "|".join(tokenizer.decode([i]) for i in ids)
    cut_word = ", cut" if cut else ""
    console.print(
        f"    {name:10}{len(ids):5} tokens{cut_word}: [{style}]{escape(repr(pieces)[1:-1])}[/]",
        highlight=False,
        soft_wrap=True,
    )


def _warn(encoded: Encoded, console: Console) -> None:
    if encoded.dropped:
        console.print("    [red]no response token fits: this row is dropped[/]")


def _show_lengths(measured: dict[str, Any], tokens: TokenSpec, console: Console) -> None:
    limits = {"prompt": tokens.max_prompt_length, "response": "", "whole": tokens.max_length}
    table = Table(title="lengths in tokens", caption="too long: rows with a prompt or response that is cut")
    for heading in ("table", "rows", "of", "p50", "p90", "p99", "max", "limit", "too long"):
        table.add_column(heading, justify="left" if heading in ("table", "of") else "right")
    for name, found in measured.items():
        for part, limit in limits.items():
            if f"{part}_tokens" in found and not (part == "whole" and name == "prompts"):
                values = [f"{v:.0f}" for v in found[f"{part}_tokens"].values()]
                first = (name, str(found["rows"])) if part == "prompt" else ("", "")
                table.add_row(*first, part, *values, str(limit), str(found["too_long"]) if part == "prompt" else "")
    console.print(table)


def _show_report(report: dict[str, Any], console: Console) -> None:
    """What validation kept and dropped by which rule, and the statistics of the labels, table by table."""
    parts = {report["table"]: report} | {n: v for n, v in report.items() if isinstance(v, dict) and "n_rows" in v}
    # of a table that was laid out otherwise, its own rows come first
    parts.pop("source", None)
    for name, part in parts.items():
        steps = ([part["source"]] if "source" in part else []) + [part]
        for step in steps:
            dropped = ", ".join(f"{rule} {count}" for rule, count in step["dropped"].items()) or "none"
            console.print(f"{name}: {step['n_rows']} rows, {step['n_kept']} kept; dropped: {dropped}", highlight=False)
            for examples in step["examples"].values():
                for example in examples:
                    console.print(f"  {escape(example)}", highlight=False, soft_wrap=True)
        for key, value in part["statistics"].items():
            console.print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {value}", highlight=False)
    for key in ("drawn", "splits", "pairs_made"):
        if key in report:
            counts = ", ".join(f"{name} {count}" for name, count in report[key].items())
            console.print(f"{key.replace('_', ' ')}: {counts}", highlight=False)
