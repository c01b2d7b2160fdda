"""The commands of `gateway`, by what they are about; `gateway.cli` puts them together.

Every module here is imported at each start: what a command needs beyond typer it imports when it runs.
"""
