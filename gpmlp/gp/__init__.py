"""The Gaussian process: kernels on features, their covariances with observations, likelihood, posterior, evidence."""
