"""An OpenAI-compatible server (the extra ``server``). Table of contents:

- `app`: the application, put together; `settings`: what its owner may choose.
- `protocol`, `chat_protocol`, `completion_protocol`: bodies of requests, checked strictly.
- `errors`: everything that goes wrong, in OpenAI's form.
- `guard`, `limits`: keys, sizes, times, numbers of requests.
- `calls`: requests of the engine, seen from the event loop; `sampling`: fields to parameters.
- `service`: what all routes share; `answers`: one request from its body to its reply.
- `chat` (with `chat_choice`), `completions`: a body to prompts, events to replies.
- `logprobs`, `sse`: how replies write logprobs, and how pieces are framed.
- `media`, `fetch`: pictures and videos of messages, and from where they may come.
- `durable`, `files`, `batches`, `batch_worker`: stored files, and batches that survive a crash.
- `metrics`: Prometheus, with vLLM's names. `page.html`: a page to try the model.
- `routes`, `storage_routes`: which path does what.
"""
