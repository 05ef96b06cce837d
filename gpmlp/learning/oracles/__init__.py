"""Oracles: the codes that label structures, and how they are run."""
