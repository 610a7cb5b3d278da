"""From image bytes to predictions: decoding, batching, forward pass, results. Knows no HTTP."""
