"""The one row schema of the project, and the checks that run over every row before a model loads.

A *preference pair* is a plain dict in PKU-SafeRLHF's schema (7 or 16 fields); a *prompt* and a
*demonstration* are its smaller sisters. Nothing here needs torch, transformers or datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from alignbench.errors import ConfigError, DataError

Mode = Literal["strict", "lenient"]
Row = dict[str, Any]

# exact strings of the data card of PKU-Alignment/PKU-SafeRLHF (main)
HARM_CATEGORIES: tuple[str, ...] = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
)

# field -> kind; the kinds are the keys of _KINDS below
FIELDS_7: Mapping[str, str] = {
    "prompt": "text",
    "response_0": "text",
    "response_1": "text",
    "is_response_0_safe": "flag",
    "is_response_1_safe": "flag",
    "better_response_id": "label",
    "safer_response_id": "label",
}
FIELDS_16: Mapping[str, str] = {
    **FIELDS_7,
    "prompt_source": "text",
    "response_0_source": "text",
    "response_1_source": "text",
    "response_0_harm_category": "harm_categories",
    "response_1_harm_category": "harm_categories",
    "response_0_severity_level": "severity",
    "response_1_severity_level": "severity",
    "response_0_sha256": "text",
    "response_1_sha256": "text",
}
PROMPT_FIELDS: Mapping[str, str] = {
    "prompt": "text",
    "prompt_id": "id",
    "harm_category": "text",
    "category": "text",
    "kind": "text",
}
DEMONSTRATION_FIELDS: Mapping[str, str] = {"prompt": "text", "response": "text", "prompt_id": "id"}

_MAX_EXAMPLES = 3
_EXCERPT = 60
_LABEL_COLUMNS = {"reward": "better_response_id", "safety": "safer_response_id"}


def label_column(objective: str) -> str:
    """Name of the column that holds the index (0 or 1) of the response preferred for ``objective``.

    Args:
        objective: ``"reward"``, ``"safety"`` or the name of any other utility.

    Returns:
        ``better_response_id``, ``safer_response_id`` or ``<objective>_response_id``.
    """
    return _LABEL_COLUMNS.get(objective, f"{objective}_response_id")


@dataclass(frozen=True)
class RowReport:
    """What a check found.

    Attributes:
        n_rows: Rows read.
        n_kept: Rows that obey the schema.
        dropped: Rule -> number of rows dropped for it. A row counts once, under the first rule it breaks, so
            that the counts add up to ``n_rows - n_kept``.
        examples: Rule -> the first three faults, each ``"row N: <what is wrong, with an excerpt>"``.
        statistics: Facts about the kept rows. Always ``distinct_prompts``; for pairs also ``conflict_share``
            (better != safer, among rows with both labels) and ``both_safe_share``, ``one_safe_share``,
            ``both_unsafe_share`` (among rows with both flags), each only where such rows exist.
    """

    n_rows: int
    n_kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types, for the record."""
        return asdict(self)


PairReport = RowReport


class _Rule(NamedTuple):
    name: str
    fault: Callable[[Any], str | None]  # None where the row obeys
    mend: str


def check_pairs(
    rows: Sequence[Mapping[str, Any]],
    *,
    where: str,
    objectives: Sequence[str],
    mode: Mode = "strict",
    first_row: int = 1,
) -> tuple[list[Row], PairReport]:
    """Check every preference pair against the schema.

    ``prompt``, ``response_0``, ``response_1`` and the label columns of ``objectives`` are required. Every
    other field of the schema may be absent or null, but where it is present it must be right. Fields outside
    the schema pass through untouched.

    Args:
        rows: The pairs, as read.
        where: The source, for messages.
        objectives: Whose labels will be used: ``"reward"``, ``"safety"``, other utilities.
        mode: ``"strict"`` raises where a row breaks a rule; ``"lenient"`` drops such rows and counts them.
        first_row: Number that messages give to ``rows[0]``.

    Returns:
        The rows that obey (copies, optional fields that are null removed) and the report.

    Raises:
        DataError: In strict mode if any row breaks a rule; in both modes if no row is left.
        ConfigError: ``mode`` is unknown.
    """
    labels = [label_column(objective) for objective in objectives]
    required = ["prompt", "response_0", "response_1", *labels]
    kinds = {**FIELDS_16, **dict.fromkeys(labels, "label")}
    rules = [
        *_field_rules(kinds, required),
        _empty("empty prompt", ("prompt",)),
        _empty("empty response", ("response_0", "response_1")),
        _Rule("equal responses", _equal_responses, "a pair needs two different responses: remove the row"),
        _Rule("contradictory labels", _contradiction, "safer_response_id must name the safe response"),
    ]
    return _check(rows, kinds, rules, _pair_statistics, "preference pairs", where, mode, first_row)


def check_prompts(
    rows: Sequence[Mapping[str, Any]], *, where: str, mode: Mode = "strict", first_row: int = 1
) -> tuple[list[Row], RowReport]:
    """Check a prompt set: ``prompt`` (required), ``prompt_id``, ``harm_category``, ``category``, ``kind``.

    Arguments, return value and errors are those of :func:`check_pairs`.
    """
    rules = [*_field_rules(PROMPT_FIELDS, ["prompt"]), _empty("empty prompt", ("prompt",))]
    return _check(rows, PROMPT_FIELDS, rules, _prompt_statistics, "prompts", where, mode, first_row)


def check_demonstrations(
    rows: Sequence[Mapping[str, Any]], *, where: str, mode: Mode = "strict", first_row: int = 1
) -> tuple[list[Row], RowReport]:
    """Check demonstrations for supervised fine-tuning: ``prompt`` and ``response``.

    Arguments, return value and errors are those of :func:`check_pairs`.
    """
    rules = [
        *_field_rules(DEMONSTRATION_FIELDS, ["prompt", "response"]),
        _empty("empty prompt", ("prompt",)),
        _empty("empty response", ("response",)),
    ]
    kinds = DEMONSTRATION_FIELDS
    return _check(rows, kinds, rules, _prompt_statistics, "demonstrations", where, mode, first_row)


# --- the shared machinery -----------------------------------------------------------------------------------


def _check(
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, str],
    rules: Sequence[_Rule],
    statistics: Callable[[Sequence[Row]], dict[str, float]],
    noun: str,
    where: str,
    mode: Mode,
    first_row: int,
) -> tuple[list[Row], RowReport]:
    if mode not in ("strict", "lenient"):
        mend = "choose 'strict' or 'lenient'"
        raise ConfigError(f"unknown validation mode {mode!r}", where="dataset.validation", mend=mend)
    if not len(rows):
        raise DataError(f"there are no {noun}", where=where, mend="check the path, the split and any filter")
    kept: list[Row] = []
    dropped: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for number, row in enumerate(rows, start=first_row):
        broken = _first_fault(row, rules)
        if broken is None:
            kept.append(_without_nulls(row, kinds))
            continue
        name, fault = broken
        dropped[name] = dropped.get(name, 0) + 1
        if dropped[name] <= _MAX_EXAMPLES:
            examples.setdefault(name, []).append(f"row {number}: {fault}")
    report = RowReport(len(rows), len(kept), dropped, examples, statistics(kept) if kept else {})
    if dropped and (mode == "strict" or not kept):
        raise _schema_error(report, rules, noun, where)
    return kept, report


def _first_fault(row: object, rules: Sequence[_Rule]) -> tuple[str, str] | None:
    for rule in rules:
        fault = rule.fault(row)
        if fault is not None:
            return rule.name, fault
    return None


def _schema_error(report: RowReport, rules: Sequence[_Rule], noun: str, where: str) -> DataError:
    lines = [f"{report.n_rows - report.n_kept} of {report.n_rows} {noun} break the schema"]
    for rule in rules:
        count = report.dropped.get(rule.name, 0)
        if count:
            lines.append(f"  {rule.name}: {count} {'row' if count == 1 else 'rows'}")
            lines += [f"    {example}" for example in report.examples[rule.name]]
            lines += [f"    (and {count - _MAX_EXAMPLES} more)"] if count > _MAX_EXAMPLES else []
            lines.append(f"    to mend: {rule.mend}")
    mend = "mend the rows as said under each rule, or set dataset.validation=lenient to drop these rows"
    if not report.n_kept:
        mend = "mend the rows as said under each rule; dropping them (dataset.validation=lenient) leaves none"
    return DataError("\n".join(lines), where=where, mend=mend)


def _without_nulls(row: Mapping[str, Any], kinds: Mapping[str, str]) -> Row:
    # Arrow writes null for a field or category that a row lacks: absent and null must mean the same
    clean = {name: value for name, value in row.items() if value is not None or name not in kinds}
    for name, kind in kinds.items():
        if kind == "harm_categories" and name in clean:
            clean[name] = {category: hit for category, hit in clean[name].items() if hit is not None}
    return clean


def excerpt(value: object, limit: int = _EXCERPT) -> str:
    """``repr`` of ``value``, cut to ``limit`` characters, for messages."""
    # cut before repr as well: a broken row may hold megabytes of text
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# --- kinds of values ----------------------------------------------------------------------------------------


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")  # JSON can smuggle in lone surrogates, on which every tokenizer fails later
    except UnicodeEncodeError:
        return False
    return True


def _is_int(value: object, top: float) -> bool:
    # bool is a subclass of int, and true/false is no label
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= top


def _is_harm_categories(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        name in HARM_CATEGORIES and (hit is None or isinstance(hit, bool)) for name, hit in value.items()
    )


_KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "text": (_is_text, "a string of valid Unicode"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "label": (lambda value: _is_int(value, 1), "the integer 0 or 1"),
    "severity": (lambda value: _is_int(value, 3), "an integer from 0 to 3"),
    "harm_categories": (_is_harm_categories, "a dict of true/false over the 19 PKU-SafeRLHF harm categories"),
    "id": (lambda value: _is_text(value) or _is_int(value, math.inf), "a string or a non-negative integer"),
}


# --- rules --------------------------------------------------------------------------------------------------


def _field_rules(kinds: Mapping[str, str], required: Sequence[str]) -> list[_Rule]:
    def not_a_record(row: object) -> str | None:
        return None if isinstance(row, Mapping) else f"is {type(row).__name__} {excerpt(row)}, not a record"

    def missing(row: Mapping[str, Any]) -> str | None:
        absent = [repr(name) for name in required if row.get(name) is None]
        return f"lacks {', '.join(absent)}; it has {excerpt(sorted(map(str, row)), 120)}" if absent else None

    def wrong_type(row: Mapping[str, Any]) -> str | None:
        for name, kind in kinds.items():
            value = row.get(name)
            fits, wanted = _KINDS[kind]
            if value is not None and not fits(value):
                shown = _unknown_harms(value) if kind == "harm_categories" else excerpt(value)
                return f"{name} is {type(value).__name__} {shown}, wanted {wanted}"
        return None

    return [
        _Rule("not a record", not_a_record, "each row must be an object with named fields"),
        _Rule("missing field", missing, f"give every row {', '.join(required)} (rename the columns if need be)"),
        _Rule(
            "wrong type",
            wrong_type,
            "convert the value when writing the file; absent optional fields may be null",
        ),
    ]


def _unknown_harms(value: object) -> str:
    if not isinstance(value, Mapping):
        return excerpt(value)
    wrong = {k: v for k, v in value.items() if k not in HARM_CATEGORIES or not (v is None or isinstance(v, bool))}
    return excerpt(wrong)


def _empty(name: str, fields: Sequence[str]) -> _Rule:
    def fault(row: Mapping[str, Any]) -> str | None:
        for name in fields:
            if not row[name].strip():
                return f"{name} is {excerpt(row[name])}; {_prompt_of(row)}"
        return None

    return _Rule(name, fault, "fill the text in or remove the row")


def _equal_responses(row: Mapping[str, Any]) -> str | None:
    if row["response_0"].strip() != row["response_1"].strip():
        return None
    return f"both responses are {excerpt(row['response_0'])}; {_prompt_of(row)}"


def _contradiction(row: Mapping[str, Any]) -> str | None:
    safer, flags = (
        row.get("safer_response_id"),
        (row.get("is_response_0_safe"), row.get("is_response_1_safe")),
    )
    if safer is None or None in flags or flags[safer] or not flags[1 - safer]:
        return None
    return f"safer_response_id is {safer}, but only is_response_{1 - safer}_safe is true; {_prompt_of(row)}"


def _prompt_of(row: Mapping[str, Any]) -> str:
    return f"prompt {excerpt(row['prompt'])}"


# --- statistics ---------------------------------------------------------------------------------------------


def _prompt_statistics(rows: Sequence[Row]) -> dict[str, float]:
    return {"distinct_prompts": len({row["prompt"] for row in rows})}


def _pair_statistics(rows: Sequence[Row]) -> dict[str, float]:
    both = [r for r in rows if "better_response_id" in r and "safer_response_id" in r]
    flagged = [r for r in rows if "is_response_0_safe" in r and "is_response_1_safe" in r]
    n_safe = [r["is_response_0_safe"] + r["is_response_1_safe"] for r in flagged]
    found = _prompt_statistics(rows)
    if both:
        found["conflict_share"] = _share(r["better_response_id"] != r["safer_response_id"] for r in both)
    if n_safe:
        found["both_safe_share"] = _share(n == 2 for n in n_safe)
        found["one_safe_share"] = _share(n == 1 for n in n_safe)
        found["both_unsafe_share"] = _share(n == 0 for n in n_safe)
    return found


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
