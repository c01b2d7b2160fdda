"""The commands of `gateway`, one module per subject; `gateway.cli` collects them.

Every start imports every module here. So a command imports what it needs, except typer, when it runs.
"""
