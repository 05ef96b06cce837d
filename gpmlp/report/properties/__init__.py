"""The page about properties: values, curves, and where they cannot be trusted."""
