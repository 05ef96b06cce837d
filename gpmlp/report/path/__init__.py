"""The page about a reaction path, a saddle or a relaxation, and its figures."""
