"""The forward pass: pure functions over arrays."""
