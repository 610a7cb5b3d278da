"""What several test files share: pretended and simulated GPUs, emulated arithmetic."""
