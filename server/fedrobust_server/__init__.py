"""The federated-learning server: rounds, shards, gateway, ledger, reports."""

import os as _os
import secrets as _secrets
import sys as _sys

# Ray reads this when it is imported. Other users of a machine can reach its loopback, so a Ray that we
# start asks for a token; left to itself, Ray would keep one for all in the home directory. Whoever sets
# a mode, to join a cluster of his own, keeps it.
if "ray" not in _sys.modules and "RAY_AUTH_MODE" not in _os.environ:
    _os.environ["RAY_AUTH_MODE"] = "token"
    _os.environ["RAY_AUTH_TOKEN"] = _secrets.token_hex(32)
