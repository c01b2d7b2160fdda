"""Loaded models: bytes and lives. Who may load, who must go, what a servable does from load to close. Knows
versions; no registry and no alias."""
