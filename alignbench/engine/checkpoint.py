"""Checkpoints inside one training stage: complete or absent, and only ever continued on the same layout."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from alignbench.engine import group
from alignbench.errors import StoreError
from alignbench.jsonio import atomic_write_json, read_json

log = logging.getLogger(__name__)
_MARKER = "COMPLETE.json"
# What torch's zip writer says, as a RuntimeError of its own, where a file cannot grow.
_WRITE_FAULTS = ("write", "iostream error", "unexpected pos")


@dataclass(frozen=True)
class Layout:
    """What a checkpoint, or the bits of what follows it, depends on besides the numbers: another layout starts anew."""

    zero_stage: int
    world_size: int
    micro_batch: int
    micro_tokens: int
    attention: str
    dtype: str
    device: str


class Checkpoints:
    """The checkpoints of one stage in `folder`; at most one complete one is kept."""

    def __init__(self, folder: Path, layout: Layout, *, lora: bool) -> None:
        self._folder, self._layout, self._lora = folder, layout, lora

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> None:
        """Write model, optimizer, scheduler, random state and `state`; only then forget the previous one.

        Raises:
            OSError: the disk is full; the previous checkpoint is still whole.
        """
        tag = f"step-{step}"
        if group.keeper():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._discard(tag)
        group.barrier()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        client = {"step": step, "rng": group.gather((torch.get_rng_state(), cuda)), **state}
        try:
            engine.save_checkpoint(
                str(self._folder),
                tag=tag,
                client_state=client,
                save_latest=False,
                exclude_frozen_parameters=self._lora,
            )
        except (OSError, RuntimeError) as error:
            full = shutil.disk_usage(self._folder).free < 1 << 22
            self._discard(tag)  # half a checkpoint must not keep a full disk full, whichever rank met its end
            if isinstance(error, OSError) or not (full or any(text in str(error).lower() for text in _WRITE_FAULTS)):
                raise
            # the system's own words: of a rank's error only the text reaches the process that explains it
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for a checkpoint", str(self._folder)) from error
        group.barrier()
        if group.keeper():
            self._complete(tag, step)
        group.barrier()

    def _complete(self, tag: str, step: int) -> None:
        """Say that every rank's files are whole, then forget older checkpoints."""
        for path in (self._folder / tag).glob("*"):  # on the disk before the marker says so
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        marker = {"tag": tag, "step": step, "layout": asdict(self._layout), "files": self._sizes(tag)}
        atomic_write_json(self._folder / _MARKER, marker)
        for old in self._folder.glob("step-*"):
            if old.name != tag:
                shutil.rmtree(old, ignore_errors=True)

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Continue from the complete checkpoint, if there is one that this layout can read.

        Returns:
            The state given to `save` with its "step", or None when training starts at step 0.
        """
        own, why = self._usable()
        everywhere = group.gather((own["tag"] if own else None, why))
        if any(entry != everywhere[0] for entry in everywhere) or own is None:
            for why in dict.fromkeys(why for _, why in everywhere if why):
                log.warning("%s: starting anew", why)
            if any(tag for tag, _ in everywhere):
                log.warning("not every machine has its part of the last checkpoint: starting anew")
            return None
        found = own
        try:
            _, client = engine.load_checkpoint(str(self._folder), tag=found["tag"], load_module_strict=not self._lora)
        except Exception as error:  # torch and pickle raise many types; the engine may be half loaded by now
            raise StoreError(
                f"the checkpoint at step {found['step']} cannot be read ({type(error).__name__}: {error})",
                where=str(self._folder),
                mend="remove that folder and run the same command again: the stage starts anew",
            ) from error
        state, cuda = client["rng"][group.rank()]
        torch.set_rng_state(state)
        if torch.cuda.is_available() and cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        return dict(client)

    def _usable(self) -> tuple[dict[str, Any] | None, str]:
        """The complete checkpoint on this rank's storage, or why there is none that can be used ("": there is none)."""
        marker = self._folder / _MARKER
        if not marker.exists():
            return None, ""
        found = dict(read_json(marker))
        if found["layout"] != asdict(self._layout):
            why = "the checkpoint at step {} was written with {} and cannot be continued with {}"
            return None, why.format(found["step"], found["layout"], asdict(self._layout))
        if self._sizes(found["tag"]) != found.get("files"):
            return None, f"files of the checkpoint {found['tag']} are cut or absent"
        return found, ""

    def kept(self) -> int | None:
        """The step that a repeated run would go on from."""
        marker = self._folder / _MARKER
        found = read_json(marker) if marker.exists() else {}
        return int(found["step"]) if found.get("layout") == asdict(self._layout) else None

    def _sizes(self, tag: str) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted((self._folder / tag).glob("*"))}

    def _discard(self, tag: str) -> None:
        """Remove a killed or refused run's folder (and its marker first): files of two runs must not mix."""
        marker = self._folder / _MARKER
        if marker.exists() and read_json(marker)["tag"] == tag:
            marker.unlink()
        shutil.rmtree(self._folder / tag, ignore_errors=True)
