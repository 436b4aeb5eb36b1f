"""Canonical JSON, keys and the files that everything is written with."""

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_tools import Process, strict, wait_until

from alignbench.errors import StoreError
from alignbench.jsonio import atomic_write_json, canonical, plain, read_json, read_jsonl, write_jsonl
from alignbench.store import artifact_key

# canonical JSON and keys

SCALARS = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=12)


def reorder(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reorder(value[name]) for name in reversed(value)}
    return [reorder(v) for v in value] if isinstance(value, list) else value


@given(VALUES)
def test_canonical_text_forgets_key_order_and_nothing_else(value: Any) -> None:
    text = canonical(value)
    assert canonical(reorder(value)) == text
    assert strict(json.loads(text)) == strict(plain(value))
    assert canonical(json.loads(text)) == text


PARTS = st.fixed_dictionaries(
    {
        "stage": st.text(min_size=1),
        "version": st.integers(0, 9),
        "spec": st.dictionaries(st.text(), VALUES, max_size=3),
        "inputs": st.dictionaries(st.text(), st.text("0123456789abcdef", min_size=32, max_size=32), max_size=2),
        "seed": st.integers(),
    }
)


@given(PARTS, PARTS, st.sets(st.sampled_from(["stage", "version", "spec", "inputs", "seed"])))
def test_key_changes_exactly_when_a_part_changes(old: dict, new: dict, changed: set[str]) -> None:
    mixed = old | {name: new[name] for name in changed}
    key = artifact_key(**old)
    assert len(key) == 32
    assert int(key, 16) >= 0
    assert (artifact_key(**mixed) == key) == (strict(plain(mixed)) == strict(plain(old)))
    assert artifact_key(**reorder(old)) == key


def test_key_is_the_same_in_every_release() -> None:
    # Written down on purpose: a change of the key's recipe silently orphans every store in the world.
    assert artifact_key("prefer", 1, {"beta": 0.1}, {"pairs": "0" * 32}, 3) == "69077e742bf6dbc47e4683f12fe77d71"


@dataclass
class Inner:
    eta: float


@dataclass
class Spec:
    beta: float = 1
    margin: float | None = 0
    weights: tuple[float, ...] = (1, 2)
    mixed: tuple[int, float] = (1, 2)
    named: dict[str, float] = field(default_factory=lambda: {"a": 3})
    nested: list[list[float]] = field(default_factory=lambda: [[4]])
    inner: Inner = field(default_factory=lambda: Inner(5))
    count: int = 6
    either: int | float = 7


def test_ints_in_float_fields_are_floats() -> None:
    floats = Spec(1.0, 0.0, (1.0, 2.0), (1, 2.0), {"a": 3.0}, [[4.0]], Inner(5.0))
    assert canonical(Spec()) == canonical(floats)
    assert '"count":6,' in canonical(Spec())
    assert '"either":7,' in canonical(Spec())
    assert canonical(replace(Spec(), margin=None)) != canonical(Spec())
    assert canonical(json.loads(canonical(Spec()))) == canonical(Spec())


def test_negative_zero_and_tuples() -> None:
    assert canonical({"x": -0.0, "y": (1, (2,))}) == canonical({"y": [1, [2]], "x": 0.0}) == '{"x":0.0,"y":[1,[2]]}'


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (float("nan"), "nan"),
        (float("-inf"), "inf"),
        (Path("/a"), "path"),
        (np.float32(1), r"\.item\(\)"),
        (np.float64(1), r"\.item\(\)"),
        (np.int64(1), r"\.item\(\)"),
        (np.ones(2), r"\.tolist\(\)"),
        ({1, 2}, "set"),
        (b"x", "bytes"),
        ({1: 2}, "keys are str"),
        (Colour.RED, "Colour"),
        (Spec, "type"),
        ("\ud800", "surrogates"),
        (Inner(10**400), "too large"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(value: Any, hint: str) -> None:
    with pytest.raises(TypeError, match=hint) as caught:
        canonical({"a": [0, value]})
    assert "value.a[1]" in str(caught.value)


def test_unresolvable_annotations_are_not_guessed() -> None:
    @dataclass
    class Broken:
        beta: "Nowhere"  # noqa: F821  (the point of the test)

    with pytest.raises(NameError, match="Nowhere"):
        canonical(Broken(1))


# files


def test_jsonl_round_trip_and_errors(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\nc\x85", "x": 0.1}, [1, None], "ü"]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(StoreError, match="line 2"):
        read_jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(StoreError, match="absent"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(TypeError, match=r"row 1\.x"):
        write_jsonl(tmp_path / "rows.jsonl", [{"x": 1}, {"x": float("nan")}])


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "record.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="nan"):
        atomic_write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_atomic_write_is_never_seen_half(tmp_path: Path, start: Callable[..., Process]) -> None:
    writer, path = start("records", tmp_path), tmp_path / "record.json"
    wait_until(path.exists, writer)
    for _ in range(200):
        record = read_json(path)
        assert record["pad"] == [record["n"]] * 2000
    writer.kill()
    record = read_json(path)
    assert record["pad"] == [record["n"]] * 2000
