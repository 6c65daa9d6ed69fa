"""A run's folder: config.toml, ledger.sqlite, checkpoints/, the report, and what resuming needs.

lock                        held by the server that is at the run
spool/round-000012.rows     the updates of the round that is going on (`Spool`)
state/round-000011.f32      the model, and what the optimiser remembers beside it, after a round
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from fedrobust_proto.v1 import vectors
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedrobust import InputError
from fedrobust.training import Manifest, manifest, split_vector
from fedrobust_server.config import RunConfig
from fedrobust_server.ledger import Ledger, Standing
from fedrobust_server.spool import Floats, Spool

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where everything that a run leaves behind is."""

    path: Path

    @classmethod
    def create(cls, parent: Path, config: RunConfig) -> RunFolder:
        """Make the folder of a new run and write its configuration.

        Raises:
            InputError: there is such a run already, or the folder cannot be made.
        """
        path = parent / config.run
        try:
            path.mkdir(parents=True)
            for name in ("checkpoints", "spool", "state"):
                (path / name).mkdir(mode=0o700)
            (path / "config.toml").write_text(config.to_toml())
        except FileExistsError:
            raise InputError(
                f"the run {path} exists already; go on with it by --resume, choose another --run or "
                "remove it"
            ) from None
        except OSError as error:
            raise InputError(f"cannot make the folder {path}: {error.strerror}") from None
        return cls(path)

    @classmethod
    @contextlib.contextmanager
    def begun(cls, parent: Path, config: RunConfig) -> Iterator[RunFolder]:
        """The folder of a new run; it goes again if the run is refused before its first round.

        What is refused is corrected and tried again, under the same name.

        Raises:
            InputError: as `create`.
        """
        folder = cls.create(parent, config)
        try:
            yield folder
        except InputError:
            with contextlib.closing(folder.ledger()) as ledger:
                began = bool(ledger.rounds())
            if not began:
                with contextlib.suppress(InputError), folder.held():  # nobody else's by now
                    shutil.rmtree(folder.path, ignore_errors=True)  # the refusal is what is to be told
            raise

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, RunConfig]:
        """Find a run that there is, and its configuration.

        Raises:
            InputError: it is no run's folder, or its configuration cannot be read.
        """
        try:
            text = (path / "config.toml").read_text()
        except OSError as error:
            raise InputError(f"there is no run in {path}: {error.strerror}") from None
        return cls(path), RunConfig.from_toml(text)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other servers off the run; the system lets go of it as soon as this process is dead.

        Raises:
            InputError: another server has it.
        """
        try:
            file = (self.path / "lock").open("a")
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another server is at the run {self.path}; stop it first") from None
            except OSError as error:  # storage without locks
                log.warning(
                    "%s cannot be locked (%s): see that no other server goes on with it",
                    self.path,
                    error.strerror,
                )
            yield

    def ledger(self, *, sync: bool = False) -> Ledger:
        """The run's ledger."""
        return Ledger(self.path / "ledger.sqlite", sync=sync)

    def spool(self, number: int, slots: int, size: int) -> Spool:
        """The updates of a round; those of other rounds have been dealt with and go."""
        path = self._spool(number)
        for other in path.parent.glob("round-*.rows"):
            if other != path:
                other.unlink()
        return Spool.open(path, slots, size)

    def check_spool(self, standing: Standing, size: int, *, shared: bool = False) -> None:
        """Make sure that every acknowledged update of an open round is there as it was acknowledged.

        Args:
            standing: of the round.
            size: d, coordinates of an update.
            shared: gateways of the server that is gone may still be there for a moment, and write. The
                acknowledged updates go to another file under the same name, which those do not know.

        Raises:
            InputError: one is missing or damaged.
        """
        path = self._spool(standing.round)
        if standing.accepted and not path.exists():
            raise InputError(
                f"cannot resume: {path}, with {len(standing.accepted)} updates, is not there"
            )
        spool = Spool.open(path, len(standing.selected), size)
        fresh = Spool.open(_unfinished(path), len(standing.selected), size) if shared else None
        for client, (digest, _) in standing.accepted.items():
            slot = standing.selected.index(client)
            row = spool.read(slot, 0, size)
            # In the dtype that it came in, which brought it here without a change.
            if all(vectors.digest(vectors.pack(row, d)).hex() != digest for d in vectors.DTYPES):
                raise InputError(
                    f"cannot resume: {path} does not hold the acknowledged update of {client}; put a "
                    "copy of the file back, or start a new run from a checkpoint"
                )
            if fresh is not None:
                fresh.write(slot, 0, row)
        spool.close()
        if fresh is not None:
            fresh.close()
            _finish(path)

    def state(self, number: int, vectors: int, size: int) -> Spool:
        """Room for what a round leads to: so many vectors, the model and the optimiser's memory."""
        path = _unfinished(self._state(number))
        path.unlink(missing_ok=True)  # shards that were given up may still write into it
        return Spool.open(path, vectors, size)

    def keep_state(self, number: int) -> str:
        """Keep what a round led to; returns its digest. Only the state before is kept too."""
        path = self._state(number)
        digest = blake3().update_mmap(_unfinished(path)).hexdigest()
        _finish(path)
        earlier = sorted(other for other in path.parent.glob("round-*.f32") if other < path)
        for other in earlier[:-1]:
            other.unlink()
        return digest

    def load_state(self, number: int, digest: str, vectors: int, size: int) -> Floats:
        """(vectors, size): the model and the optimiser's memory after a round.

        Raises:
            InputError: the file is missing, not what was saved, or of another optimiser.
        """
        path = self._state(number)
        try:
            values = np.fromfile(path, "<f4")
        except OSError as error:
            raise InputError(f"cannot resume: {path}: {error.strerror}") from None
        if blake3(values.view(np.uint8).data).hexdigest() != digest:
            raise InputError(
                f"cannot resume: {path} is not what was saved after round {number}; "
                f"put a copy of it back, or start a new run from a checkpoint"
            )
        if len(values) != vectors * size:
            raise InputError(
                f"cannot resume: {path} holds {len(values)} numbers where the run's model and optimiser "
                f"need {vectors * size}; put config.toml back as it was"
            )
        return values.reshape(vectors, size)

    def checkpoint(self, number: int, model: Floats, names: Manifest) -> None:
        """Save the model after a round as named tensors; a crash leaves the file whole or absent."""
        path = self.path / "checkpoints" / f"round-{number:06d}.safetensors"
        save_tensors(path, split_vector(torch.from_numpy(model), names), {"round": str(number)})

    def _spool(self, number: int) -> Path:
        return self.path / "spool" / f"round-{number:06d}.rows"

    def _state(self, number: int) -> Path:
        return self.path / "state" / f"round-{number:06d}.f32"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write named tensors, with a few words about them; a crash leaves the file whole or absent."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, _unfinished(path), dict(about))
    _finish(path)


def read_checkpoint(path: Path, module: nn.Module) -> Tensor:
    """(d,) float32: the parameters of a module's kind that a file of named tensors holds.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the checkpoint {path}: {error}") from None
    names = manifest(module)
    if {name: tuple(value.shape) for name, value in found.items()} != dict(names):
        raise InputError(
            f"the checkpoint {path} is of another model: it holds "
            f"{', '.join(f'{name} {tuple(value.shape)}' for name, value in found.items())}; expected "
            f"{', '.join(f'{name} {shape}' for name, shape in names)}"
        )
    return torch.cat([found[name].reshape(-1).to(torch.float32) for name, _ in names])


def _unfinished(path: Path) -> Path:
    """Where a file is written, so that it is whole or absent under its name, whatever happens."""
    return path.with_suffix(".partial")


def _finish(path: Path) -> None:
    """What was written is whole."""
    with _unfinished(path).open("rb") as file:
        os.fsync(file.fileno())
    _unfinished(path).replace(path)
