"""The page about a model: its errors and error bars on labelled structures."""
