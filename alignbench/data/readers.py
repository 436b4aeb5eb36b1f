"""Rows from files, folders and the Hugging Face hub; their fingerprint; prompt-disjoint splits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from alignbench.data._formats import KNOWN_FILES, content_blocks, format_of, read_file
from alignbench.data.schema import Row
from alignbench.errors import ConfigError, DataError

_KNOWN = f"{KNOWN_FILES}, or a folder of such files or from save_to_disk"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")
# files that hub folders hold beside their data
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# the words by which `datasets` itself recognises splits in file names
_SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: A local file (.jsonl, .json, .csv, each also .gz or .xz; .parquet), a pattern of such files
            (``FOLDER/part_*.jsonl``), a folder written by `datasets.save_to_disk`, a folder of data files, or a hub id
            ``owner/name``. What exists locally wins.
        config: Hub configuration; for a folder of data files, the name of a sub-folder. None: the default
            one, all files.
        split: Split to read. A folder's files are chosen by the split's name in their names. None: the only
            one.
        revision: Commit or tag of a hub data set, required there; means nothing for local data.
    """

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


def read_rows(source: Source) -> list[Row]:
    """All rows of ``source``, unchecked against any schema (see :mod:`alignbench.data.schema`).

    Args:
        source: What to read. Nothing is written beside local data; hub data sets use the usual Hugging Face
            cache.

    Returns:
        Plain dicts, in the order of the file (of the sorted file names for a folder).

    Raises:
        DataError: The data are absent, damaged, of an unknown format, or the hub cannot be reached; for JSON
            lines with the file and the 1-based line number.
        ConfigError: A hub id without a fixed revision, or a split or config that the source lacks or leaves
            open.
    """
    path = _local_path(source)
    if path is None:
        return _read_hub(source)
    if _is_saved(path):
        return _read_saved(path, source)
    return [row for _, file in _data_files(path, source) for row in read_file(file)]


def fingerprint(source: Source) -> str:
    """Name of the content of ``source``, for artifact keys.

    Args:
        source: As for :func:`read_rows`.

    Returns:
        ``sha256:<hex>`` over the (decompressed) content of a file, or over relative names and contents of the
        files that the split and config select in a folder, whatever their location and time stamps;
        ``hub:<id>@<revision>[<config>,<split>]`` for a hub data set.

    Raises:
        DataError: The data are absent or damaged.
        ConfigError: As for :func:`read_rows`.
    """
    path = _local_path(source)
    if path is None:
        return f"hub:{source.path}@{source.revision}[{source.config or ''},{source.split or ''}]"
    # only the arrow files of a saved data set: its state.json differs between two saves of the same rows
    files = _saved_files(path, source) if _is_saved(path) else _data_files(path, source)
    if path.is_file():
        return f"sha256:{_digest(path)}"
    names_and_digests = json.dumps([(name, _digest(file)) for name, file in files])
    return f"sha256:{hashlib.sha256(names_and_digests.encode()).hexdigest()}"


def split_by_prompt(
    rows: Sequence[Mapping[str, Any]], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Any]]:
    """Split rows so that all rows of a prompt land in the same part.

    The part is a hash of the prompt's text (outer white space apart) and the seed alone: independent of the
    order of the rows and of the other rows, so that pairs and demonstrations on the same prompts split alike.

    Args:
        rows: Rows with ``prompt``.
        fractions: Part name -> expected share of the prompts; positive, summing to 1. The order of names is
            irrelevant.
        seed: Another seed gives another split.

    Returns:
        Part name -> its rows, in their order.

    Raises:
        ConfigError: The fractions are not positive or do not sum to 1.
        DataError: A part is empty.
    """
    names = sorted(fractions)
    shares = [fractions[name] for name in names]
    if not shares or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-9):
        raise ConfigError(
            f"the fractions of the splits are {dict(fractions)}", mend="give positive fractions that sum to 1"
        )
    edges = list(accumulate(shares))[:-1]
    parts: dict[str, list[Any]] = {name: [] for name in fractions}
    for row in rows:
        digest = hashlib.sha256(f"{seed}\0{row['prompt'].strip()}".encode()).digest()
        parts[names[bisect_right(edges, int.from_bytes(digest[:8], "big") / 2**64)]].append(row)
    empty = [name for name, part in parts.items() if not part]
    if empty:
        raise DataError(
            f"no prompt of {len(rows)} rows fell into the split {', '.join(empty)} of {dict(fractions)}",
            mend="enlarge its fraction, give more prompts, or change the split's seed",
        )
    return parts


def some_prompts(rows: Sequence[Row], most: int, seed: int, *, responses: int = 0) -> list[Row]:
    """The rows of `most` distinct prompts, and at most `responses` of each.

    What is kept depends on the texts and the seed alone, not on the order of the rows, and a larger number keeps what a
    smaller one kept.

    Args:
        rows: Rows with ``prompt`` (and ``response``, where some of a prompt's are asked for).
        most: Distinct prompts (outer white space apart); 0 keeps all.
        seed: Another seed keeps others.
        responses: Rows per prompt; 0 keeps all.

    Returns:
        The rows that are kept, in their order.
    """

    def drawn(*texts: str) -> bytes:
        return hashlib.sha256("\0".join(["some", str(seed), *texts]).encode()).digest()

    by_prompt: dict[str, list[int]] = {}
    for k, row in enumerate(rows):
        by_prompt.setdefault(row["prompt"].strip(), []).append(k)
    kept: list[int] = []
    for prompt in sorted(by_prompt, key=drawn)[: most or None]:
        own = by_prompt[prompt]
        kept += sorted(own, key=lambda k: drawn(prompt, rows[k]["response"]))[:responses] if responses else own
    return [rows[k] for k in sorted(kept)]


# --- finding the data ---------------------------------------------------------------------------------------


def _local_path(source: Source) -> Path | None:
    """The existing local path, or None for a hub id with a usable revision."""
    path = Path(source.path).expanduser()
    if path.exists() or _matching(path):
        return path
    if not _HUB_ID.fullmatch(source.path) or format_of(path):
        raise DataError(
            f"there is no file or folder {source.path!r}, and it is no hub id owner/name",
            where=f"{source.path} seen from {Path.cwd()}",
            mend=f"correct the path, or put the data there. Known: {_KNOWN}",
        )
    if source.revision in (None, "", "main"):
        given = "no revision" if not source.revision else "the moving revision 'main'"
        raise ConfigError(
            f"{source.path!r} is no local path, so it is read as a hub data set, and {given} is given",
            where=source.path,
            mend="set the source's revision to a commit or tag, for releases differ; or correct the path",
        )
    return None


def _matching(pattern: Path) -> list[tuple[str, Path]]:
    """(name, file) of the data files that a pattern in the last part of a path matches; empty for other paths."""
    if not any(mark in pattern.name for mark in "*?["):
        return []
    return sorted((file.name, file) for file in pattern.parent.glob(pattern.name) if file.is_file() and format_of(file))


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    for block in content_blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _data_files(path: Path, source: Source) -> list[tuple[str, Path]]:
    """(relative name, file) that the config and split of ``source`` select, sorted by name."""
    if path.is_file():
        _check_single_file(path, source)
        return [(path.name, path)]
    if not path.exists():
        _refuse_config(source, "a pattern of files")
        return _of_split(_matching(path), source)
    found = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file() and format_of(file) and file.name not in _NOT_DATA
    )
    found = [(name, file) for name, file in found if not any(part.startswith(".") for part in name.split("/"))]
    if not found:
        raise DataError("the folder holds no data files", where=source.path, mend=f"known: {_KNOWN}")
    return _all_shards(_of_split(_of_config(found, source), source), source)


def _all_shards(files: list[tuple[str, Path]], source: Source) -> list[tuple[str, Path]]:
    """The files themselves; refused where a name says `-of-00003` and not all three are there."""
    there: dict[tuple[str, int, str], set[int]] = {}
    for name, _ in files:
        found = _SHARD.fullmatch(name)
        if found:
            stem, number, count, rest = found.groups()
            there.setdefault((stem, int(count), rest), set()).add(int(number))
    for (stem, count, rest), numbers in there.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise DataError(
                f"{len(missing)} of {count} parts are missing: {stem}-{missing[0]:05}-of-{count:05}{rest}"
                + (", ..." if len(missing) > 1 else ""),
                where=source.path,
                mend="fetch the whole data set again",
            )
    return files


def _check_single_file(path: Path, source: Source) -> None:
    if not format_of(path):
        raise DataError(f"unknown kind of file {path.name!r}", where=source.path, mend=f"known: {_KNOWN}")
    _refuse_config(source, "a single file")
    named = _splits_named(path.name)
    if source.split and named and _canonical(source.split) not in named:
        raise ConfigError(
            f"split {source.split!r} is asked of a file whose name says {', '.join(sorted(named))}",
            where=source.path,
            mend="leave the split empty (null) to read this file, or give the file of that split",
        )
    _refuse_slice(source)


def _of_config(found: list[tuple[str, Path]], source: Source) -> list[tuple[str, Path]]:
    if source.config in (None, "default"):
        return found
    wanted = str(source.config).lower()
    chosen = [(name, file) for name, file in found if wanted in name.lower().split("/")[:-1]]
    if not chosen:
        folders = sorted({part for name, _ in found for part in name.split("/")[:-1]})
        raise ConfigError(
            f"there is no sub-folder for the config {source.config!r}",
            where=source.path,
            mend=f"choose one of {', '.join(folders)}" if folders else "leave the config empty (null)",
        )
    return chosen


def _of_split(found: list[tuple[str, Path]], source: Source) -> list[tuple[str, Path]]:
    _refuse_slice(source)
    names = ", ".join(name for name, _ in found[:6]) + (", ..." if len(found) > 6 else "")
    if source.split:
        wanted = _canonical(source.split)
        chosen = [(name, file) for name, file in found if wanted in (_splits_named(name) or _words(name))]
        if not chosen and (wanted != "train" or any(_splits_named(name) for name, _ in found)):
            raise ConfigError(
                f"no file name holds the split {source.split!r}",
                where=source.path,
                mend=f"choose another split, or leave it empty (null) for all files; there are {names}",
            )
        return chosen or found
    splits = set().union(*(_splits_named(name) for name, _ in found))
    if len(splits) > 1:
        raise ConfigError(
            f"the folder holds the splits {', '.join(sorted(splits))}, and none is chosen",
            where=source.path,
            mend="set the source's split; reading all would mix test rows into training",
        )
    return found


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _splits_named(name: str) -> set[str]:
    # the innermost part that names a split decides: `helpful-eval/train.jsonl` is a train file
    for part in reversed(name.split("/")):
        words = set(_words(part))
        found = {split for split, aliases in _SPLIT_WORDS.items() if words & set(aliases)}
        if found:
            return found
    return set()


def _canonical(split: str | None) -> str:
    lowered = (split or "").lower()
    return next((name for name, aliases in _SPLIT_WORDS.items() if lowered in aliases), lowered)


def _refuse_config(source: Source, kind: str) -> None:
    if source.config not in (None, "default"):
        raise ConfigError(
            f"config {source.config!r} means nothing for {kind}",
            where=source.path,
            mend="leave the config empty (null)",
        )


def _refuse_slice(source: Source) -> None:
    if source.split and "[" in source.split:
        raise ConfigError(
            f"the slice {source.split!r} works for hub data sets only",
            where=source.path,
            mend="name the split alone and limit the rows elsewhere",
        )


# --- `datasets` ---------------------------------------------------------------------------------------------


def _is_saved(path: Path) -> bool:
    return path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file())


def _saved_folder(path: Path, source: Source) -> Path:
    """The folder of the one data set that ``source`` means inside a save_to_disk folder."""
    _refuse_config(source, "a folder from save_to_disk")
    if not (path / "dataset_dict.json").is_file():
        own = _saved_state(path).get("_split")
        if source.split and own and source.split != own:
            raise ConfigError(
                f"the saved data set is the split {own!r}, not {source.split!r}",
                where=source.path,
                mend="leave the split empty (null), or give the folder of that split",
            )
        return path
    splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
    split = source.split or (splits[0] if len(splits) == 1 else None)
    if split not in splits:
        fault = f"has no split {split!r}" if split else "has several splits, and none is chosen"
        raise ConfigError(
            f"the saved data set {fault}",
            where=source.path,
            mend=f"set the source's split to one of {', '.join(splits)}",
        )
    return path / str(split)


def _saved_state(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _saved_files(path: Path, source: Source) -> list[tuple[str, Path]]:
    # as listed, not by pattern: `datasets` leaves cache-*.arrow files of later maps in the same folder
    folder = _saved_folder(path, source)
    return sorted((str(e["filename"]), folder / e["filename"]) for e in _saved_state(folder)["_data_files"])


def _unreadable(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"the saved data set cannot be read: {error}",
        where=str(folder),
        mend="save it again with save_to_disk",
    )


def _read_saved(path: Path, source: Source) -> list[Row]:
    folder = _saved_folder(path, source)
    import datasets  # slow to import, and most runs never need it

    try:
        return list(datasets.load_from_disk(str(folder), keep_in_memory=True).to_list())
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error


def _read_hub(source: Source) -> list[Row]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        folder = _cached_snapshot(source)
        if folder is not None:
            return [row for _, file in _data_files(folder, source) for row in read_file(file)]
    try:
        loaded = _load_hub(source)
        if constants.HF_HUB_OFFLINE:
            _check_commit(loaded, source)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"the hub data set {source.path} at revision {source.revision}, "
            f"config {source.config or 'default'}, split {source.split or 'the only one'}, cannot be loaded: "
            + str(error).partition("\n")[0],
            where=source.path,
            mend="where there is a network, fetch it once: "
            f"`hf download --repo-type dataset {source.path} --revision {source.revision} --local-dir DIR`; "
            "then put DIR on this machine and give it as the source's path, or leave --local-dir out and bring the "
            "cache in $HF_HOME",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise ConfigError(
                f"{source.path} has several splits and none is chosen",
                where=source.path,
                mend=f"set the source's split to one of {', '.join(sorted(map(str, loaded)))}",
            )
        loaded = next(iter(loaded.values()))
    return list(loaded.to_list())


def _load_hub(source: Source) -> Any:
    import datasets

    how = {"split": source.split, "revision": source.revision}
    try:
        return datasets.load_dataset(source.path, source.config, **how)
    except ValueError as error:
        if source.config is None or "BuilderConfig" not in str(error):
            raise
        # no configuration of that name: hh-rlhf and its like have folders instead
        return datasets.load_dataset(source.path, data_dir=source.config, **how)


def _cached_snapshot(source: Source) -> Path | None:
    """The whole data set as `hf download` left it in the hub's cache, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(source.path, repo_type="dataset", revision=source.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    # `datasets` keeps the files of single configurations in the same place: every hub repository has this file, and
    # only a download of the whole has fetched it
    return Path(found) if (Path(found) / ".gitattributes").exists() else None


def _check_commit(loaded: Any, source: Source) -> None:
    """Refuse rows of another commit: offline, `datasets` takes the latest that it has, whatever the revision says."""
    from huggingface_hub import constants

    name = source.path.replace("/", "--")
    reference = Path(constants.HF_HUB_CACHE) / f"datasets--{name}" / "refs" / str(source.revision)
    commit = reference.read_text().strip() if reference.is_file() else str(source.revision)
    parts = loaded.values() if hasattr(loaded, "values") else [loaded]
    files = [file["filename"] for part in parts for file in part.cache_files]
    if not all(commit in Path(file).parts for file in files):
        raise ValueError(f"the cache of `datasets` has another commit than {commit}")
