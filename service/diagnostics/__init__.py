"""Bug reports, GPU checks and load generation."""
