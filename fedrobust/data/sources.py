"""Where the files of published datasets come from, whether they are in place, and fetching them.

A file is known by the checksum of its content, unpacked: archives are at times packed anew, and the same
files are kept gzipped or not. SHA-256 where we could work it out, or others did; MD5, which tells files
apart but is no proof against a forger who made both, for Fashion-MNIST.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fedrobust.data.cifar10 import BINARY_FILES, JPEG_FILE, SIZES, find_binary, load_cifar10
from fedrobust.data.datasets import FASHION_MNIST, IDX_FILES, MNIST, read_bytes
from fedrobust.data.files import data_directory, find_files
from fedrobust.errors import InputError

IN_PLACE, MISSING, DAMAGED, OTHER = "in place", "missing", "damaged", "not as published"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class File:
    """A file that a loader reads.

    Attributes:
        name: without .gz.
        size: of its content, in bytes.
        checksum: of its content, "sha256:" or "md5:" and hexadecimal digits.
    """

    name: str
    size: int
    checksum: str

    def holds(self, content: bytes) -> bool:
        """Whether this is the file's content."""
        return len(content) == self.size and checksum(content, like=self.checksum) == self.checksum


@dataclass(frozen=True)
class Download:
    """A file as it is published.

    Attributes:
        name: of what is fetched: one gzipped file, or a gzipped tar archive of several.
        files: what is in it.
        checksum: of an archive as it is, which is unpacked only if it fits.
    """

    name: str
    files: tuple[File, ...]
    checksum: str = ""


@dataclass(frozen=True)
class Source:
    """A published dataset.

    Attributes:
        name: its name in `fedrobust.data.datasets.CATALOG`.
        folder: where it is put, below the data directory.
        mirrors: what URLs of its downloads begin with, tried in turn.
        downloads: what is fetched.
        find: gives the files that the loader would read, of the names of all `files`, below a data
            directory; None where it finds none.
    """

    name: str
    folder: str
    mirrors: tuple[str, ...]
    downloads: tuple[Download, ...]
    find: Callable[[Path | None], Sequence[Path] | None]

    @property
    def files(self) -> list[File]:
        """All files, in the order of the downloads."""
        return [file for download in self.downloads for file in download.files]


@dataclass(frozen=True)
class State:
    """How a dataset is kept.

    Attributes:
        name: of the dataset.
        state: `IN_PLACE`, `MISSING`, `DAMAGED`, or `OTHER`: of the right size with other content,
            damaged or made by somebody else, as CIFAR-10's batches are that were written from JPEG.
        folder: where it is, or where it belongs; "" where no directory was given.
        damaged: the first file that is not as published.
    """

    name: str
    state: str
    folder: str
    damaged: str = ""


def look(source: Source, data_dir: Path | None = None) -> State:
    """Whether a dataset is in place; reads all its files.

    CIFAR-10 may also be there as JPEG, which has no published checksum: there its loader is asked.

    Args:
        source: of the dataset.
        data_dir: None means the directory that FEDROBUST_DATA names.
    """
    data_dir = data_directory(data_dir)
    found = source.find(data_dir)
    if found is not None:
        state, file = _judged(source, found)
        return State(source.name, state, str(found[0].parent), file)
    jpeg = find_files([JPEG_FILE], source.name, data_dir) if source.name == "cifar10" else None
    if jpeg is not None:
        state, damaged = (IN_PLACE, "") if _readable_jpeg(data_dir) else (DAMAGED, JPEG_FILE)
        return State(source.name, state, str(jpeg[0].parent), damaged)
    return State(source.name, MISSING, str(data_dir / source.folder) if data_dir else "")


def fetch(
    source: Source,
    data_dir: Path,
    *,
    mirrors: Sequence[str] | None = None,
    timeout: float = 30.0,
    watch: Callable[[str], None] = lambda _name: None,
) -> list[Path]:
    """Fetch the files that are not there as published, and write them, unpacked, once known to be good.

    Args:
        source: of the dataset.
        data_dir: the files go into the dataset's own folder below it, which is made.
        mirrors: what URLs begin with, tried in turn; None means the source's own.
        timeout: seconds that a server may keep silent.
        watch: is told the name of each download before it begins.

    Returns:
        The files written; none where all are in place. A file that is as published is never written
        again, and each is replaced as a whole or not at all.

    Raises:
        ConnectionError: no mirror gives a file as published; it says where to get it and to put it.
        OSError: a file cannot be written.
    """
    mirrors = source.mirrors if mirrors is None else mirrors
    if (found := source.find(data_dir)) is not None and _judged(source, found)[0] == IN_PLACE:
        return []
    folder, written = data_dir / source.folder, list[Path]()
    for download in source.downloads:
        watch(download.name)
        lacking = [file for file in download.files if not _kept(file, folder)]
        if not lacking:
            continue
        try:
            contents = _first_good(download, mirrors, timeout)
        except ConnectionError as error:
            raise ConnectionError(
                f"{source.name} cannot be fetched ({error}); get "
                f"{', '.join(each.name for each in source.downloads)} from {' or '.join(mirrors)} "
                f"on a machine that can, and put them, unpacked, into {folder}"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        for file in lacking:
            write_whole(folder / file.name, contents[file.name])
            written.append(folder / file.name)
    return written


def checksum(content: bytes, like: str) -> str:
    """The checksum of bytes, by the algorithm that another one names: "sha256:..." or "md5:..."."""
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # a temporary file is its owner's alone
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _judged(source: Source, found: Sequence[Path]) -> tuple[str, str]:
    """The state of the files found, and the name of the first that is not as published."""
    states = ((_state(file, path), path.name) for path, file in zip(found, source.files, strict=True))
    return next((state for state in states if state[0] != IN_PLACE), (IN_PLACE, ""))


def _state(file: File, path: Path) -> str:
    try:
        content = read_bytes(path)
    except InputError:
        return DAMAGED
    if file.holds(content):
        return IN_PLACE
    return OTHER if len(content) == file.size else DAMAGED


def _kept(file: File, folder: Path) -> bool:
    """Whether a folder has a file as published; where it is there twice, in the form that is read."""
    taken = next((p for p in (folder / file.name, folder / f"{file.name}.gz") if p.is_file()), None)
    return taken is not None and _state(file, taken) == IN_PLACE


def _readable_jpeg(data_dir: Path | None) -> bool:
    try:
        for part, size in SIZES.items():
            load_cifar10(part, data_dir, np.array([0, size - 1]))
    except InputError:
        return False
    return True


def _first_good(download: Download, mirrors: Sequence[str], timeout: float) -> dict[str, bytes]:
    """The contents of a download's files, from the first mirror that has them as published."""
    reasons = []
    for mirror in mirrors:
        url = f"{mirror}{download.name}"
        try:
            with tempfile.TemporaryFile() as raw:
                _get(url, raw, _limit(download), timeout)
                return dict(_unpacked(download, raw))
        except (OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException) as error:
            reasons.append(f"{url}: {getattr(error, 'reason', error) or type(error).__name__}")
    raise ConnectionError("; ".join(reasons))


def _limit(download: Download) -> int:
    """More than a download can have; what cannot be packed grows by less than a thousandth."""
    return sum(file.size for file in download.files) * 1001 // 1000 + _CHUNK


def _get(url: str, to: BufferedRandom, limit: int, timeout: float) -> None:
    with urllib.request.build_opener(_NoDowngrade).open(url, timeout=timeout) as response:
        while chunk := response.read(_CHUNK):
            to.write(chunk)
            if to.tell() > limit:
                raise ConnectionError(f"sends more than the {limit} bytes that this can be")
    to.seek(0)


class _NoDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but none that leads from https to anything else."""

    def redirect_request(self, req: urllib.request.Request, *arguments: Any) -> Any:  # noqa: ANN401
        target = arguments[-1]
        if req.type == "https" and not target.startswith("https://"):
            raise urllib.error.URLError(f"leads to {target}, which is not https")
        return super().redirect_request(req, *arguments)


def _unpacked(download: Download, raw: BufferedRandom) -> Iterator[tuple[str, bytes]]:
    """Each file's name and content; raises `ConnectionError` for what is not as published."""
    if download.checksum:
        algorithm = download.checksum.partition(":")[0]
        found = f"{algorithm}:{hashlib.file_digest(raw, algorithm).hexdigest()}"
        if found != download.checksum:
            raise ConnectionError(f"has the checksum {found}, expected {download.checksum}")
        raw.seek(0)
    for file, content in zip(download.files, _contents(download, raw), strict=True):
        if not file.holds(content):
            found = f"{len(content)} bytes, {checksum(content, like=file.checksum)}"
            raise ConnectionError(
                f"holds another {file.name}: {found}, expected {file.size} bytes, {file.checksum}"
            )
        yield file.name, content


def _contents(download: Download, raw: BufferedRandom) -> Iterator[bytes]:
    """What is in a download, in the order of its files, no more than a byte too much of each."""
    if not download.name.endswith(".tar.gz"):
        (file,) = download.files
        with gzip.open(raw) as unzipped:
            yield unzipped.read(file.size + 1)
        return
    with tarfile.open(fileobj=raw, mode="r:gz") as archive:
        members = {PurePosixPath(m.name).name: m for m in archive.getmembers() if m.isfile()}
        for file in download.files:
            member = members.get(file.name)
            content = archive.extractfile(member) if member else None
            yield content.read(file.size + 1) if content else b""


def _idx(contents: Sequence[tuple[int, str]]) -> tuple[Download, ...]:
    """Four gzipped files, of these sizes and checksums."""
    return tuple(
        Download(f"{name}.gz", (File(name, size, digest),))
        for name, (size, digest) in zip(IDX_FILES, contents, strict=True)
    )


_CIFAR10 = tuple(
    File(name, 30730000, f"sha256:{digest}")
    for name, digest in zip(
        [name for names in BINARY_FILES.values() for name in names],
        [
            "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        ],
        strict=True,
    )
)

SOURCES: dict[str, Source] = {
    "mnist": Source(
        "mnist",
        "mnist",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        _idx(
            [
                (47040016, "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
                (60008, "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
                (7840016, "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
                (10008, "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
            ]
        ),
        MNIST.find,
    ),
    "fashion_mnist": Source(
        "fashion_mnist",
        "fashion_mnist",
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
        ),
        _idx(
            [
                (47040016, "md5:f4a8712d7a061bf5bd6d2ca38dc4d50a"),
                (60008, "md5:9018921c3c673c538a1fc5bad174d6f9"),
                (7840016, "md5:8181f5470baa50b63fa0f6fddb340f0a"),
                (10008, "md5:15d484375f8d13e6eb1aabb0c3f46965"),
            ]
        ),
        FASHION_MNIST.find,
    ),
    "cifar10": Source(
        "cifar10",
        "cifar-10-batches-bin",
        ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/"),
        (
            Download(
                "cifar-10-binary.tar.gz",
                _CIFAR10,
                "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        find_binary,
    ),
}
