"""What an operator decides about a run: one frozen dataclass, one TOML file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from fedrobust import InputError, parse_rule
from fedrobust.attacks import parse_attack
from fedrobust.optimisers import parse_optimiser
from fedrobust.text import Textual, choose
from fedrobust.training import Task
from fedrobust_server.limits import Limits
from fedrobust_server.quarantine import WATCH, parse_policy
from fedrobust_server.schedule import NONE, parse_schedule


@dataclass(frozen=True, repr=False)
class RunConfig(Textual):
    """A run of a federation.

    Attributes:
        run: the name of the run, and of its folder.
        task: what is trained, by how many clients, and how.
        limits: what callers may take of the server.
        rule: how updates are combined, as text.
        eps: the malicious fraction assumed where the rule does not name one, in [0, 0.5).
        root: how many training examples the server has itself, for rules that look at an update of its
            own (fltrust, monna): it trains on them as a client would. 0: none.
        initial: a checkpoint of the same model that the federation starts from, such as one that was
            trained before; empty: parameters drawn by the task's seed.
        rounds: how many rounds.
        start: how many clients must be present before the first round; 0 waits for all of the task.
        sample: the fraction of the present clients asked in a round, in (0, 1].
        quorum: the fraction of those asked whose updates a round needs, in (0, 1]. It, or half if that
            is less, of the clients that the first round waits for must be there for any other to begin.
        deadline: seconds after which a round closes with whoever has answered.
        exceeded: what the verdict "bound exceeded" does: "warn", or "skip" the round (fail closed).
        optimiser: how the aggregate moves the model, as text: "sgd(lr=1.0, momentum=0.9)", "adagrad",
            "adam(lr=0.01)" or "yogi".
        wire: how vectors travel unless a client chooses: "float32", or "bfloat16" or "float16", half of
            the bytes for a relative error of 2^-8 or 2^-11 in every value.
        compression: of what travels, "none" or "zstd".
        durability: what an acknowledged update survives: the death of any "process", or of the
            "machine", at the price of waiting for the disk.
        quarantine: when a client that keeps losing its weight is asked no more; as it is, clients are
            only watched.
        schedule: "sever(every=10)" leaves out, after 10, 20 and 30 rounds, the clients whose updates
            stand out most.
        shards: over how many processes the model's coordinates are spread. One uses all processors of
            its machine; more spread a large model's updates over the nodes of a cluster.
        gateways: how many processes take updates in; 1 is the server's own alone.
        checkpoint_every: rounds between checkpoints; the last round always leaves one.
        malicious: in an experiment, how many clients (the first ones) are malicious.
        attack: in an experiment, what those send, as text.
    """

    name = "run"

    run: str = "run"
    task: Task = field(default_factory=Task)
    limits: Limits = field(default_factory=Limits)
    rule: str = "filter"
    eps: float = 0.2
    root: int = 0
    initial: str = ""
    rounds: int = 30
    start: int = 0
    sample: float = 1.0
    quorum: float = 0.5
    deadline: float = 60.0
    exceeded: str = "warn"
    optimiser: str = "sgd"
    wire: str = "float32"
    compression: str = "none"
    durability: str = "process"
    quarantine: str = WATCH
    schedule: str = NONE
    shards: int = 1
    gateways: int = 1
    checkpoint_every: int = 10
    malicious: int = 0
    attack: str = "alie"

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = parse_rule(self.rule)
        parse_attack(self.attack)
        parse_optimiser(self.optimiser)
        parse_policy(self.quarantine)
        parse_schedule(self.schedule)
        choose(self.exceeded, ("warn", "skip"), "value of exceeded")
        choose(self.wire, ("float32", "bfloat16", "float16"), "value of wire")
        choose(self.compression, ("none", "zstd"), "value of compression")
        choose(self.durability, ("process", "machine"), "value of durability")
        self.require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.run) is not None,
            "the run's name must be up to 64 letters, digits, '.', '_', '-', starting with one of the "
            f"first two; got {self.run!r}",
        )
        self.require(0 <= self.eps < 0.5, f"eps must be in [0, 0.5), got {self.eps}")
        self.require(self.root >= 0, f"root must not be negative, got {self.root}")
        self.require(
            self.root > 0 or not rule.anchors,
            f"{rule!r} looks at an update of the server's own: say by root how many training examples "
            "it has for that, such as 100",
        )
        self.require(self.rounds >= 1, f"rounds must be at least 1, got {self.rounds}")
        self.require(self.start >= 0, f"start must not be negative, got {self.start}")
        self.require(0 < self.sample <= 1, f"sample must be in (0, 1], got {self.sample}")
        self.require(0 < self.quorum <= 1, f"quorum must be in (0, 1], got {self.quorum}")
        self.require(self.deadline > 0, f"deadline must be above 0 seconds, got {self.deadline}")
        self.require(self.shards >= 1, f"shards must be at least 1, got {self.shards}")
        self.require(self.gateways >= 1, f"gateways must be at least 1, got {self.gateways}")
        self.require(
            self.checkpoint_every >= 1,
            f"checkpoint_every must be at least 1, got {self.checkpoint_every}",
        )
        self.require(
            0 <= self.malicious < self.task.clients,
            f"malicious must be 0 .. {self.task.clients - 1}, got {self.malicious}",
        )

    def __repr__(self) -> str:
        return f"run {self.run}"

    @property
    def needed(self) -> int:
        """How many clients the first round waits for."""
        return self.start or self.task.clients

    def to_toml(self) -> str:
        """The whole configuration, defaults included; `from_toml` reads it back."""
        return tomlkit.dumps(dataclasses.asdict(self))

    @classmethod
    def from_toml(cls, text: str) -> RunConfig:
        """Read a configuration; what it leaves out has its default.

        Raises:
            InputError: not TOML, an unknown key (the known ones are listed), or a bad value.
        """
        try:
            values = tomlkit.parse(text).unwrap()
        except TOMLKitError as error:
            raise InputError(f"the configuration is not valid TOML: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """Build from plain values, task and limits as nested dicts. Raises as `from_toml`."""
        for key in values:
            choose(key, _keys(cls), "configuration key")
        tables = {name: _table(kind, name, values.get(name, {})) for name, kind in _TABLES.items()}
        return cls(**{**values, **tables})


_TABLES: Mapping[str, type[Textual]] = {"task": Task, "limits": Limits}


def _table(kind: type[Textual], name: str, values: object) -> Any:  # noqa: ANN401 (a `kind`)
    if not isinstance(values, dict):
        raise InputError(f"[{name}] must be a table, got {values!r}")
    for key in values:
        choose(key, _keys(kind), f"key of [{name}]")
    return kind(**values)


def read_config(path: Path) -> dict[str, Any]:
    """The plain values of a TOML file.

    Raises:
        InputError: the file cannot be read or is not TOML.
    """
    try:
        return tomlkit.parse(path.read_text()).unwrap()
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


def _keys(cls: type[Textual]) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
