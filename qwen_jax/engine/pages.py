"""Which pages of the cache are whose, and which still hold text that may come again.

Knows page numbers, counts and keys; knows no token and no array. A page is in use by one or more
rows, or free. A free page keeps its key until somebody takes it for something else, so the free
ones with a key are a cache of prefixes; those least lately used are taken first.

    in use     0:2 1:1 4:1             page:users
    free       3 7 | 5 2 6             without a key, then with one: taken from the left

Where the cache lies in pieces on several devices (the rule of B), all pages of a row are of one
piece, and rows share pages only inside it.
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

    Args:
        num_pages: how many there are.
        pieces: equal parts of them, one behind the other; a row has pages of one part only.

    Attributes:
        num_pages: how many there are.
        cached: free pages that a prompt with the same beginning would find.
    """

    def __init__(self, num_pages: int, pieces: int = 1):
        if num_pages % pieces:
            raise ValueError(f"{num_pages} pages are not {pieces} equal pieces")
        self.num_pages = num_pages
        self.cached = 0
        self._users = [0] * num_pages
        size = num_pages // pieces
        self._free: list[collections.OrderedDict[int, None]] = [
            collections.OrderedDict.fromkeys(range(i * size, (i + 1) * size)) for i in range(pieces)
        ]
        self._keys: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}

    @property
    def used(self) -> int:
        """Pages in use."""
        return self.num_pages - sum(map(len, self._free))

    def claim(
        self, keys: Sequence[bytes], count: int, *, spare: int = 0
    ) -> tuple[list[int], int] | None:
        """``count`` pages for a row, of which those at the front with the first ``keys`` are found.

        Of several pieces the one is taken in which most are found, or else the emptiest.

        Args:
            keys: of the row's full pages, as many as may be shared; at most ``count``.
            count: pages.
            spare: how many must stay free besides, over all pieces.

        Returns:
            The pages, and how many were found; None, with nothing changed, if there are too few.
        """
        pieces = range(len(self._free))
        found = [self._find(keys, piece) for piece in pieces]
        spare = -(-spare // len(self._free))
        for piece in sorted(pieces, key=lambda i: (-len(found[i]), -len(self._free[i]))):
            free, shared = self._free[piece], found[piece]
            idle = sum(page in free for page in set(shared))
            if count - len(shared) + spare > len(free) - idle:
                continue
            self.cached -= idle
            for page in shared:
                free.pop(page, None)
                self._users[page] += 1
            return [*shared, *self._take(piece, count - len(shared))], len(shared)
        return None

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages for a new row; None, with nothing changed, if there are too few."""
        claimed = self.claim((), count)
        return claimed and claimed[0]

    def extend(self, wants: Sequence[tuple[int, int]]) -> list[list[int]] | None:
        """More pages for several rows; None, with nothing changed, if there are too few.

        wants: for each row one of its pages, and how many more.
        """
        counts = collections.Counter[int]()
        for page, count in wants:
            counts[self._piece(page)] += count
        if any(count > len(self._free[piece]) for piece, count in counts.items()):
            return None
        return [self._take(self._piece(page), count) for page, count in wants]

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
                free = self._free[self._piece(page)]
                free[page] = None
                free.move_to_end(page, last=page in self._keys)
                self.cached += page in self._keys

    def register(self, page: int, key: bytes) -> None:
        """Lets others find a full page in use; nothing if the same text is in another page."""
        if key not in self._pages and page not in self._keys:
            self._pages[key], self._keys[page] = page, key

    def forget(self, pages: Sequence[int]) -> None:
        """Lets nobody find these pages any more: their content is wrong."""
        for page in pages:
            free = self._free[self._piece(page)]
            if self._drop_key(page) and page in free:
                self.cached -= 1
                free.move_to_end(page, last=False)

    def grow(self, num_pages: int) -> None:
        """Makes room: pages up to ``num_pages``, which are taken before others are forgotten.

        Raises:
            ValueError: there are several pieces: their pages would change places.
        """
        if len(self._free) > 1:
            raise ValueError(f"a cache in {len(self._free)} pieces keeps its size")
        (free,) = self._free
        for page in reversed(range(self.num_pages, num_pages)):
            self._users.append(0)
            free[page] = None
            free.move_to_end(page, last=False)
        self.num_pages = num_pages

    def _piece(self, page: int) -> int:
        return page * len(self._free) // self.num_pages

    def _find(self, keys: Sequence[bytes], piece: int) -> list[int]:
        found: list[int] = []
        for key in keys:
            page = self._pages.get(key)
            if page is None or self._piece(page) != piece:
                break
            found.append(page)
        return found

    def _take(self, piece: int, count: int) -> list[int]:
        taken = []
        for _ in range(count):
            page, _ = self._free[piece].popitem(last=False)
            self.cached -= self._drop_key(page)
            self._users[page] += 1
            taken.append(page)
        return taken

    def _drop_key(self, page: int) -> bool:
        key = self._keys.pop(page, None)
        if key is not None:
            del self._pages[key]
        return key is not None
