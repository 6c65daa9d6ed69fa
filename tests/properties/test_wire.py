"""Any vector in any encoding and any chunks arrives as itself; any bytes are a vector or an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from fedrobust_proto.v1 import federation_pb2 as pb
from fedrobust_proto.v1 import vectors
from fedrobust_server.intake import RefusedError, Upload, read_header, receive, unfit
from fedrobust_server.spool import Spool
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FRAMES = [
    *(zstandard.compress(bytes(n)) for n in (0, 1, 64, (4 << 20) + 1)),
    b"(\xb5/\xfd\xe0" + (1 << 62).to_bytes(8, "little"),
    b"P*M\x18\x00\x01\x00\x00" + bytes(256),
]
encodings = st.builds(
    pb.Encoding,
    dtype=st.sampled_from(list(vectors.DTYPES)),
    compression=st.sampled_from(list(vectors.COMPRESSIONS.values())),
)
mutated = st.builds(
    lambda frame, at, new: frame[: at % (len(frame) + 1)] + new + frame[at % (len(frame) + 1) + 1 :],
    st.sampled_from(FRAMES),
    st.integers(0, 40),
    st.binary(max_size=4),
)
offsets = st.integers(0, 2**64 - 1) | st.integers(0, 8).map(lambda n: 4 * n)
finite = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-6e4, 6e4, width=32))


@contextlib.contextmanager
def spool(size: int) -> Any:
    """A spool with room for three updates; the middle one is written."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Spool.open(Path(folder) / "spool", 3, size)
        yield opened
        opened.remove()


def header(vector: Any, encoding: pb.Encoding) -> tuple[pb.SubmitHeader, bytes]:
    data = vectors.pack(vector, encoding.dtype)
    digest = vectors.digest(data)
    return pb.SubmitHeader(encoding=encoding, length=len(vector), digest=digest), bytes(data)


async def stream(chunks: list[pb.Chunk]) -> AsyncIterator[pb.SubmitRequest]:
    for chunk in chunks:
        yield pb.SubmitRequest(chunk=chunk)


@given(finite, encodings, st.lists(st.integers(0, 200), max_size=8))
def test_any_chunks_of_any_vector_in_any_encoding_arrive_as_it(
    vector: Any, encoding: pb.Encoding, places: list[int]
) -> None:
    head, data = header(vector, encoding)
    assert unfit(head, len(vector)) is None
    item = vectors.item_bytes(encoding.dtype)
    edges = sorted({0, len(data), *(place % len(vector) * item for place in places)})
    press = zstandard.compress if encoding.compression else bytes
    chunks = [pb.Chunk(offset=a, data=press(data[a:b])) for a, b in itertools.pairwise(edges)]
    with spool(len(vector)) as opened:
        upload, forwarded = Upload(head, 1, opened), np.full(len(vector), np.nan, np.float32)

        def forward(_slot: int, _ticket: int, start: int, values: Any) -> None:
            forwarded[start : start + len(values)] = values

        assert asyncio.run(receive(stream(chunks), upload, forward)) is None
        arrived = opened.read(1, 0, len(vector))
        for neighbour in (0, 2):
            assert not opened.read(neighbour, 0, len(vector)).any()
    np.testing.assert_array_equal(forwarded, arrived)
    expected = torch.from_numpy(vector).to(vectors.DTYPES[encoding.dtype]).float().numpy()
    np.testing.assert_array_equal(arrived, expected)
    rounding = {pb.DTYPE_FLOAT32: 0.0, pb.DTYPE_BFLOAT16: 2.0**-8, pb.DTYPE_FLOAT16: 2.0**-11}
    # What is subnormal in float32 may be taken for zero; in float16, values below 6e-5 are off by 2^-25.
    least = 2.0**-25 if encoding.dtype == pb.DTYPE_FLOAT16 else 2.0**-126
    error = np.abs(arrived.astype(np.float64) - vector)
    assert (error <= rounding[encoding.dtype] * np.abs(vector) + least).all()
    np.testing.assert_allclose(
        upload.square, np.square(arrived.astype(np.float64)).sum(), rtol=1e-5, atol=1e-30
    )


@given(st.binary(max_size=100) | mutated, st.sampled_from([*vectors.COMPRESSIONS.values(), 7]))
@settings(max_examples=500)
def test_bytes_expand_to_no_more_than_a_chunk_or_to_an_error(data: bytes, compression: Any) -> None:
    with contextlib.suppress(ValueError):
        assert len(vectors.expand(data, compression)) <= vectors.LARGEST_CHUNK


@given(st.binary(max_size=100), st.sampled_from(list(vectors.DTYPES)))
def test_bytes_are_values_or_an_error(data: bytes, dtype: Any) -> None:
    with contextlib.suppress(ValueError):
        assert len(vectors.unpack(data, dtype)) * vectors.item_bytes(dtype) == len(data)


@given(
    finite,
    encodings,
    st.lists(
        st.tuples(
            st.integers(0, 2**64 - 1) | st.integers(0, 8).map(lambda n: 4 * n), st.binary() | mutated
        ),
        max_size=4,
    ),
)
def test_a_chunk_is_stored_in_its_place_or_refused(
    vector: Any, encoding: pb.Encoding, chunks: list[tuple[int, bytes]]
) -> None:
    head, _ = header(vector, encoding)
    with spool(len(vector)) as opened:
        upload = Upload(head, 1, opened)
        for offset, data in chunks:
            before = upload.received
            try:
                upload.take(pb.Chunk(offset=offset, data=data))
            except RefusedError:
                assert upload.received == before
        assert upload.received <= upload.total
        for neighbour in (0, 2):
            assert not opened.read(neighbour, 0, len(vector)).any()
        assert os.fstat(opened.file).st_size == 3 * len(vector) * 4


@given(st.binary(max_size=60))
def test_a_header_is_read_and_judged_or_is_none(data: bytes) -> None:
    async def read() -> pb.SubmitHeader | None:
        async def messages() -> AsyncIterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=parsed)

        return await read_header(messages())

    parsed = pb.SubmitHeader()
    with contextlib.suppress(Exception):
        parsed.ParseFromString(data)
    read_back = asyncio.run(read())
    assert read_back == parsed
    fault = unfit(parsed, 10)
    assert fault is None or fault.reason
