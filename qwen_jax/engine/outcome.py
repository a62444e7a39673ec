"""What new tokens do to a sequence: text, an end, and what structured output makes of them.

Knows steps that have landed, and one row at a time; knows no queue and no page.
"""

import dataclasses

from qwen_jax.engine.events import Delta
from qwen_jax.engine.row import Row
from qwen_jax.engine.runner import Flight
from qwen_jax.engine.token_logprobs import Entry, TokenLogprobs
from qwen_jax.generation_state import FAILED


@dataclasses.dataclass(frozen=True)
class Got:
    """What a step brought a row.

    Attributes:
        tokens: sampled ones.
        entries: their logprobs, where wanted.
        failed: in place of the token after them, why there is none; see `sampling.check_tokens`.
    """

    tokens: list[int]
    entries: list[Entry] | None
    failed: int | None


def got(flight: Flight, b: int, logprobs: TokenLogprobs) -> Got:
    """What a landed step brought row ``b`` of those that chose."""
    made, k = flight.made, flight.choosers[b].row.sequence.job.params.logprobs
    assert made is not None
    new, failed = made.tokens[b, : made.count[b]].tolist(), None
    if made.finish[b] == FAILED and new:
        failed = new.pop()
    if k is None:
        return Got(new, None, failed)
    assert made.logprobs is not None
    entries = [logprobs.entry(made.logprobs, (b, i), token, k) for i, token in enumerate(new)]
    return Got(new, entries, failed)


def add_prompt_logprobs(flight: Flight, logprobs: TokenLogprobs) -> None:
    """Hands the logprobs of prompt tokens that a landed step brought to their rows."""
    if flight.after is None:
        return
    assert flight.prompt is not None
    start = 0
    for part in flight.step.parts:
        row, k = part.row, part.row.sequence.job.params.prompt_logprobs
        if part.known and row.wants_prompt_logprobs:
            assert row.prompt_logprobs is not None
            assert k is not None
            for t in range(start, start + part.take):
                token = int(flight.after[t])
                if token >= 0:
                    row.prompt_logprobs.append(logprobs.entry(flight.prompt, t, token, k))
        start += part.take


def advance(row: Row, new: list[int], entries: list[Entry] | None) -> Delta | None:
    """Gives a row its new tokens, and those that its constraint forces after them.

    Args:
        row: which has not ended.
        new: sampled tokens, none for one that has just come.
        entries: their logprobs, where wanted.

    Returns:
        What its owner is told; None where there is nothing to tell.
    """
    sequence = row.sequence
    before = len(sequence.token_ids)
    text = _push(row, new, entries)
    constraint = row.constraint
    if constraint is not None and not row.done:
        if new:
            constraint.accept(new)
        text += _push_forced(row)
        if constraint.finished and not row.done:
            text += sequence.end("stop")
    token_ids = sequence.token_ids[before:]
    if not token_ids and not text and not row.done:
        return None
    return Delta(
        index=sequence.index,
        text=text,
        token_ids=token_ids,
        logprobs=None if sequence.logprobs is None else sequence.logprobs[before:],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _push(row: Row, new: list[int], entries: list[Entry] | None) -> str:
    before = len(row.sequence.token_ids)
    text = row.sequence.push(new, entries)
    row.tokens += row.sequence.token_ids[before:]
    return text


def _push_forced(row: Row) -> str:
    """Appends forced tokens; the device has not seen them, so they go in from the host.

    Where logprobs are wanted every token is sampled, under a mask that leaves it no choice.
    """
    text, constraint = "", row.constraint
    assert constraint is not None
    while row.sequence.logprobs is None and not row.done and not constraint.finished:
        forced = constraint.forced()
        if not forced:
            break
        text += _push(row, forced, None)
        row.on_device = False
        if not row.done:
            constraint.accept(forced)
    return text
