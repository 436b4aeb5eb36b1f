"""Looking at a store and cleaning it: nothing that a kept record needs may go."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from store_tools import Process, produce

from alignbench.inventory import main, needed, users_of
from alignbench.jsonio import write_json
from alignbench.store import Artifact, Identity, Store

Keys = dict[str, str]


@pytest.fixture
def keys(store: Store) -> Keys:
    """base -> sft -> (sample, prefer); sample -> score; and an old experiment made from base."""
    made: Keys = {}
    for name, source in (
        ("base", None),
        ("sft", "base"),
        ("sample", "sft"),
        ("prefer", "sft"),
        ("score", "sample"),
        ("old", "base"),
    ):
        inputs = {} if source is None else {"start": made[source]}
        made[name] = store.obtain(Identity(name, 1, "thing", {"n": 1}, inputs, 0), produce)[0].key
    return made


def record(folder: Path, *stages: str) -> Path:
    (folder / "run").mkdir(parents=True)
    write_json(folder / "run" / "record.json", {"stages": [{"key": key} for key in stages]})
    return folder


def there(store: Store) -> set[str]:
    return {artifact.key for artifact in store.artifacts()}


def test_the_list_shows_sizes_ages_and_uses(store: Store, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    (store.root / "building" / "killed" / "work").mkdir(parents=True)
    (store.root / "building" / "killed" / "work" / "checkpoint").write_bytes(b"x" * 2048)
    assert main(["list", str(store.root), "--by", "stage"]) == 0
    text = capsys.readouterr().out
    assert "6 artifacts" in text
    cells = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.startswith("│")]
    rows = {stage: used for _, _, stage, _, _, used, _ in cells}
    assert rows == {"base": "2", "sft": "2", "sample": "1", "prefer": "0", "score": "0", "old": "0"}
    assert list(rows) == sorted(rows)
    assert "left behind: building/killed (2.0 KiB)" in text


def test_one_artifact_says_where_it_comes_from_and_goes_to(
    store: Store, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(store.root), keys["sft"][:8]]) == 0
    text = capsys.readouterr().out
    assert f"made from:  start {keys['base'][:12]} (base)" in text
    assert re.search(r"used by: .*\(sample\)", text)
    assert re.search(r"used by: .*\(prefer\)", text)
    assert "scored_tokens 12" in text
    assert json.loads(text.partition("spec:")[2]) == {"n": 1}
    assert main(["show", str(store.root), "zz"]) == 2
    assert "0 artifacts have a key" in capsys.readouterr().err


def test_verify_finds_damage_and_changes_nothing(store: Store, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store.root)]) == 0
    assert "6 artifacts checked, 0 damaged" in capsys.readouterr().out
    victim = store.root / "artifacts" / keys["sample"] / "rows.jsonl"
    victim.write_bytes(victim.read_bytes().replace(b"0.25", b"0.35"))  # as many bytes
    assert main(["verify", str(store.root)]) == 1
    text = capsys.readouterr().out
    assert f"{keys['sample'][:12]}: rows.jsonl: sha256 differs" in text
    assert main(["verify", str(store.root), keys["base"]]) == 0
    assert there(store) == set(keys.values())


def test_prune_shows_first_and_removes_only_what_no_record_needs(
    store: Store, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = record(tmp_path / "outputs", keys["score"])  # its inputs are needed too, at any depth
    command = ["prune", str(store.root), "--records", str(outputs), "--older-than", "0"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "nothing was changed" in text
    assert there(store) == set(keys.values())
    assert main([*command, "--yes"]) == 0
    assert there(store) == {keys[name] for name in ("base", "sft", "sample", "score")}
    assert "removed" in capsys.readouterr().out
    assert not list((store.root / "building").iterdir())
    # what is gone is made again when asked for
    again, built = store.obtain(Identity("prefer", 1, "thing", {"n": 1}, {"start": keys["sft"]}, 0), produce)
    assert built
    assert again.key == keys["prefer"]


def test_young_artifacts_and_leftovers_stay_unless_asked(store: Store, keys: Keys, tmp_path: Path) -> None:
    (store.root / "damaged" / "x-0").mkdir()
    command = ["prune", str(store.root), "--records", str(record(tmp_path / "outputs", keys["sft"])), "--yes"]
    assert main(command) == 0
    assert there(store) == set(keys.values())
    assert main([*command, "--leftovers"]) == 0
    assert not (store.root / "damaged" / "x-0").exists()
    assert there(store) == set(keys.values())


def test_a_folder_without_records_and_a_store_in_use_are_refused(
    store: Store, keys: Keys, tmp_path: Path, start: Callable[..., Process], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", str(store.root), "--older-than", "0", "--yes", "--records"]
    (tmp_path / "empty").mkdir()
    assert main([*command, str(tmp_path / "empty")]) == 2
    assert "no record.json below" in capsys.readouterr().err
    start("build").wait_for("BUILDING")
    assert main([*command, str(record(tmp_path / "outputs", keys["sft"]))]) == 2
    assert "being built" in capsys.readouterr().err
    assert there(store) >= set(keys.values())
    assert main(["list", str(tmp_path / "elsewhere")]) == 2


def test_what_is_needed_and_used(store: Store, keys: Keys) -> None:
    artifacts: dict[str, Artifact] = {artifact.key: artifact for artifact in store.artifacts()}
    gone = "f" * 32
    assert needed(artifacts, [{"stages": [{"key": keys["old"]}, {"key": gone}]}]) == {keys["old"], keys["base"], gone}
    assert users_of(artifacts)[keys["base"]] == {keys["sft"], keys["old"]}
