"""The command line."""

from shohin.cli.app import main

__all__ = ["main"]
