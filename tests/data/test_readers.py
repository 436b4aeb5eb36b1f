import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignbench.data import schema
from alignbench.data.readers import Source, fingerprint, read_rows, split_by_prompt
from alignbench.errors import AlignbenchError, ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
# U+2028 and U+0085 are line breaks for str.splitlines, not for JSON lines
TEXTS = ["plain", "two\nlines", 'quote " and \\', "é 漢字 🙂", "sep\u2028arator\u0085", "{braces}"]


def seven(n=6):
    return [
        {
            "prompt": f"{TEXTS[i % len(TEXTS)]} {i // 2}",
            "response_0": f"yes {i}",
            "response_1": f"no {i}",
            "is_response_0_safe": bool(i % 2),
            "is_response_1_safe": True,
            "better_response_id": i % 2,
            "safer_response_id": 1,
        }
        for i in range(n)
    ]


def sixteen(n=6):
    harms = dict.fromkeys(schema.HARM_CATEGORIES, False)
    extra = {
        "prompt_source": "Alpaca3-8B",
        "response_0_source": "Alpaca-7B",
        "response_1_source": "Alpaca2-7B",
        "response_0_harm_category": {**harms, "Drugs": True},
        "response_1_harm_category": harms,
        "response_0_severity_level": 1,
        "response_1_severity_level": 0,
        "response_0_sha256": "0" * 64,
        "response_1_sha256": "1" * 64,
    }
    return [{**row, **extra} for row in seven(n)]


def lines(rows, ascii_only=False):
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def write_saved(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))


WRITERS = {
    "pairs.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "escaped.jsonl": lambda path, rows: path.write_bytes(lines(rows, ascii_only=True)),
    "bom_crlf_blank.jsonl": lambda path, rows: path.write_bytes(
        b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n") + b"\r\n\n"
    ),
    "pairs.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "lines.json": lambda path, rows: path.write_bytes(lines(rows)),
    "pairs.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "pairs.jsonl.xz": lambda path, rows: path.write_bytes(lzma.compress(lines(rows))),
    "pairs.parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    "saved": write_saved,
}


def tree(path):
    return sorted(str(p) for p in path.rglob("*"))


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("make", [seven, sixteen])
def test_every_variant_gives_equal_rows_and_writes_nothing(tmp_path, name, make):
    rows = make()
    WRITERS[name](tmp_path / name, rows)
    before = tree(tmp_path)
    found = read_rows(Source(str(tmp_path / name)))
    fingerprint(Source(str(tmp_path / name)))
    assert found == rows
    assert tree(tmp_path) == before
    kept, report = schema.check_pairs(found, where=name, objectives=["reward", "safety"])
    assert kept == rows
    assert report.n_kept == len(rows)


def test_csv_with_quoted_newlines(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_bytes(b'\xef\xbb\xbfid,prompt\n1,"a, b"\n2,"c\nd"\n')
    assert read_rows(Source(str(file))) == [{"id": "1", "prompt": "a, b"}, {"id": "2", "prompt": "c\nd"}]
    file.write_text("id,prompt\n1,a\n2,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3: has not as many fields"):
        read_rows(Source(str(file)))


# --- broken files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.jsonl.xz", "lines.json"])
def test_broken_lines_are_named_with_file_and_number(tmp_path, name):
    good = lines(seven(2)).splitlines(keepends=True)
    faulty = [b'{"prompt": "cut of\n', b"\n", b"[1, 2]\n", b'{"prompt": "\xff"}\n', b"{'single': 1}\n"]
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    file = tmp_path / name
    file.write_bytes(pack(good[0] + b"".join(faulty) + good[1]))
    with pytest.raises(DataError) as caught:
        read_rows(Source(str(file)))
    message = str(caught.value)
    assert "4 lines are broken" in message
    assert "line 2: " in message
    assert "cut of" in message
    assert "line 4: holds list [1, 2], not an object" in message
    assert "line 5: " in message
    assert "line 6" not in message
    assert "(and 1 more)" in message
    assert str(file) in message
    assert "mend:" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n{"a": ]', "line 2"),
        ("a.json", b'[{"a": 1}, 3]', "element 2"),
        ("a.json", b'{\n "a": 1\n}', "line 1"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 1000, mtime=0)[:-9], "cannot be read"),
        ("a.jsonl.xz", lzma.compress(b"{}\n" * 9)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1 not parquet", "cannot be read"),
        ("a.txt", b"hello", "unknown kind of file"),
        ("a.parquet.gz", b"", "unknown kind of file"),
    ],
)
def test_damaged_or_unknown_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(Source(str(file)))
    assert caught.value.mend
    assert str(file) in caught.value.where


@pytest.mark.parametrize("path", ["nothing.jsonl", "data/nothing.jsonl", "/no/such/folder", "./a/b", "a/b/c"])
def test_absent_path_that_is_no_hub_id(path):
    for use in (read_rows, fingerprint):
        with pytest.raises(DataError, match="no file or folder") as caught:
            use(Source(path))
        assert "parquet" in caught.value.mend


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "test-of-folders"  # a split's name above the folder must not count
    parts = {
        "data/Alpaca-7B/train.jsonl": 2,
        "data/Alpaca2-7B/train.jsonl": 3,
        "data/Alpaca-7B/test.jsonl": 1,
    }
    for name, n in parts.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lines([{**row, "from": name} for row in seven(n)]))
    (root / "dataset_infos.json").write_text("{}", encoding="utf-8")
    (root / "README.md").write_text("card", encoding="utf-8")
    (root / ".cache").mkdir()
    (root / ".cache/train.jsonl").write_text("broken", encoding="utf-8")
    return root


def test_folder_selects_by_split_and_config(folder):
    def origin(**options):
        return [row["from"].removeprefix("data/") for row in read_rows(Source(str(folder), **options))]

    assert origin(split="test") == ["Alpaca-7B/test.jsonl"]
    assert origin(split="train") == ["Alpaca-7B/train.jsonl"] * 2 + ["Alpaca2-7B/train.jsonl"] * 3
    assert origin(split="train", config="alpaca-7b") == ["Alpaca-7B/train.jsonl"] * 2
    assert origin(config="alpaca2-7b") == ["Alpaca2-7B/train.jsonl"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "splits test, train"),
        ({"split": "validation"}, "validation"),
        ({"split": "train[:10]"}, "hub data sets only"),
        ({"split": "train", "config": "alpaca9"}, "alpaca9"),
    ],
)
def test_folder_refuses_what_is_open_or_unknown(folder, options, message):
    for use in (read_rows, fingerprint):
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            use(Source(str(folder), **options))


def test_folder_without_split_names_serves_as_train(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(seven(1)))
    (tmp_path / "b.jsonl").write_bytes(lines(seven(2)))
    assert read_rows(Source(str(tmp_path))) == read_rows(Source(str(tmp_path), split="train"))
    with pytest.raises(ConfigError, match="'test'"):
        read_rows(Source(str(tmp_path), split="test"))


def test_shards_and_innermost_split_name(tmp_path):
    inner = tmp_path / "helpful-eval"
    inner.mkdir()
    (inner / "train-00000-of-00002.jsonl").write_bytes(lines([{"n": 0}]))
    (inner / "train-00001-of-00002.jsonl").write_bytes(lines([{"n": 1}]))
    for split in (None, "train"):
        assert read_rows(Source(str(tmp_path), split=split)) == [{"n": 0}, {"n": 1}]


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        read_rows(Source(str(tmp_path)))


def test_single_file_refuses_what_it_cannot_honour(tmp_path):
    (tmp_path / "my-train.jsonl").write_bytes(lines(seven(1)))
    (tmp_path / "data.jsonl").write_bytes(lines(seven(1)))
    for name, options in [("my-train.jsonl", {"split": "test"}), ("data.jsonl", {"config": "alpaca-7b"})]:
        with pytest.raises(ConfigError):
            read_rows(Source(str(tmp_path / name), **options))
    for name, options in [("my-train.jsonl", {"split": "train"}), ("data.jsonl", {"split": "test"})]:
        assert len(read_rows(Source(str(tmp_path / name), **options, revision="v0"))) == 1


def test_saved_dataset_dict(tmp_path):
    import datasets

    parts = {"train": seven(4), "test": sixteen(2)}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    for name, rows in parts.items():
        assert read_rows(Source(str(tmp_path / "saved"), split=name)) == rows
    with pytest.raises(ConfigError, match="several splits") as caught:
        read_rows(Source(str(tmp_path / "saved")))
    assert "test, train" in caught.value.mend
    prints = {fingerprint(Source(str(tmp_path / "saved"), split=name)) for name in parts}
    assert len(prints) == 2


def test_damaged_saved_dataset(tmp_path):
    write_saved(tmp_path / "saved", seven())
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"junk")
    with pytest.raises(DataError, match="saved data set cannot be read"):
        read_rows(Source(str(tmp_path / "saved")))
    (tmp_path / "saved/state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="saved data set cannot be read"):
        fingerprint(Source(str(tmp_path / "saved")))


# --- fingerprints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_fingerprint_changes_exactly_with_the_content(tmp_path, name):
    prints = []
    for i, rows in enumerate([seven(), seven(), seven(5)]):
        place = tmp_path / str(i)
        place.mkdir()
        WRITERS[name](place / name, rows)
        if (place / name).is_file():
            os.utime(place / name, (i, i))
        prints.append(fingerprint(Source(str(place / name))))
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]
    assert prints[0].startswith("sha256:")


def test_fingerprint_sees_content_not_name_or_compression(tmp_path):
    content = lines(seven())
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(content)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(content, mtime=7))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(content, compresslevel=1, mtime=8))
    assert len({fingerprint(Source(str(file))) for file in tmp_path.iterdir()}) == 1


def test_fingerprint_of_a_folder_covers_names_contents_and_selection_only(folder):
    def prints(**options):
        return fingerprint(Source(str(folder), **options))

    train, test = prints(split="train"), prints(split="test")
    assert train != test
    (folder / "data/Alpaca-7B/test.jsonl").write_bytes(lines(seven(4)))
    (folder / "README.md").write_text("another card", encoding="utf-8")
    assert prints(split="train") == train
    assert prints(split="test") != test
    (folder / "data/Alpaca-7B/train.jsonl").rename(folder / "data/Alpaca-7B/train2-train.jsonl")
    assert prints(split="train") != train


def test_leftover_caches_beside_a_saved_dataset_do_not_count(tmp_path):
    write_saved(tmp_path / "saved", seven())
    before = fingerprint(Source(str(tmp_path / "saved")))
    (tmp_path / "saved/cache-0123.arrow").write_bytes(b"left by map()")
    assert fingerprint(Source(str(tmp_path / "saved"))) == before


# --- the hub ------------------------------------------------------------------------------------------------

HUB_ID = "PKU-Alignment/PKU-SafeRLHF"


@pytest.mark.parametrize("revision", [None, "", "main"])
def test_hub_needs_a_pinned_revision(revision):
    for use in (read_rows, fingerprint):
        with pytest.raises(ConfigError, match="revision") as caught:
            use(Source(HUB_ID, revision=revision))
        assert "commit or tag" in caught.value.mend


def test_hub_fingerprint_needs_no_network():
    assert fingerprint(Source(HUB_ID, "alpaca-7b", "train", "9421ffa")) == (f"hub:{HUB_ID}@9421ffa[alpaca-7b,train]")


def test_hub_offline_says_what_is_missing_and_where_to_put_it(tmp_path):
    code = f"""
from alignbench.data.readers import Source, read_rows
from alignbench.errors import DataError
try:
    read_rows(Source({HUB_ID!r}, "default", "train", "9421ffa"))
except DataError as error:
    print(error)
"""
    # in a process of its own, because huggingface_hub reads the variable when it is imported
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    message = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert f"{HUB_ID} at revision 9421ffa, config default, split train" in message.stdout
    assert f"hf download --repo-type dataset {HUB_ID} --revision 9421ffa" in message.stdout
    assert "$HF_HOME" in message.stdout


def test_hub_rows_pass_the_pin_on(monkeypatch):
    import datasets

    calls = []

    def load(path, name, *, split, revision):
        calls.append((path, name, split, revision))
        parts = {"train": datasets.Dataset.from_list(seven(2)), "test": datasets.Dataset.from_list(seven(1))}
        return parts[split] if split else datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(Source(HUB_ID, split="train", revision="v0")) == seven(2)
    assert calls == [(HUB_ID, None, "train", "v0")]
    with pytest.raises(ConfigError, match="several splits"):
        read_rows(Source(HUB_ID, revision="v0"))


def test_a_local_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.jsonl").write_bytes(lines(seven(1)))
    monkeypatch.chdir(tmp_path)
    assert read_rows(Source("owner/name")) == seven(1)


# --- splits -------------------------------------------------------------------------------------------------

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def numbered(n):
    return [{"prompt": f"prompt {i // 3}", "n": i} for i in range(n)]


def place_of(parts):
    return {row["prompt"]: name for name, rows in parts.items() for row in rows}


def test_split_is_disjoint_complete_and_about_right():
    rows = numbered(3000)
    parts = split_by_prompt(rows, FRACTIONS, seed=0)
    prompts = {name: {row["prompt"] for row in part} for name, part in parts.items()}
    assert list(parts) == list(FRACTIONS)
    assert sorted(row["n"] for part in parts.values() for row in part) == list(range(3000))
    assert sum(len(found) for found in prompts.values()) == 1000
    # 1000 prompts: four standard deviations of a binomial share
    assert abs(len(prompts["train"]) - 800) < 4 * (1000 * 0.8 * 0.2) ** 0.5


@given(st.randoms(use_true_random=False), st.integers(0, 2**31), st.integers(60, 120))
def test_split_depends_on_the_prompt_and_seed_alone(random, seed, keep):
    rows = numbered(300)
    fractions = {"train": 0.5, "test": 0.5}
    full = place_of(split_by_prompt(rows, fractions, seed))
    shuffled = rows[:]
    random.shuffle(shuffled)
    reversed_names = dict(reversed(fractions.items()))
    assert place_of(split_by_prompt(shuffled, reversed_names, seed)) == full
    part = place_of(split_by_prompt(shuffled[:keep], fractions, seed))
    assert part.items() <= full.items()


def test_another_seed_splits_otherwise():
    rows = numbered(300)
    assert split_by_prompt(rows, FRACTIONS, 0) != split_by_prompt(rows, FRACTIONS, 1)
    assert split_by_prompt(rows, FRACTIONS, 0) == split_by_prompt(rows, FRACTIONS, 0)


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 0.0, "b": 1.0}])
def test_split_refuses_bad_fractions(fractions):
    with pytest.raises(ConfigError, match="sum to 1"):
        split_by_prompt(numbered(30), fractions, 0)


def test_an_empty_part_is_an_error():
    with pytest.raises(AlignbenchError, match="no prompt"):
        split_by_prompt(numbered(3), FRACTIONS, 0)


# --- real data ----------------------------------------------------------------------------------------------

SHARED = ROOT.parent / "shared" / "data"


def real(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"the public data file shared/data/{name} is not on this machine")
    return Source(str(SHARED / name))


def test_real_hh_rlhf():
    rows = read_rows(real("hh_rlhf/harmless-base-test.jsonl.gz"))
    assert len(rows) == 2312
    cut = "\n\nAssistant:"
    pairs = []
    for row in rows:
        (prompt, chosen), (other, rejected) = (row[side].rsplit(cut, 1) for side in ("chosen", "rejected"))
        if prompt == other:
            pairs.append({"prompt": prompt, "response_0": chosen, "response_1": rejected, "safer_response_id": 0})
    kept, report = schema.check_pairs(pairs, where="hh", objectives=["safety"], mode="lenient")
    assert report.n_kept > 2200
    assert set(report.dropped) <= {"empty response", "equal responses"}
    parts = split_by_prompt(kept, {"train": 0.9, "test": 0.1}, seed=0)
    assert not {r["prompt"] for r in parts["train"]} & {r["prompt"] for r in parts["test"]}


def test_real_truthfulqa():
    for name in ("finetune_truth", "finetune_info"):
        rows = read_rows(real(f"truthfulqa/{name}.jsonl"))
        assert len(rows) == 22434
        assert {row["completion"] for row in rows} == {" yes", " no"}
    questions = read_rows(real("truthfulqa/TruthfulQA.csv"))
    assert len(questions) == 817
    schema.check_prompts([{"prompt": row["Question"]} for row in questions], where="TruthfulQA.csv")


@pytest.mark.parametrize(("name", "n"), [("safety_problem.json", 83), ("helpful_problem.json", 129)])
def test_real_prompt_sets(name, n):
    kept, report = schema.check_prompts(read_rows(real(f"prompts/{name}")), where=name)
    assert len(kept) == report.n_kept == n


def test_real_xstest():
    kept, _ = schema.check_prompts(read_rows(real("prompts/xstest_prompts.csv")), where="xstest")
    assert len(kept) == 450
