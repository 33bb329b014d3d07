"""A folder of pairs: a manifest and numbered shards, each of them there as a whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import DamagedPairsError
from .fingerprint import hash_values
from .shard_file import ShardFile

try:
    import fcntl
except ImportError:  # not on Windows: what a dead process has left there is removed without asking
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("deqdiff_fast")

MANIFEST, PARTIAL, FORMAT = "manifest.json", ".partial", 1


@dataclass(frozen=True)
class Manifest:
    """What the pairs of a folder are.

    Attributes:
        identity: what a run that goes on must agree in, by name: hashes of the model's weights, the schedule and the
            conditions, and the settings, `method`, `batch` and `seed` among them.
        count: how many pairs were asked for.
        shape: of a sample.
        shard: pairs in each file, a multiple of the batch.
        answers: some numbers of the model's predictions, which tell a changed model that has no weights.
        made_on: versions and device at the beginning, on which rounding may depend.
    """

    identity: dict[str, Any]
    count: int
    shape: tuple[int, ...]
    shard: int
    answers: list[float] = field(default_factory=list)
    made_on: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        """How many files there are in the end."""
        return -(-self.count // self.shard)

    @property
    def key(self) -> str:
        """What its shards are known by."""
        return hash_values([self.identity, list(self.shape), self.shard])

    def pairs_in(self, number: int) -> int:
        """How many of the pairs asked for are in that shard; the last one has whole batches, and so may hold more."""
        return min(self.shard, self.count - number * self.shard)


class PairFolder:
    """The files. Nothing is kept open.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def shard_path(self, number: int) -> Path:
        """Of a shard, there or not."""
        return self.path / f"pairs-{number:06d}.safetensors"

    def read_manifest(self) -> Manifest:
        """Raises FileNotFoundError where there is none, DamagedPairsError where it is no manifest."""
        path = self.path / MANIFEST
        text = path.read_bytes()
        try:
            found = json.loads(text)
            version = found.pop("format")
            if version != FORMAT:
                raise ValueError(f"format {version} is of another version of this library")
            return Manifest(**{**found, "shape": tuple(found["shape"])})
        except Exception as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise DamagedPairsError(
                f"{path}: expected the manifest of a folder of pairs: {reason}", str(path)
            ) from error

    def write_manifest(self, manifest: Manifest) -> None:
        """Raises OSError."""
        text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, sort_keys=True) + "\n"
        write_durably(self.path / MANIFEST, [text.encode()])

    def open_shard(self, manifest: Manifest, number: int, check: bool = True) -> ShardFile:
        """Raises FileNotFoundError, DamagedPairsError."""
        path = self.shard_path(number)
        shard = ShardFile(path, check)
        if (shard.metadata.get("manifest"), shard.metadata.get("number")) != (manifest.key, str(number)):
            raise DamagedPairsError(f"{path}: expected shard {number} of this folder, got another one", str(path))
        return shard

    def is_finished(self, manifest: Manifest, number: int) -> bool:
        """Whether a shard has all its pairs, as its header says. A damaged one counts: it is named when it is read."""
        try:
            found = ShardFile(self.shard_path(number), check=False)
        except FileNotFoundError:
            return False
        except DamagedPairsError:
            return True
        return len(found.tensors["noise"]) >= manifest.pairs_in(number)

    def pairs_there(self, manifest: Manifest, number: int) -> int:
        """How many pairs are in a shard; 0 where it is not there, or damaged, which is then said in the log."""
        try:
            return len(self.open_shard(manifest, number).tensors["noise"])
        except FileNotFoundError:
            return 0
        except DamagedPairsError as error:
            _log.warning("%s", error)
            return 0

    def remove_leftovers(self, mine: Callable[[int | None], bool]) -> None:
        """What a process that was killed has left half-written. mine: whether to care for that shard, None: for the
        manifest."""
        for path in self.path.glob(f"*{PARTIAL}"):
            digits = path.name.removeprefix("pairs-").split(".")[0]
            if mine(int(digits) if digits.isdecimal() else None):
                with suppress(FileNotFoundError), path.open("rb+") as file:
                    if _lock(file):
                        path.unlink()


def _lock(file: IO[bytes]) -> bool:
    """Whether nobody else is writing to that file, as far as the file system can tell."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks there
            pass
    return True


def write_durably(path: Path, parts: Iterable[bytes]) -> None:
    """A file that is there as a whole, and stays through a loss of power, or is not there at all.

    Raises:
        OSError: with the reason's `errno`, and `path`.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with _reported(path):
        try:
            with partial.open("xb") as file:
                _lock(file)  # until it is closed, or this process dies
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink()
        _sync_folder(path.parent)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"not written ({error.strerror or error}); what was finished before stays, and the same call goes on"
        raise OSError(error.errno, reason, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """The new name too is to survive."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
