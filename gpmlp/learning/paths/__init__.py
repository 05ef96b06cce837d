"""Relaxations and minimum-energy paths on the posterior of few labels, which an oracle gives where they matter."""
