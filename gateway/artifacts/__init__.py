"""Bytes on disk, verified: from a source to a directory that may be loaded.

Knows no live state, no process."""
