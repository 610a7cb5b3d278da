"""What reproduces each figure of docs/benchmarks.md; the last line on stdout of each is one JSON document."""
