from __future__ import annotations

import gzip
import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedrobust.data import (
    IID,
    Dirichlet,
    Quantity,
    Rare,
    Shards,
    Similarity,
    Split,
    load,
    parse_split,
    read_idx,
)
from fedrobust.data.cifar10 import BINARY_FILES, load_cifar10
from fedrobust.data.datasets import IDX_FILES
from fedrobust.errors import InputError


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_small_set(folder: Path, *, zipped: bool = False) -> npt.NDArray[np.uint8]:
    """Four well-formed files: 6 images of 5 x 4 pixels to train on, the first 3 to test on."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4)
    labels = np.array([0, 1, 2, 9, 4, 5], np.uint8)
    for name, array in zip(IDX_FILES, (images, labels, images[:3], labels[:3]), strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return images


def test_digits() -> None:
    data = load("digits")
    assert data.shape == (1, 8, 8)
    assert (len(data.train_x), len(data.test_x), data.classes) == (1437, 360, 10)
    assert data.train_x.dtype == torch.float32
    assert data.train_y.dtype == torch.int64
    pixels = torch.cat([data.train_x, data.test_x])
    assert pixels.mean().abs() < 1e-3
    assert (pixels.std() - 1).abs() < 1e-3


def test_digits_split_is_fixed_and_stratified() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    counts = torch.bincount(torch.cat([first.train_y, first.test_y]), minlength=10)
    fraction = torch.bincount(first.test_y, minlength=10) / counts
    assert ((fraction - 0.2).abs() < 0.01).all()


def test_unknown_dataset_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"did you mean mnist.*digits, fashion_mnist, mnist"):
        load("mnits")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "FashionMNIST/raw"),
        ("fashion_mnist", "fashion-mnist"),
    ],
)
def test_idx_files_are_found(tmp_path: Path, name: str, folder: str, zipped: bool) -> None:
    write_small_set(tmp_path / folder, zipped=zipped)
    data = load(name, tmp_path)
    assert data.shape == (1, 5, 4)
    assert data.train_y.tolist() == [0, 1, 2, 9, 4, 5]
    assert data.test_y.tolist() == [0, 1, 2]


def test_idx_pixels_are_normalised(tmp_path: Path) -> None:
    images = write_small_set(tmp_path)
    expected = (images[:, None] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(load("mnist", tmp_path).train_x.numpy(), expected, atol=1e-6)


def test_directory_named_after_the_dataset_goes_first(tmp_path: Path) -> None:
    write_small_set(tmp_path)
    write_small_set(tmp_path / "fashion_mnist")
    other = np.zeros((6, 7, 7), np.uint8)
    for name, images in ((IDX_FILES[0], other), (IDX_FILES[2], other[:3])):
        (tmp_path / "fashion_mnist" / name).write_bytes(idx(images))
    assert load("fashion_mnist", tmp_path).shape == (1, 7, 7)


def test_environment_variable_gives_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_small_set(tmp_path)
    monkeypatch.setenv("FEDROBUST_DATA", str(tmp_path))
    assert len(load("mnist").train_x) == 6


def test_missing_files_say_what_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (*IDX_FILES, str(tmp_path / "mnist"), "--data-dir", "FEDROBUST_DATA"):
        assert part in message
    monkeypatch.delenv("FEDROBUST_DATA", raising=False)
    with pytest.raises(InputError, match="no directory was given"):
        load("mnist")


GOOD = idx(np.zeros((2, 3, 4), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes long, shorter than an IDX header"),
        (GOOD[:10], "10 bytes long"),
        (GOOD[:-1], "declares 2 x 3 x 4 bytes but holds 23"),
        (GOOD + b"\0", "holds 25"),
        (b"\x00\x00\x08\x01" + GOOD[4:], "number 2049, expected 2051"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "number 3331, expected 2051"),
        (b"\x89PNG" + GOOD[4:], "expected 2051"),
        (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "truncated or damaged"),
        (GOOD[:4] + b"\0" * 4 + b"\xff" * 8, "0 x 4294967295 x 4294967295 bytes, more than any array"),
    ],
    ids=["empty", "header", "truncated", "too long", "labels", "float32", "png", "huge", "none of huge"],
)
def test_malformed_idx(tmp_path: Path, content: bytes, message: str) -> None:
    for name, raw in (("images", content), ("images.gz", gzip.compress(content))):
        path = tmp_path / name
        path.write_bytes(raw)
        with pytest.raises(InputError, match=message) as caught:
            read_idx(path, dimensions=3)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"no gzip at all", gzip.compress(GOOD, mtime=0)[:-9]])
def test_malformed_gzip(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=r"images\.gz"):
        read_idx(path, dimensions=3)


@settings(deadline=None)
@given(magic=st.sampled_from([b"", idx(np.zeros(0, np.uint8))[:4]]), rest=st.binary(max_size=30))
def test_any_bytes_are_read_in_full_or_refused(
    magic: bytes, rest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(magic + rest)
    try:
        items = read_idx(path, dimensions=1)
    except InputError:
        return
    assert idx(items) == magic + rest


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1], "6 images but .* 2 labels"), ([0, 1, 2, 3, 4, 10], "label 10, expected 0 .. 9")],
)
def test_labels_must_fit(tmp_path: Path, labels: list[int], message: str) -> None:
    write_small_set(tmp_path)
    (tmp_path / IDX_FILES[1]).write_bytes(idx(np.array(labels, np.uint8)))
    with pytest.raises(InputError, match=message):
        load("mnist", tmp_path)


def test_images_to_train_and_to_test_on_must_be_of_one_shape(tmp_path: Path) -> None:
    write_small_set(tmp_path)
    (tmp_path / IDX_FILES[2]).write_bytes(idx(np.zeros((3, 4, 5), np.uint8)))
    with pytest.raises(InputError, match=r"images of 5 x 4 pixels but .* of 4 x 5"):
        load("mnist", tmp_path)


def test_no_images(tmp_path: Path) -> None:
    write_small_set(tmp_path)
    (tmp_path / IDX_FILES[0]).write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    (tmp_path / IDX_FILES[1]).write_bytes(idx(np.zeros(0, np.uint8)))
    with pytest.raises(InputError, match="no pixels"):
        load("mnist", tmp_path)


def test_mnist_is_the_published_one() -> None:
    if not os.environ.get("FEDROBUST_DATA"):
        pytest.skip("FEDROBUST_DATA is not set, so there is no MNIST to check")
    try:
        data = load("mnist")
    except InputError as error:
        pytest.skip(f"no MNIST to check: {error}")
    assert data.shape == (1, 28, 28)
    assert torch.bincount(data.train_y).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    assert torch.bincount(data.test_y).tolist() == [
        *(980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)
    ]
    assert data.train_x.mean().abs() < 1e-3
    assert (data.train_x.std() - 1).abs() < 1e-3


def test_cifar10_is_read_from_its_published_batches(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] = np.arange(12) % 10
    for names, part in zip(BINARY_FILES.values(), (records[:10], records[10:]), strict=True):
        for name, batch in zip(names, np.split(part, len(names)), strict=True):
            (tmp_path / name).write_bytes(batch.tobytes())
    data = load("cifar10", tmp_path)
    assert data.shape == (3, 32, 32)
    assert data.train_y.tolist() == list(range(10))
    assert data.test_y.tolist() == [0, 1]
    green = records[11, 1 + 1024 + 32 * 5 + 7] / 255
    assert float(data.test_x[1, 1, 5, 7]) == pytest.approx((green - 0.4822) / 0.2435, abs=1e-5)
    assert data.train_x.is_contiguous()


def test_cifar10_batches_must_have_ten_classes_and_the_images_asked_for(tmp_path: Path) -> None:
    records = np.zeros((2, 3073), np.uint8)
    records[1, 0] = 9
    records.tofile(tmp_path / "test_batch.bin")
    assert load_cifar10("test", tmp_path)[1].tolist() == [0, 9]
    with pytest.raises(InputError, match="holds 2 images, no image 2; fetch it again"):
        load_cifar10("test", tmp_path, np.array([0, 2]))
    with pytest.raises(InputError, match="counted from 0, got -1"):
        load_cifar10("test", tmp_path, np.array([0, -1]))
    records[1, 0] = 10
    records.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(InputError, match=r"test_batch\.bin holds the label 10, expected 0 \.\. 9"):
        load_cifar10("test", tmp_path)


Arrays = dict[str, npt.NDArray[Any]]


def jpegs(labels: list[int]) -> Arrays:
    """A pack of grey squares, which are to test on."""
    image, buffer = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.new("RGB", (32, 32), (128, 128, 128)).save(buffer, "JPEG")
    return {
        "test_jpeg": np.frombuffer(buffer.getvalue() * len(labels), np.uint8),
        "test_offsets": np.arange(len(labels) + 1) * len(buffer.getvalue()),
        "test_labels": np.array(labels),
    }


def spoilt_archive(path: Path) -> None:
    """A compressed member that cannot be unpacked."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("test_jpeg.npy").header_offset + 60
    raw = bytearray(path.read_bytes())
    raw[start : start + 40] = b"\xff" * 40
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda a: {**a, "test_offsets": a["test_offsets"][:-1]},
            r"int64 \(2,\), expected integers, one",
        ),
        (lambda a: {**a, "test_offsets": a["test_offsets"] / 1}, r"test_offsets of float64 \(3,\)"),
        (lambda a: {**a, "test_offsets": a["test_offsets"] + 10**9}, "holds no image 0 of 32 x 32"),
        (lambda a: {**a, "test_jpeg": a["test_jpeg"][:-99]}, "holds no image 1 of 32 x 32"),
        (lambda a: {**a, "test_labels": np.array([3, 10])}, r"holds the label 10, expected 0 \.\. 9"),
        (lambda a: {**a, "test_labels": np.array([-1, 3])}, "holds the label -1"),
        (lambda a: {**a, "test_labels": np.array([3.0, 4.0])}, r"labels of float64 \(2,\), expected"),
        (lambda a: {**a, "test_labels": np.array(3)}, r"labels of int64 \(\)"),
        (lambda a: {**a, "test_labels": np.zeros(0, int)}, r"labels of int64 \(0,\)"),
        (lambda a: {**a, "test_labels": np.array([{}, {}])}, "cannot be read .*; fetch it again"),
        (lambda a: {"test_labels": a["test_labels"]}, "cannot be read .*test_jpeg"),
    ],
)
def test_a_spoilt_pack_of_jpegs_is_told_in_a_line(
    tmp_path: Path, spoil: Callable[[Arrays], Arrays], message: str
) -> None:
    path, sound = tmp_path / "cifar10_jpeg.npz", jpegs([3, 7])
    np.savez(path, **sound)
    images, labels = load_cifar10("test", tmp_path)
    assert (images.shape, labels.tolist()) == ((2, 32, 32, 3), [3, 7])
    np.savez(path, **spoil(sound))
    with pytest.raises(InputError, match=message) as caught:
        load_cifar10("test", tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_archive_of_jpegs_is_told_in_a_line(tmp_path: Path) -> None:
    path, sound = tmp_path / "cifar10_jpeg.npz", jpegs([3, 7])
    np.savez_compressed(path, **sound)
    with pytest.raises(InputError, match="holds 2 images, no image 2"):
        load_cifar10("test", tmp_path, np.array([2]))
    spoilt_archive(path)
    with pytest.raises(InputError, match=r"cifar10_jpeg\.npz cannot be read .*; fetch it again"):
        load_cifar10("test", tmp_path)
    np.savez(path, **sound)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cannot be read .*not a zip file"):
        load_cifar10("test", tmp_path)
    with path.open("wb") as file:
        np.save(file, sound["test_jpeg"])  # one array, under the archive's name
    with pytest.raises(InputError, match=r"cannot be read .*not a zip file"):
        load_cifar10("test", tmp_path)


splits = st.one_of(
    st.just(IID()),
    st.sampled_from([1e-300, 1e-3, 0.1, 0.5, 10.0, 1e6]).map(Dirichlet),
    st.sampled_from([1e-300, 1e-3, 0.1, 0.5, 10.0, 1e6]).map(Quantity),
    st.integers(1, 3).map(lambda holders: Rare(holders, 0)),
    st.floats(0, 1).map(Similarity),
    st.integers(1, 5).map(Shards),
)


@settings(deadline=None)
@given(
    split=splits,
    labels=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_split_covers_everything_once(
    split: Split, labels: list[int], fraction: float, seed: int
) -> None:
    clients = max(1, round(fraction * len(labels)))
    array = np.array(labels)
    if isinstance(split, Rare):
        assume(split.label in labels and split.holders <= clients)
        assume(np.count_nonzero(array != split.label) >= clients - split.holders)
    parts = split(array, clients, np.random.default_rng(seed))
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    if isinstance(split, Rare):
        assert not any((array[part] == split.label).any() for part in parts[: -split.holders])
    again = split(array, clients, np.random.default_rng(seed))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(p) for p in IID()(np.zeros(103, int), 10, np.random.default_rng(0))]
    assert set(sizes) == {10, 11}


def test_alpha_sets_how_one_sided_clients_are() -> None:
    labels = np.arange(20_000) % 10

    def largest_class(alpha: float) -> float:
        parts = Dirichlet(alpha)(labels, 20, np.random.default_rng(1))
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    shares = [largest_class(alpha) for alpha in (0.01, 0.1, 1.0, 1000.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.8
    assert shares[-1] < 0.12


LABELS = np.random.default_rng(0).permutation(np.arange(2000) % 10)


@pytest.mark.parametrize(("gamma", "own"), [(0.0, 1.0), (0.5, 0.55), (1.0, 0.1)])
def test_gamma_is_the_part_that_all_have_in_common(gamma: float, own: float) -> None:
    parts = Similarity(gamma)(LABELS, 10, np.random.default_rng(0))
    assert {len(part) for part in parts} == {200}
    largest = [np.bincount(LABELS[part]).max() / len(part) for part in parts]
    assert np.mean(largest) == pytest.approx(own, abs=0.04)
    uneven = Similarity(gamma)(LABELS[:1003], 7, np.random.default_rng(0))
    assert max(map(len, uneven)) - min(map(len, uneven)) <= 1


def test_two_shards_are_two_classes_at_most() -> None:
    parts = Shards()(LABELS, 10, np.random.default_rng(0))
    assert max(len(np.unique(LABELS[part])) for part in parts) == 2
    assert {len(part) for part in parts} == {200}


def test_a_rare_class_is_held_by_the_last_clients_alone() -> None:
    parts = Rare(2, label=3)(LABELS, 10, np.random.default_rng(0))
    held = [int((LABELS[part] == 3).sum()) for part in parts]
    assert held[:8] == [0] * 8
    assert abs(held[8] - held[9]) <= 1
    others = [len(part) - count for part, count in zip(parts, held, strict=True)]
    assert max(others) - min(others) <= 1
    with pytest.raises(InputError, match="there are 10 clients and 11 holders"):
        Rare(11)(LABELS, 10, np.random.default_rng(0))
    with pytest.raises(InputError, match="no example has the label 77"):
        Rare(2, label=77)(LABELS, 10, np.random.default_rng(0))


def test_a_rare_class_is_given_to_nobody_else_where_examples_are_few() -> None:
    labels = np.array([3, 3, 3, 3, 1])
    assert [len(part) for part in Rare(2, label=3)(labels, 3, np.random.default_rng(0))] == [1, 2, 2]
    with pytest.raises(InputError, match=r"2 clients are to hold other labels than 3 .* 1 examples"):
        Rare(1, label=3)(labels, 3, np.random.default_rng(0))


def test_quantity_leaves_the_mixture_alone() -> None:
    parts = Quantity()(LABELS, 10, np.random.default_rng(0))
    sizes = [len(part) for part in parts]
    assert max(sizes) > 5 * min(sizes)
    large = max(parts, key=len)
    assert np.bincount(LABELS[large]).max() / len(large) < 0.15


@pytest.mark.parametrize("clients", [0, -1, 4])
def test_impossible_number_of_clients(clients: int) -> None:
    with pytest.raises(InputError, match=f"3 examples over {clients} clients; use 1 to 3"):
        IID()(np.zeros(3, int), clients, np.random.default_rng(0))


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e7, float("nan"), float("inf")])
def test_bad_alpha(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha must be"):
        Dirichlet(alpha)


@pytest.mark.parametrize(
    "split",
    [
        IID(),
        Dirichlet(),
        Dirichlet(0.1),
        Similarity(0.25),
        Shards(),
        Shards(3),
        Quantity(2.0),
        Rare(3, 1),
    ],
    ids=repr,
)
def test_split_text(split: Split) -> None:
    assert parse_split(repr(split)) == split


def test_bad_split_text_lists_the_choices() -> None:
    with pytest.raises(InputError, match="dirichlet, iid"):
        parse_split("dirichlett(0.1)")
    with pytest.raises(InputError, match="alpha"):
        parse_split("dirichlet(beta=1)")
    for text in ("similarity(1.5)", "shards(0)", "quantity(0.0)", "rare(0)", "rare(2, -1)"):
        with pytest.raises(InputError, match="must be"):
            parse_split(text)
