"""The outcome of a training run: comparison, parity, results, lineage, uncertainty."""
