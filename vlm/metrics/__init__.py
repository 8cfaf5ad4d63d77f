"""What evaluation counts: pure functions on matrices and texts."""
