"""Which pages a row of a fixed batch owns. Knows counts only; knows no array of the cache."""

import numpy as np


class PageTable:
    """Pages of each row, handed out as rows grow.

    Attributes:
        table: int32 [rows, width].
        used: how many pages are handed out.
    """

    def __init__(self, rows: int, width: int, page_size: int):
        self.table = np.zeros((rows, width), np.int32)
        self.used = 0
        self._page_size = page_size
        self._owned = [0] * rows

    def reserve(self, row: int, length: int) -> None:
        """Gives ``row`` the pages for ``length`` positions."""
        need = -(-length // self._page_size)
        more = max(need - self._owned[row], 0)
        self.table[row, need - more : need] = np.arange(self.used, self.used + more)
        self._owned[row] += more
        self.used += more
