"""Runs ``python -m hub.study``."""

from . import main

main()
