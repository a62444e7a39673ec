"""What is known of a `ragged_dot` before any row exists: the facts a choice depends on."""

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class Facts:
    """One product, as one device sees it.

    Attributes:
        experts: E, how many experts the device holds.
        inner: D, the contracted width.
        outer: F, the width of the result.
        activation: None or "swiglu", as for the operation.
        x_dtype, out_dtype: of the rows in and out.
        w_dtype: of the weights' values.
        scale_dtype: of their scales; None: there are none.
        blocks: elements per scale along each axis of w; None: there are none.
    """

    experts: int
    inner: int
    outer: int
    activation: str | None
    x_dtype: str
    w_dtype: str
    out_dtype: str
    scale_dtype: str | None = None
    blocks: tuple[int, ...] | None = None

    @classmethod
    def of(cls, x, w, scale, blocks, activation, out_dtype) -> "Facts":
        """The facts of arrays, or of shapes and dtypes, that the operation was given."""
        return cls(
            experts=w.shape[0],
            inner=w.shape[-2],
            outer=w.shape[-1],
            activation=activation,
            x_dtype=x.dtype.name,
            w_dtype=w.dtype.name,
            out_dtype=jax.numpy.dtype(out_dtype).name,
            scale_dtype=None if scale is None else scale.dtype.name,
            blocks=blocks,
        )

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Shape of w."""
        pair = (2,) if self.activation else ()
        return (self.experts, *pair, self.inner, self.outer)

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the scale: one entry per block, the last one of an axis maybe partial."""
        if self.blocks is None:
            return None
        return tuple(math.ceil(n / b) for n, b in zip(self.w_shape, self.blocks, strict=True))
