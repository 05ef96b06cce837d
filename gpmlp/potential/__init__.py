"""Potential energy surfaces: structures -> Prediction."""

from gpmlp.potential.potential import Potential

__all__ = ["Potential"]
