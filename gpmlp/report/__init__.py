"""Self-contained HTML pages about models and learning runs."""
