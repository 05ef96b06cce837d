"""Checks of labels against one another, before a fit: findings that name the frames."""
