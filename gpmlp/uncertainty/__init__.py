"""Uncertainty: errors beside their standard deviations (residuals, scores), calibration, distance from the data (mahalanobis)."""
