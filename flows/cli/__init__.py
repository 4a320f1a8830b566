"""The command line `kdrl`."""

from flows.cli.app import app, main

__all__ = ["app", "main"]
