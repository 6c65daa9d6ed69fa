"""Fetching datasets and checking them; a server on loopback stands in for the mirrors."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import http.server
import io
import json
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from fedrobust.cli import main
from fedrobust.data import load
from fedrobust.data.cifar10 import BINARY_FILES
from fedrobust.data.datasets import FASHION_MNIST, IDX_FILES, MNIST
from fedrobust.data.sources import (
    DAMAGED,
    IN_PLACE,
    MISSING,
    OTHER,
    SOURCES,
    Download,
    File,
    Source,
    State,
    checksum,
    fetch,
    look,
)
from fedrobust.errors import InputError

Answer = tuple[int, bytes, dict[str, str]]


class Mirror:
    """A server of files; what it was asked for is noted."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Answer] = {}
        self.asked: list[str] = []
        self.url = ""

    @contextlib.contextmanager
    def serving(self) -> Iterator[Mirror]:
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path.lstrip("/"))
                found = mirror.files.get(mirror.asked[-1], (404, b"", {}))
                status, body, headers = (200, found, {}) if isinstance(found, bytes) else found
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}/"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield self
            server.shutdown()
            thread.join()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror().serving() as serving:
        yield serving


CONTENTS = {name: bytes([i]) * (100 + i) for i, name in enumerate(IDX_FILES)}


def known(name: str, content: bytes, algorithm: str = "sha256") -> File:
    return File(name, len(content), checksum(content, like=f"{algorithm}:"))


def small(find: Callable[[Path | None], list[Path] | None] = MNIST.find) -> Source:
    downloads = (
        Download(f"{name}.gz", (known(name, content, ("sha256", "md5")[i % 2]),))
        for i, (name, content) in enumerate(CONTENTS.items())
    )
    return Source("mnist", "mnist", ("https://example.invalid/",), tuple(downloads), find)


def packed() -> dict[str, bytes | Answer]:
    return {f"{name}.gz": gzip.compress(content) for name, content in CONTENTS.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_missing_is_fetched_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files = packed()
    told: list[str] = []
    assert look(small(), tmp_path) == State("mnist", MISSING, str(tmp_path / "mnist"))
    written = fetch(small(), tmp_path, mirrors=[mirror.url], watch=told.append)
    assert files(tmp_path) == {f"mnist/{name}": content for name, content in CONTENTS.items()}
    assert sorted(map(str, written)) == sorted(str(tmp_path / name) for name in files(tmp_path))
    assert told == mirror.asked == list(packed())
    assert look(small(), tmp_path) == State("mnist", IN_PLACE, str(tmp_path / "mnist"))
    assert fetch(small(), tmp_path, mirrors=[mirror.url]) == []
    assert len(mirror.asked) == 4


def test_only_bad_and_missing_files_are_fetched(mirror: Mirror, tmp_path: Path) -> None:
    mirror.files = packed()
    fetch(small(), tmp_path, mirrors=[mirror.url])
    folder = tmp_path / "mnist"
    # One packed in another way, one damaged beside its good archive, one damaged, one gone.
    (folder / IDX_FILES[0]).unlink()
    (folder / f"{IDX_FILES[0]}.gz").write_bytes(gzip.compress(CONTENTS[IDX_FILES[0]], 1))
    (folder / IDX_FILES[1]).write_bytes(b"x" * len(CONTENTS[IDX_FILES[1]]))
    (folder / f"{IDX_FILES[1]}.gz").write_bytes(gzip.compress(CONTENTS[IDX_FILES[1]]))
    (folder / IDX_FILES[2]).write_bytes(CONTENTS[IDX_FILES[2]][:-1])
    assert look(small(), tmp_path) == State("mnist", OTHER, str(folder), IDX_FILES[1])
    (folder / IDX_FILES[3]).unlink()
    assert look(small(), tmp_path).state == MISSING
    mirror.asked.clear()
    before = (folder / f"{IDX_FILES[0]}.gz").stat()
    written = fetch(small(), tmp_path, mirrors=[mirror.url])
    assert [path.name for path in written] == [*IDX_FILES[1:]]
    assert mirror.asked == [f"{name}.gz" for name in IDX_FILES[1:]]
    assert (folder / f"{IDX_FILES[0]}.gz").stat() == before
    assert look(small(), tmp_path).state == IN_PLACE


BAD: dict[str, tuple[bytes | Answer, str]] = {
    "other content": (
        gzip.compress(b"\1" * 100),
        r"holds another train-images-idx3-ubyte: 100 bytes, sha256:[0-9a-f]{64}, expected 100 bytes",
    ),
    "longer": (gzip.compress(bytes(10**6)), "holds another .* 101 bytes"),
    "truncated": (gzip.compress(bytes(100))[:-9], "ended before the end-of-stream"),
    "cut off": ((200, gzip.compress(bytes(100))[:-9], {"Content-Length": "500"}), "fetched"),
    "no gzip": (b"<html>sign in</html>", "[Nn]ot a gzipped file"),
    "endless": (os.urandom(3 << 20), "sends more than the"),
    "gone": ((404, b"", {}), "Not Found"),
    "failing": ((503, b"", {}), "Service Unavailable"),
    "in circles": ((302, b"", {"Location": "/train-images-idx3-ubyte.gz"}), "infinite loop"),
    "empty": (b"", r"holds another .* 0 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_as_published_leaves_nothing_behind(
    mirror: Mirror, tmp_path: Path, case: str
) -> None:
    answer, message = BAD[case]
    mirror.files = {**packed(), f"{IDX_FILES[0]}.gz": answer}
    with pytest.raises(ConnectionError, match=message) as caught:
        fetch(small(), tmp_path, mirrors=[mirror.url], timeout=5.0)
    assert list(tmp_path.iterdir()) == []
    for part in (f"{mirror.url}{IDX_FILES[0]}.gz", str(tmp_path / "mnist"), *packed()):
        assert part in str(caught.value)
    # The next mirror is asked for that file alone.
    with Mirror().serving() as good:
        good.files = packed()
        fetch(small(), tmp_path, mirrors=[mirror.url, good.url], timeout=5.0)
        assert good.asked == [f"{IDX_FILES[0]}.gz"]
    assert look(small(), tmp_path).state == IN_PLACE


def test_a_mirror_that_keeps_silent_is_given_up(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files = packed()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(ConnectionError, match="timed out"):
            fetch(small(), tmp_path, mirrors=[url], timeout=0.2)
        assert len(fetch(small(), tmp_path, mirrors=[url, mirror.url], timeout=0.2)) == 4


def test_https_leads_nowhere_else(monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    from urllib.error import URLError  # noqa: PLC0415
    from urllib.request import Request  # noqa: PLC0415

    from fedrobust.data.sources import _NoDowngrade  # noqa: PLC0415

    handler, there = _NoDowngrade(), Request("https://example.org/a")
    with pytest.raises(URLError, match=r"http://example\.org/b, which is not https"):
        handler.redirect_request(there, None, 302, "Found", {}, "http://example.org/b")
    followed = handler.redirect_request(there, None, 302, "Found", {}, "https://example.org/b")
    assert followed.full_url == "https://example.org/b"


def archive(contents: dict[str, bytes], folder: str = "cifar-10-batches-bin/") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return written.getvalue()


def batches() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    names = [name for names in BINARY_FILES.values() for name in names]
    return {name: bytes([i]) + rng.bytes(3072) for i, name in enumerate(names)}


def cifar(contents: dict[str, bytes], raw: bytes) -> Source:
    known_files = tuple(known(name, content) for name, content in contents.items())
    download = Download("cifar-10-binary.tar.gz", known_files, checksum(raw, like="sha256:"))
    return dataclasses.replace(SOURCES["cifar10"], downloads=(download,))


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin/", "../../", "/"])
def test_an_archive_is_unpacked_to_its_files_alone(mirror: Mirror, tmp_path: Path, folder: str) -> None:
    contents = batches()
    raw = archive({**contents, "readme.html": b"...", "../../evil.sh": b"..."}, folder)
    source = cifar(contents, raw)
    mirror.files = {"cifar-10-binary.tar.gz": raw}
    data_dir = tmp_path / "some" / "data"
    fetch(source, data_dir, mirrors=[mirror.url])
    assert files(tmp_path) == {
        f"some/data/cifar-10-batches-bin/{name}": content for name, content in contents.items()
    }
    data = load("cifar10", data_dir)
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 1, 2, 3, 4], [5])
    assert look(source, data_dir).state == IN_PLACE
    third = data_dir / "cifar-10-batches-bin" / "data_batch_3.bin"
    for content, state in ((bytes(3073), OTHER), (bytes(3072), DAMAGED)):
        third.write_bytes(content)
        assert look(source, data_dir) == State("cifar10", state, str(third.parent), third.name)
    assert [p.name for p in fetch(source, data_dir, mirrors=[mirror.url])] == ["data_batch_3.bin"]


def test_an_archive_that_is_another_is_not_unpacked(mirror: Mirror, tmp_path: Path) -> None:
    contents = batches()
    raw = archive(contents)
    mirror.files = {"cifar-10-binary.tar.gz": archive({**contents, "more": b""})}
    with pytest.raises(ConnectionError, match=r"has the checksum sha256:.*, expected sha256:"):
        fetch(cifar(contents, raw), tmp_path, mirrors=[mirror.url])
    missing = archive(dict(list(contents.items())[:-1]))
    mirror.files = {"cifar-10-binary.tar.gz": missing}
    with pytest.raises(ConnectionError, match=r"holds another test_batch\.bin: 0 bytes"):
        fetch(cifar(contents, missing), tmp_path, mirrors=[mirror.url])
    assert list(tmp_path.iterdir()) == []


def test_cifar_as_jpeg_is_in_place_where_its_loader_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "cifar10" / "cifar10_jpeg.npz"
    path.parent.mkdir()
    one = io.BytesIO()
    np.save(one, np.zeros(3))
    few = io.BytesIO()
    np.savez(few, train_jpeg=np.zeros(9, np.uint8), train_offsets=[0.0, 9.0], train_labels=[3])
    for content in (b"PK", one.getvalue(), few.getvalue()):
        path.write_bytes(content)
        assert look(SOURCES["cifar10"], tmp_path) == State(
            "cifar10", DAMAGED, str(path.parent), "cifar10_jpeg.npz"
        )


def test_the_table_of_sources_is_sound() -> None:
    for name, source in SOURCES.items():
        assert name == source.name
        assert len(source.mirrors) > 1
        for url in source.mirrors:
            assert urlsplit(url).scheme == "https"
            assert url.endswith("/")
        for file in source.files:
            algorithm, _, digest = file.checksum.partition(":")
            assert len(bytes.fromhex(digest)) == {"sha256": 32, "md5": 16}[algorithm]
            assert file.size > 0
    assert SOURCES["mnist"].folder in MNIST.folders
    assert SOURCES["fashion_mnist"].folder in FASHION_MNIST.folders
    assert len({file.checksum for source in SOURCES.values() for file in source.files}) == 14


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", SOURCES)
def test_without_a_network_one_line_says_what_to_do(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["data", name, "--to", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    source = SOURCES[name]
    wanted = [download.name for download in source.downloads]
    for part in (*source.mirrors, *wanted, str(tmp_path / source.folder), "not known"):
        assert part in output.err
    assert list(tmp_path.iterdir()) == []


def test_the_command_lists_all_datasets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDROBUST_DATA", raising=False)
    assert main(["data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["digits", *SOURCES]
    assert [line.split()[1] for line in lines] == ["in", "missing", "missing", "missing"]
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for file in IDX_FILES:
        (folder / file).write_bytes(b"")
    monkeypatch.setenv("FEDROBUST_DATA", str(tmp_path))
    assert main(["data", "--json"]) == 1  # something is damaged
    states = [State(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]
    assert states[1] == State("mnist", DAMAGED, str(folder), IDX_FILES[0])
    assert states[2] == State("fashion_mnist", MISSING, str(tmp_path / "fashion_mnist"))


def test_the_command_wants_a_name_and_a_place(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDROBUST_DATA", raising=False)
    for line, part in (("data mnits", "did you mean mnist?"), ("data mnist", "--to or FEDROBUST_DATA")):
        assert main(line.split()) == 2
        assert part in capsys.readouterr().err


def test_a_dataset_that_is_missing_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fedrobust data mnist"):
        load("mnist", tmp_path)
    with pytest.raises(InputError, match="fedrobust data cifar10"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_real_files_are_as_published(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if not os.environ.get("FEDROBUST_DATA"):
        pytest.skip("FEDROBUST_DATA is not set, so there are no files to check")
    state = look(SOURCES[name])
    if state.state == MISSING:
        pytest.skip(f"no {name} to check in {os.environ['FEDROBUST_DATA']}")
    if state.state == OTHER:
        pytest.skip(f"{state.damaged} in {state.folder} is not the published file")
    assert state.state == IN_PLACE
    if SOURCES[name].find(Path(os.environ["FEDROBUST_DATA"])) is None:
        return  # CIFAR-10 as JPEG
    copy = tmp_path / SOURCES[name].folder
    shutil.copytree(
        state.folder, copy, copy_function=lambda a, b: Path(b).write_bytes(Path(a).read_bytes())
    )
    assert main(["data", name, "--to", str(tmp_path)]) == 0  # nothing is fetched
    assert f"{name} is in place" in capsys.readouterr().out
    (first,) = copy.glob(f"{SOURCES[name].files[0].name}*")
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 1
    first.write_bytes(raw)
    assert look(SOURCES[name], tmp_path).damaged == first.name
