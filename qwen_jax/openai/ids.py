"""Ids of replies and stored things."""

import uuid


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}{uuid.uuid4().hex}"
