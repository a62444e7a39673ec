"""The commands of `qwen-jax`, a module each: `add_options` says what it takes, `run` does it.

A module is imported when its command is called, and imports JAX only in `run`.
"""
