"""Which query tokens are taken together: the rows of a batch cut into tiles.

Knows where rows start and how long their contexts are; knows no page, head or kernel. Pure
functions of two small arrays, so that XLA computes them once for all layers of a step.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Tiles:
    """int32 [tiles] each: the row, its first flat token, how many, and that token's position."""

    row: jax.Array
    token: jax.Array
    tokens: jax.Array
    position: jax.Array

    def parts(self, block: int, least: int, wanted: int) -> "Parts":
        """Cuts every tile's context (the positions up to its last token) into parts of equal size.

        Args:
            block: key positions; parts are whole blocks long, but for a tile's last one.
            least: blocks of a part at least.
            wanted: about how many parts there should be; a static bound is the number of tiles
                plus this.
        """
        length = jnp.where(self.tokens > 0, self.position + self.tokens, 0)
        blocks = -(-length // block)
        size = jnp.maximum(least, -(-jnp.sum(blocks) // wanted))
        count = -(-blocks // size)
        last = jnp.cumsum(count)
        part = jnp.arange(length.shape[0] + wanted, dtype=jnp.int32)
        tile = jnp.sum(part[:, None] >= last, axis=1, dtype=jnp.int32)
        tile = jnp.minimum(tile, length.shape[0] - 1)
        begin = (part - (last - count)[tile]) * size * block
        end = jnp.minimum(begin + size * block, length[tile])
        used = part < last[-1]
        return Parts(tile, jnp.where(used, begin, 0), jnp.where(used, end, 0), last - count, count)


@struct.dataclass
class Parts:
    """Contexts of tiles cut into parts, so that long ones are shared by several blocks of threads.

    Attributes:
        tile: int32 [parts], whose.
        begin, end: int32 [parts], its key positions; both 0 behind the last part.
        first, count: int32 [tiles]: a tile's parts are ``first:first + count``.
    """

    tile: jax.Array
    begin: jax.Array
    end: jax.Array
    first: jax.Array
    count: jax.Array


@struct.dataclass
class Touched:
    """Pages that get new tokens: int32 [B] ``base``, and int32 [pages] each of the rest.

    Attributes:
        base: page ``index`` of row b is number ``base[b] + index``.
        row, index: whose page, and which of its context.
        token: the flat token of the page's first position, where that position is new.
        low, high: the positions in the page that are new.
    """

    base: jax.Array
    row: jax.Array
    index: jax.Array
    token: jax.Array
    low: jax.Array
    high: jax.Array


@struct.dataclass
class Rows:
    """Where each row's tokens stand in the batch and in its context."""

    start: jax.Array
    kv_lens: jax.Array

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], new tokens of each row."""
        return self.start[1:] - self.start[:-1]

    def single(self, T: int) -> Tiles:
        """One tile for each of T flat tokens; padding behind the last row has ``tokens`` 0."""
        token = jnp.arange(T, dtype=jnp.int32)
        row = jnp.sum(token[:, None] >= self.start[1:], axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, self.kv_lens.shape[0] - 1)
        tokens = (token < self.start[-1]).astype(jnp.int32)
        return Tiles(row, token, tokens, (self.kv_lens - self.start[1:])[row] + token)

    def tiles(self, wanted: jax.Array, height: int, most: int) -> tuple[jax.Array, Tiles]:
        """Cuts the rows chosen by ``wanted`` [B] into tiles of up to ``height`` tokens.

        Returns:
            The number of tiles, and `Tiles` of the static size ``most`` (a bound on the number).
        """
        lengths = jnp.where(wanted, self.lengths, 0)
        tiles_B = -(-lengths // height)
        last_B = jnp.cumsum(tiles_B)
        tile = jnp.arange(most, dtype=jnp.int32)
        row = jnp.sum(tile[:, None] >= last_B, axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, lengths.shape[0] - 1)
        offset = (tile - (last_B - tiles_B)[row]) * height
        tokens = jnp.where(tile < last_B[-1], jnp.clip(lengths[row] - offset, 0, height), 0)
        position = (self.kv_lens - self.lengths)[row] + offset
        return last_B[-1], Tiles(row, self.start[row] + offset, tokens, position)

    def one_token(self, T: int) -> tuple[jax.Array, Tiles]:
        """The rows that bring one token, as tiles of height 1; all of them where T <= B."""
        B = self.kv_lens.shape[0]
        if T <= B:
            return jnp.minimum(self.start[-1], T), self.single(T)
        return self.tiles(self.lengths == 1, 1, min(T, B))

    def touched(self, T: int, page_size: int) -> "Touched":
        """The pages that the new tokens are written to, row by row."""
        cached = self.kv_lens - self.lengths
        first = cached // page_size
        pages = jnp.where(self.lengths > 0, -(-self.kv_lens // page_size) - first, 0)
        B = self.kv_lens.shape[0]
        # A row of n tokens touches at most (n + 2 (page_size - 1)) / page_size pages.
        most = T if T <= B else T // page_size + 2 * min(B, T)
        last = jnp.cumsum(pages)
        run = jnp.arange(most, dtype=jnp.int32)
        row = jnp.sum(run[:, None] >= last, axis=1, dtype=jnp.int32)
        row = jnp.minimum(row, B - 1)
        base = last - pages - first
        index = run - base[row]
        token = self.start[row] + index * page_size - cached[row]
        low = jnp.maximum(cached[row] - index * page_size, 0)
        high = jnp.minimum(self.kv_lens[row] - index * page_size, page_size)
        return Touched(base, row, index, token, low, jnp.where(run < last[-1], high, 0))

    def longer(self, T: int, height: int) -> tuple[jax.Array, Tiles]:
        """The rows that bring more than one token, as tiles of up to ``height`` tokens."""
        B = self.kv_lens.shape[0]
        return self.tiles(self.lengths > 1, height, T // height + min(B, T // 2))
