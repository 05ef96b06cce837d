"""The command line: arguments -> calls, progress and tables; the only place that prints."""
