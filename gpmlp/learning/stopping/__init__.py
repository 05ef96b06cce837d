"""When a learning run has learned enough."""
