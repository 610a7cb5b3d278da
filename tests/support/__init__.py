"""Shared by several test files: pretended and simulated GPUs, emulated arithmetic."""
