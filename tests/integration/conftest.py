"""One Ray for all tests of this folder, and a federation on it behind a real gRPC gateway."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc.aio
import pytest
import ray
from fedrobust_proto.v1.federation_pb2_grpc import FederationStub
from fedrobust_server.aftermath import RoundReport
from fedrobust_server.config import RunConfig
from fedrobust_server.gateway import listen
from fedrobust_server.keys import Authority
from fedrobust_server.launch import Federation, federation, start_ray
from fedrobust_server.runs import RunFolder

Served = Callable[..., contextlib.AbstractAsyncContextManager[tuple[FederationStub, Federation]]]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of our own, for the whole session."""
    with start_ray(None):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def serve(ray_cluster: None, tmp_path: Path) -> Served:
    """Serve a configuration on loopback: a context manager that gives a stub and the federation."""

    @contextlib.asynccontextmanager
    async def served(
        config: RunConfig, watch: Callable[[RoundReport], None] = lambda _: None
    ) -> AsyncIterator[tuple[FederationStub, Federation]]:
        folder = tmp_path / config.run
        run = RunFolder(folder) if folder.exists() else RunFolder.create(tmp_path, config)
        with federation(config, run, data_dir=None, ray_address=None, watch=watch) as ready:
            door = await listen(ready.coordinator, "127.0.0.1:0")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}") as channel:
                yield FederationStub(channel), ready
            await door.stop(grace=0.5)

    return served


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """Certificates for alice and bob, a token for bob."""
    authority = Authority.create(tmp_path / "keys")
    authority.server(["localhost", "127.0.0.1"])
    authority.client("alice")
    authority.client("bob")
    authority.token("bob", federation="first")
    return authority
