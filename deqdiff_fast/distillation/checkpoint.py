"""An unfinished distillation on disk: what was asked of the model, and how far the fit is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..schedule.tensor_file import replacing

ROWS, STATE = "distillation_rows.pt", "distillation.pt"


class Checkpoint:
    """Two files in a folder, rows and state; without a folder nothing is kept.

    Args:
        identity: what the distillation is of, compared with that of the files.
    """

    def __init__(self, folder: Path | None, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def save_rows(self, rows: dict[str, Any]) -> None:
        """Raises OSError."""
        self._write(ROWS, rows)

    def save_state(self, state: dict[str, Any]) -> None:
        """Raises OSError."""
        self._write(STATE, state)

    def _write(self, name: str, value: dict[str, Any]) -> None:
        if self.folder is not None:
            with replacing(self.folder / name) as partial:
                torch.save(value | {"identity": self.identity}, partial)

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(rows, state), or None where there is nothing to go on from.

        Raises:
            ValueError: the files are damaged, or of another distillation.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return None
        found = []
        for name in (ROWS, STATE):
            path = self.folder / name
            try:
                found.append(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"{path}: expected an unfinished distillation, whole: {reason}; delete it") from error
            other = found[-1].get("identity")
            if other != self.identity:
                differs = [key for key in self.identity if (other or {}).get(key) != self.identity[key]]
                raise ValueError(
                    f"{path}: expected the unfinished distillation of this model with these settings, got one with "
                    f"another {', '.join(differs)}; delete it, or name another folder"
                )
        return found[0], found[1]

    def remove(self) -> None:
        """It is finished."""
        for name in (STATE, ROWS):
            if self.folder is not None:
                with suppress(FileNotFoundError):
                    (self.folder / name).unlink()
