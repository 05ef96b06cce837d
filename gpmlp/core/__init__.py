"""Structures, their neighbours and environments, units, errors: what every other package shares."""
