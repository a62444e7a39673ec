"""Batches from files to files (the extra ``batch``; ``parquet`` for Parquet). Table of contents:

- `run`: a batch with a model: `run_batch`.
- `job`: many requests at once, each answer on the disk before it counts.
- `inputs`: all lines as one sequence; `jsonl`, `parquet`: those of one file; `files`: which files.
- `outputs`: what is written, what is done already, and whether it is the same batch.
- `shard`: which part a job does; `progress`: how far it is.

What a line may hold and how its answer looks is `qwen_jax.openai.batch_lines`'s matter.
"""
