"""Selection among several bases or architectures by cross-validation."""
