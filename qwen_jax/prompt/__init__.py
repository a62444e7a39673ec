"""Text and pictures in, text out: everything on the host side of the model."""
