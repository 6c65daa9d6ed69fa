"""Bad input on the command line: one line that names the value and lists the choices, exit code 2."""

from __future__ import annotations

import contextlib
import inspect
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fedrobust_clients.runtime import Honest
from fedrobust_server.config import RunConfig
from fedrobust_server.runs import RunFolder

from fedrobust import InputError
from fedrobust.cli import main
from fedrobust.cli.parsing import attribute_docs
from fedrobust.training import Task

BAD = {
    "simulate --rule filtr": ("'filtr'", "did you mean filter?", "multi_krum"),
    "simulate --rule filter(eps=0.7)": ("filter(eps=0.7)", "[0, 0.5)"),
    "simulate --rule filter(ep=0.1)": ("'ep'", "eps", "sigma"),
    "simulate --rule mean|filter": ("mean",),
    "simulate --dataset imagenet": ("'imagenet'", "digits", "mnist"),
    "simulate --dataset mnist --data-dir /nowhere": ("/nowhere", "train-images-idx3-ubyte"),
    "simulate --split dirichlet(-1)": ("dirichlet(alpha=-1)",),
    "simulate --model mpl": ("'mpl'", "did you mean mlp?"),
    "simulate --attack ali": ("'ali'", "did you mean alie?", "sign_flip"),
    "simulate --rounds 0": ("rounds", "0"),
    "simulate --rounds many": ("--rounds", "'many'"),
    "simulate --malicious 10": ("malicious", "10"),
    "simulate --clients 99999": ("99999",),
    "simulate --run ../escape": ("'../escape'",),
    "simulate --config /no/such.toml": ("/no/such.toml",),
    "simulate --workers 0": ("--workers", "0"),
    "simulate --colour red": ("--colour",),
    "serve --bind 0.0.0.0:7070": ("0.0.0.0:7070", "TLS"),
    "serve --bind [::]:7070": ("[::]:7070", "TLS"),
    "serve --bind example.org:7070": ("example.org:7070", "TLS"),
    "serve --bind 7070": ("'7070'", "host:port"),
    "client --server 127.0.0.1:1": ("--id",),
    "client --server 127.0.0.1:1 --id -1": ("-1",),
    "client --server 127.0.0.1:1 --id 3 --attack ipm --malicious 2": ("3", "coalition of 2"),
    "client --server 127.0.0.1:1 --id 0 --malicious 2": ("--malicious without --attack",),
    "client --server 127.0.0.1:1 --id 0 --rule krum --eps 0.1": ("--rule, --eps without --attack",),
    "client --server 127.0.0.1:1 --id 0 --own-data ward:none": ("'ward:none'", "no module 'ward'"),
    "client --server 127.0.0.1:1 --id 0 --attack ipm --own-data digits": ("--own-data", "honest"),
    "client --server 127.0.0.1:1 --id 0 --attack ipm --eps 7": ("--eps", "[0, 0.5)", "7"),
    "client --server 127.0.0.1:1 --id 0 --attack ipm --eps nan": ("--eps", "[0, 0.5)", "nan"),
    "client --server 127.0.0.1:1 --id 0 --patience nan": ("--patience", "nan"),
    "client --server 127.0.0.1:1 --id 0 --patience 0": ("--patience", "0"),
    "client --server 127.0.0.1:99999 --id 0": ("host:port", "'127.0.0.1:99999'"),
    "client --server 127.0.0.1:0 --id 0": ("host:port", "'127.0.0.1:0'", "port 0"),
    "client --server :1 --id 0": ("host:port", "':1'", "without a host"),
    "client --server 127.0.0.1:1 --id 0 --name \udcff": ("--name must be text in UTF-8", "\\udcff"),
    "serve --bind 127.0.0.1:99999": ("host:port", "'127.0.0.1:99999'", "65535"),
    "redteam krumm": ("'krumm'", "did you mean krum?", "multi_krum"),
    "redteam nnm": ("nnm only mixes",),
    "redteam krum --all": ("--all",),
    "redteam krum --clients 5 --eps 0.4": ("2 f + 3 = 7", "5"),
    "redteam krum --eps 0.7": ("0.7", "(0, 0.5)"),
    "redteam krum --budget 10": ("10", "at least"),
    "redteam krum --clients many": ("--clients", "'many'"),
    "simulate --model no_such_module:net": ("'no_such_module:net'", "PYTHONPATH"),
    "simulate --dataset no_such_module:data": ("'no_such_module:data'", "PYTHONPATH"),
    "simulate --model fedrobust.training.published:f2ed": ("no attribute 'f2ed'",),
    "data mnits": ("'mnits'", "did you mean mnist?"),
    "launch": ("'launch'", "simulate", "serve", "client", "redteam"),
    "": ("COMMAND",),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = line.split()
    if arguments and arguments[0] in {"simulate", "serve"}:
        arguments += ["--runs-dir", str(tmp_path)]
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    for part in BAD[line]:
        assert part in output.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rule = ", ("not valid TOML",)),
        ("colour = 'red'", ("'colour'", "rounds", "rule")),
        ("[task]\ncolour = 'red'", ("'colour'", "dataset", "model")),
        ("task = 3", ("[task]", "3")),
        ("rounds = 'many'", ("rounds", "'many'")),
        ("eps = true", ("eps", "True")),
    ],
)
def test_bad_configuration(
    text: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert main(["simulate", "--config", str(path), "--runs-dir", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


@pytest.mark.parametrize("command", ["serve", "simulate"])
def test_what_is_refused_late_leaves_its_name_free(
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by other tests, whose Ray would be used
    new = (command, "--runs-dir", str(tmp_path), "--run", "first")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for refused in (
            ("--ray-address", f"127.0.0.1:{port}x"),
            ("--log-level", "loud"),
            ("--metrics", port),
            ("--dataset", "mnist", "--data-dir", str(tmp_path)),
        ):
            for _ in range(2):
                assert main([*new, *refused]) == 2
                output = capsys.readouterr()
                assert (output.out, output.err.count("\n")) == ("", 1)
                assert "exists already" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_what_was_refused_stays_once_a_round_has_begun(tmp_path: Path) -> None:
    def begin() -> None:
        with RunFolder.begun(tmp_path, RunConfig(run="first")) as folder:
            with contextlib.closing(folder.ledger()) as ledger:
                ledger.open_round(1, ["a"])
            raise InputError("too late")

    for complaint in ("too late", "exists already"):
        with pytest.raises(InputError, match=complaint):
            begin()
    assert (tmp_path / "first" / "ledger.sqlite").exists()


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client", "--server", "127.0.0.1:1", "--id", "0", "--patience", "0.5"]) == 1
    told = capsys.readouterr().err
    assert "the server at 127.0.0.1:1 cannot be reached" in told
    assert "Connection refused" in told


@pytest.mark.parametrize(("options", "examples"), [([], 143), (["--own-data", "digits"], 1437)])
def test_a_client_trains_on_its_part_or_on_data_of_its_own(
    options: list[str], examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    async def run(
        _address: str, _name: str, prepare: Callable[[Task], Honest], *_: object, **__: object
    ) -> None:
        found.append(prepare(Task()).learner.examples)

    monkeypatch.setattr("fedrobust_clients.remote.run", run)
    assert main(["client", "--server", "127.0.0.1:1", "--id", "9", *options]) == 0
    assert found == [examples]


@pytest.mark.parametrize("address", ["localhost", "localhost:", "7070"])
def test_an_address_without_a_port_is_told_at_once(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["client", "--server", address, "--id", "0"]) == 2
    assert f"host:port, got {address!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["simulate", "serve"])
def test_an_attack_without_attackers_is_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--attack", "ipm"]) == 2
    assert "attack 'ipm' has no attacker: give --malicious" in capsys.readouterr().err


def test_no_attackers_may_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--attack", "ipm", "--malicious", "0", "--workers", "0"]) == 2
    assert "--workers must be at least 1" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        exposed = "--insecure-anyone-can-read-and-poison-this-federation"
        for bind, why in ((address, "already in use"), ("192.0.2.1:7070", "Cannot assign")):
            assert main(["serve", "--bind", bind, "--runs-dir", str(tmp_path), exposed]) == 2
            told = capsys.readouterr().err
            assert f"cannot listen on {bind}: is the port taken? " in told
            assert why in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["", "simulate", "serve", "client", "redteam", "data"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ("example" in text) == bool(command)


def test_the_texts_of_options_are_found_with_and_without_indentation() -> None:
    """Python 3.13 takes the indentation of a docstring away, earlier ones leave it."""

    class Indented:
        """A box.

        Attributes:
            width: in metres.
            height: in metres,
                at least 1.
        """

    class Plain:
        __doc__ = inspect.cleandoc(Indented.__doc__ or "")

    found = {"width": "in metres", "height": "in metres, at least 1"}
    assert attribute_docs(Indented) == attribute_docs(Plain) == found
