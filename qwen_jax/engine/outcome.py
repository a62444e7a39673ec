"""What new tokens do to a sequence: text, an end, and what structured output makes of them.

Knows one row; knows no device and no other row.
"""

from qwen_jax.engine.events import Delta
from qwen_jax.engine.row import Row
from qwen_jax.engine.token_logprobs import Entry


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
