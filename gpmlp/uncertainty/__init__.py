"""Uncertainty: how good standard deviations are (scores), how to rescale them (calibration), what is unlike the data (mahalanobis)."""
