"""Vectors on the wire: raw little-endian values of a declared dtype, cut into chunks.

Half precision halves the bytes. A value x arrives as x (1 + e), |e| <= 2^-8 in bfloat16, which has the
range of float32, and 2^-11 in float16; there values below 6e-5 are off by up to 2^-25, and those beyond
65504 become infinite, so that the update is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from blake3 import blake3

from fedrobust_proto.v1.federation_pb2 import (
    COMPRESSION_NONE,
    COMPRESSION_ZSTD,
    DTYPE_BFLOAT16,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    Chunk,
    Compression,
    DType,
    Encoding,
)

Floats = npt.NDArray[np.float32]

CHUNK_BYTES = 2 << 20
"""2 MiB: chunks of 1 to 4 MiB move fastest, and this stays below gRPC's default message limit."""
LARGEST_CHUNK = 4 << 20
"""Chunks that are longer, compressed or not, are refused."""

DTYPES: dict[DType, torch.dtype] = {
    DTYPE_FLOAT32: torch.float32,
    DTYPE_BFLOAT16: torch.bfloat16,
    DTYPE_FLOAT16: torch.float16,
}
"""The dtypes understood."""
COMPRESSIONS: dict[str, Compression] = {"none": COMPRESSION_NONE, "zstd": COMPRESSION_ZSTD}
"""The compressions understood, by their names in a configuration."""


def encoding(dtype: str = "float32", compression: str = "none") -> Encoding:
    """How vectors are to travel, by the names of a configuration.

    Raises:
        KeyError: an unknown name.
    """
    dtypes = {str(known).removeprefix("torch."): number for number, known in DTYPES.items()}
    return Encoding(dtype=dtypes[dtype], compression=COMPRESSIONS[compression])


def item_bytes(dtype: DType) -> int:
    """Bytes of one value, uncompressed."""
    return DTYPES[dtype].itemsize


def pack(vector: Floats, dtype: DType) -> memoryview:
    """The bytes, uncompressed, that a (d,) vector travels as; its own memory where it can be."""
    values = np.ascontiguousarray(vector, dtype="<f4").reshape(-1)
    if not len(values):
        return memoryview(b"")
    if dtype != DTYPE_FLOAT32:
        half = torch.tensor(values).to(DTYPES[dtype])
        return half.view(torch.int16).numpy().data.cast("B")
    return values.data.cast("B")


def digest(data: memoryview) -> bytes:
    """What an update is known by: BLAKE3 of its uncompressed bytes."""
    return blake3(data).digest()


def chunks(
    data: memoryview, compression: Compression = COMPRESSION_NONE, start: int = 0
) -> Iterator[Chunk]:
    """Cut packed bytes into chunks, in order, from a byte on."""
    press = zstandard.ZstdCompressor(level=1).compress if compression == COMPRESSION_ZSTD else bytes
    for offset in range(start, len(data), CHUNK_BYTES):
        yield Chunk(offset=offset, data=press(data[offset : offset + CHUNK_BYTES]))


def expand(data: bytes, compression: Compression) -> bytes:
    """The uncompressed bytes of a chunk; never more than `LARGEST_CHUNK`.

    Raises:
        ValueError: too long, not of this compression, or damaged.
    """
    if compression == COMPRESSION_ZSTD:
        try:
            size = zstandard.get_frame_parameters(data).content_size
            if not 0 <= size <= LARGEST_CHUNK:
                raise ValueError(f"a chunk must say that it holds at most {LARGEST_CHUNK} bytes")
            data = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"a chunk is no whole zstd frame: {error}") from None
    if len(data) > LARGEST_CHUNK:
        raise ValueError(f"a chunk may hold at most {LARGEST_CHUNK} bytes, got {len(data)}")
    return data


def unpack(data: bytes | bytearray, dtype: DType) -> Floats:
    """The values of uncompressed bytes, (c,) float32; they may share its memory."""
    if dtype == DTYPE_FLOAT32:
        return np.frombuffer(data, "<f4")
    half = torch.from_numpy(np.frombuffer(data, "<i2").copy()).view(DTYPES[dtype])
    return half.float().numpy()
