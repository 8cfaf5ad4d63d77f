"""Tasks, suites and statistics."""
