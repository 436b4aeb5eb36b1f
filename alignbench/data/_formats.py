"""One local data file to rows: JSON lines, JSON, CSV and parquet, plain or compressed.

Text is parsed here rather than by `datasets`, which reports a broken line without its number and writes a
cache beside what it reads.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from alignbench.data.schema import Row, excerpt
from alignbench.errors import DataError

_COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
KNOWN_FILES = ".jsonl, .json or .csv (each also .gz or .xz), .parquet"


def format_of(path: Path) -> str | None:
    """The format that a file's name states (``.jsonl``, ``.json``, ``.csv``, ``.parquet``), or None."""
    compressed = path.suffix in _COMPRESSED
    suffix = Path(path.stem).suffix if compressed else path.suffix
    return suffix if suffix in _FORMATS and not (compressed and suffix == ".parquet") else None


def read_file(file: Path) -> list[Row]:
    """All rows of one file.

    Raises:
        DataError: The file is damaged; names every broken line's number (the first three in full).
    """
    kind = format_of(file)
    if kind == ".parquet":
        return _read_parquet(file)
    content = b"".join(content_blocks(file)).removeprefix(b"\xef\xbb\xbf")
    if kind == ".csv":
        return _parse_csv(content, file)
    if kind == ".json" and content.lstrip()[:1] == b"[":
        return _parse_json_list(content, file)
    return _parse_json_lines(content, file)


def content_blocks(file: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """The decompressed content in blocks: a gzip header holds a time stamp, which is no part of the data.

    Raises:
        DataError: The file cannot be read or decompressed.
    """
    try:
        with _open(file) as stream:
            while block := stream.read(size):
                yield block
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"the file cannot be read: {error}",
            where=str(file),
            mend="check its permissions and that the download is whole",
        ) from error


def _open(file: Path) -> IO[bytes]:
    opener = _COMPRESSED.get(file.suffix)
    return opener(file, "rb") if opener else file.open("rb")


def _parse_json_lines(content: bytes, file: Path) -> list[Row]:
    rows: list[Row] = []
    faults: list[str] = []
    # bytes, because str.splitlines would also break at U+2028 and its like inside a string
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            faults.append(f"line {number}: {error}: {excerpt(line.decode('utf-8', 'replace'))}")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            faults.append(f"line {number}: holds {type(row).__name__} {excerpt(row)}, not an object")
    mend = "each line must hold one JSON object {...} in UTF-8; mend or remove the lines named"
    _raise_faults("line", faults, file, mend)
    return rows


def _parse_json_list(content: bytes, file: Path) -> list[Row]:
    try:
        rows = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise DataError(
            f"broken JSON: {error}",
            where=str(file),
            mend="mend the file at the place named: one list of objects",
        ) from error
    faults = [
        f"element {number}: holds {type(row).__name__} {excerpt(row)}, not an object"
        for number, row in enumerate(rows, start=1)
        if not isinstance(row, dict)
    ]
    _raise_faults("element", faults, file, "the file must hold one list of JSON objects")
    return rows


def _parse_csv(content: bytes, file: Path) -> list[Row]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        rows, faults = [], []
        for row in reader:
            rows.append(row)
            if None in row or None in row.values():
                faults.append(f"line {reader.line_num}: has not as many fields as the header")
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"broken CSV: {error}", where=str(file), mend="write it as UTF-8 with a header line") from error
    _raise_faults("line", faults, file, "give every row the fields of the header; quote texts that hold commas")
    return rows


def _raise_faults(noun: str, faults: Sequence[str], file: Path, mend: str) -> None:
    if faults:
        more = [f"(and {len(faults) - 3} more)"] if len(faults) > 3 else []
        head = f"1 {noun} is broken" if len(faults) == 1 else f"{len(faults)} {noun}s are broken"
        raise DataError("\n    ".join([head, *faults[:3], *more]), where=str(file), mend=mend)


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        return list(pyarrow.parquet.read_table(file).to_pylist())
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(
            f"the parquet file cannot be read: {error}",
            where=str(file),
            mend="check that the download is whole",
        ) from error
