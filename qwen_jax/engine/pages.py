"""Which pages of the cache are whose, and which still hold text that may come again.

Knows page numbers, counts and keys; knows no token and no array. A page is in use by one or more
rows, or free. A free page keeps its key until somebody takes it for something else, so the free
ones with a key are a cache of prefixes; those least lately used are taken first.

    in use     0:2 1:1 4:1             page:users
    free       3 7 | 5 2 6             without a key, then with one: taken from the left
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np


def block_key(before: bytes, tokens: Sequence[int], seen: bytes = b"") -> bytes:
    """The key of a full page: of its tokens, and of everything in front of them.

    Args:
        before: the key of the page in front of it; empty for the first.
        tokens: of the page.
        seen: what else its content depends on: the pictures behind its placeholder tokens.
    """
    digest = hashlib.blake2b(before, digest_size=16)
    digest.update(np.asarray(tokens, np.int32).tobytes())
    digest.update(seen)
    return digest.digest()


class PagePool:
    """Hands pages out and takes them back.

    Attributes:
        num_pages: how many there are.
        cached: free pages that a prompt with the same beginning would find.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.cached = 0
        self._users = [0] * num_pages
        self._free: collections.OrderedDict[int, None] = collections.OrderedDict.fromkeys(
            range(num_pages)
        )
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.num_pages - len(self._free)

    def claim(
        self, keys: Sequence[bytes], count: int, *, spare: int = 0
    ) -> tuple[list[int], int] | None:
        """``count`` pages for a row, of which those at the front with the first ``keys`` are found.

        Args:
            keys: of the row's full pages, as many as may be shared; at most ``count``.
            count: pages.
            spare: how many must stay free besides.

        Returns:
            The pages, and how many were found; None, with nothing changed, if there are too few.
        """
        found: list[int] = []
        for key in keys:
            if key not in self._pages:
                break
            found.append(self._pages[key])
        idle = sum(page in self._free for page in set(found))
        if count - len(found) + spare > len(self._free) - idle:
            return None
        self.cached -= idle
        for page in found:
            self._free.pop(page, None)
            self._users[page] += 1
        return [*found, *self._take(count - len(found))], len(found)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` more pages; None, with nothing changed, if there are too few."""
        return self._take(count) if count <= len(self._free) else None

    def release(self, pages: Sequence[int]) -> None:
        """Ends one use of each page of a row; its last pages will be taken first.

        Raises:
            ValueError: a page is not in use.
        """
        for page in reversed(pages):
            if not self._users[page]:
                raise ValueError(f"page {page} is released, and nobody uses it")
            self._users[page] -= 1
            if not self._users[page]:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._keys)
                self.cached += page in self._keys

    def register(self, page: int, key: bytes) -> None:
        """Lets others find a full page in use; nothing if the same text is in another page."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def forget(self, pages: Sequence[int]) -> None:
        """Lets nobody find these pages any more: their content is wrong."""
        for page in pages:
            if self._drop_key(page) and page in self._free:
                self.cached -= 1
                self._free.move_to_end(page, last=False)

    def grow(self, num_pages: int) -> None:
        """Makes room: pages up to ``num_pages``, which are taken before others are forgotten."""
        for page in reversed(range(self.num_pages, num_pages)):
            self._users.append(0)
            self._free[page] = None
            self._free.move_to_end(page, last=False)
        self.num_pages = num_pages

    def _take(self, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self.cached -= self._drop_key(page)
            self._users[page] += 1
            taken.append(page)
        return taken

    def _drop_key(self, page: int) -> bool:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]
        return key is not None
