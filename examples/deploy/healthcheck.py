"""Ask a server over gRPC whether it serves; exit code 0 if it does.

FEDROBUST_ADDRESS: host:port [127.0.0.1:7070].
FEDROBUST_AUTHORITY: PEM file of the authority that signed the server's certificate; without it no TLS.
FEDROBUST_CERTIFICATE, FEDROBUST_KEY: PEM files, where the server asks clients for a certificate.
FEDROBUST_SERVER_NAME: the name in the server's certificate [localhost].
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def channel(settings: Mapping[str, str]) -> grpc.Channel:
    """A channel as these settings say."""
    address = settings.get("FEDROBUST_ADDRESS", "127.0.0.1:7070")
    files = (settings.get(f"FEDROBUST_{name}") for name in ("AUTHORITY", "KEY", "CERTIFICATE"))
    authority, key, certificate = (Path(file).read_bytes() if file else None for file in files)
    if authority is None:
        return grpc.insecure_channel(address)
    name = settings.get("FEDROBUST_SERVER_NAME", "localhost")
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", name)])


def main() -> int:
    """Ask once."""
    with channel(os.environ) as connection:
        try:
            reply = health_pb2_grpc.HealthStub(connection).Check(
                health_pb2.HealthCheckRequest(), timeout=5
            )
        except grpc.RpcError as error:
            print(f"no answer: {error.code().name} {error.details()}", file=sys.stderr)
            return 1
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
    return 0 if reply.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
