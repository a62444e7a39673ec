"""Ids of replies and stored things."""

import hashlib
import json
import uuid


def new_id(prefix: str) -> str:
    """An id that nobody guesses."""
    return f"{prefix}{uuid.uuid4().hex}"


def derived_id(prefix: str, *parts: str | int) -> str:
    """An id that is the same wherever the parts are the same."""
    return prefix + _digest(parts).hex()


def derived_seed(*parts: str | int) -> int:
    """A number of 63 bits that is the same wherever the parts are the same."""
    return int.from_bytes(_digest(parts)[:8], "big") >> 1


def _digest(parts: tuple[str | int, ...]) -> bytes:
    # JSON keeps the parts apart, and writes half a surrogate pair as an escape.
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()
