"""The models in memory: loading, activation, the hot swap."""
