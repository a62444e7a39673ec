"""OpenAI's requests and replies, without HTTP (the extra ``batch``). Table of contents:

- `protocol`, `chat_protocol`, `completion_protocol`: bodies of requests; `checks`: their check.
- `errors`: everything that goes wrong, in OpenAI's form; `ids`: ids of replies.
- `kinds`: one request from its body to its reply; `answerer`: what it needs on its way.
- `chat` (with `chat_choice`), `completions`: a body to prompts, events to replies.
- `calls`: requests of the engine, seen from the event loop; `sampling`: fields to parameters.
- `logprobs`: how replies write them.
- `batch_lines`, `batch_results`: lines of a batch, their answers, and files that lose none.
- `media`, `fetch`: pictures and videos of messages, and from where they may come.
"""
