"""The failed jobs of a sweep once more: `python -m alignbench.retry SWEEP.json [OVERRIDE ...]`.

Every failed job runs with its own overrides; those given here are added, and win: another launcher, other hardware.
One failure does not stop the others. At the end SWEEP.json, table and picture beside it hold the whole sweep again; the
exit status is 0 if nothing is left to retry.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from alignbench.errors import AlignbenchError, ConfigError, DataError
from alignbench.jsonio import read_json


def jobs_of(path: Path, extra: Sequence[str]) -> list[tuple[str, ...]]:
    """Overrides of each failed job of a sweep.

    Args:
        path: Its sweep.json.
        extra: Overrides for all of them; they replace a job's own of the same key.

    Raises:
        ConfigError: an extra override is itself a sweep.
        DataError: the file is not there, is no sweep.json, or lists no failed job.
    """
    parser = OverridesParser.create()
    added = parser.parse_overrides(list(extra))
    swept = [override.input_line for override in added if override.is_sweep_override()]
    if swept:
        raise ConfigError(
            "a retry repeats the jobs that failed and starts no others",
            where=f"override {swept[0]}",
            mend="give one value; for new points start a sweep: python main.py -m ...",
        )
    keys = {override.key_or_group for override in added}
    return [
        (*(o.input_line for o in parser.parse_overrides(job) if o.key_or_group not in keys), *extra)
        for job in _failed(path)
    ]


def _failed(path: Path) -> list[list[str]]:
    try:
        failed = [list(map(str, job["overrides"])) for job in read_json(path)["failed"]]
    except (OSError, KeyError, TypeError, AlignbenchError) as error:
        raise DataError(
            f"it cannot be read as the summary of a sweep ({type(error).__name__}: {error})",
            where=str(path),
            mend="name the sweep.json that the sweep printed at its end",
        ) from None
    if not failed:
        raise DataError("no job of this sweep failed", where=str(path), mend="there is nothing to retry")
    return failed


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    from alignbench import cli

    path, extra = Path(arguments[0]).resolve(), arguments[1:]
    try:
        jobs_of(path, [o for o in extra if not o.lstrip("+~").startswith("hydra")])
    except AlignbenchError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    os.environ[cli.SWEEP_ENV] = path.parent.name  # also the group of its runs in W&B
    quoted = str(path).replace("'", "\\'")
    sys.argv[1:] = ["-m", "hydra/sweeper=retry", f"hydra.sweeper.of='{quoted}'", *extra]
    return cli.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
