"""An OpenAI-compatible server (the extra ``server``). Table of contents:

- `app`: the application, put together; `settings`: what its owner may choose.
- `guard`, `limits`: keys, sizes, times, numbers of requests.
- `service`: what all routes share; `answers`: one request over HTTP; `sse`: replies in pieces.
- `files`, `batches`, `batch_worker`: stored files, and batches that survive a crash.
- `metrics`: Prometheus, with vLLM's names. `page.html`: a page to try the model.
- `routes`, `storage_routes`: which path does what.

What bodies and replies are, and how the engine answers them, is `qwen_jax.openai`'s matter.
"""
