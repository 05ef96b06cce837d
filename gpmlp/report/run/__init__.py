"""The page about a learning run."""
