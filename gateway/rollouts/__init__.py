"""Aliases: what the registry wants, what serves, what has proved itself, and the moves between them."""
