"""Cuts a stream of text at tags, whatever way the stream is chunked.

Knows tags as strings. Does not know what they mean.
"""


class TagScanner:
    """A buffer that gives text up to the next tag, and holds back what may be the start of one.

    Each character is looked at a bounded number of times: text is handed out as soon as it is safe.
    """

    def __init__(self) -> None:
        self.buffer = ""

    def until(self, *tags: str) -> tuple[str, str | None]:
        """Take (text before the first of the tags, that tag), both out of the buffer.

        Without a whole tag there: (text that no tag can begin in, None).
        """
        found = [(at, tag) for tag in tags if (at := self.buffer.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            return self.take(at, skip=len(tag)), tag
        return self.take(len(self.buffer) - held_back(self.buffer, *tags)), None

    def take(self, count: int, *, skip: int = 0) -> str:
        """Take the first `count` characters, and drop `skip` more behind them."""
        text, self.buffer = self.buffer[:count], self.buffer[count + skip :]
        return text


def held_back(text: str, *tags: str) -> int:
    """How many characters at the end of text are the start of a tag that is not there in full."""
    longest = max(map(len, tags)) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0
