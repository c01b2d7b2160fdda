"""Artifacts: downloads the files of a version, verifies them, and keeps them on disk.

Must not know live state or processes."""
