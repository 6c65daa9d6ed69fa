"""Thin adapters that put the robust mean into other federated-learning systems.

Each imports its host, so none is imported by `import fedrobust`: `fedrobust.integrations.flower` needs
flwr, `fedrobust.integrations.nvflare` nvflare. What they share is `fedrobust.integrations.defence`.
"""
