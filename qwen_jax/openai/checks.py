"""JSON to a request, strictly: what is wrong with it is said in OpenAI's form.

Knows JSON and pydantic; knows no field of a request, and not where it came from.
"""

import json
from collections.abc import Collection
from typing import Any, TypeVar

import pydantic

from qwen_jax.openai.errors import ApiError, of_validation

Model = TypeVar("Model", bound=pydantic.BaseModel)


def parse_json(data: bytes | str, what: str = "the body", code: str = "invalid_json") -> Any:
    """Strict JSON: no NaN, UTF-8. Raises ApiError, about ``what``, with the code."""
    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, f"{what} is nested too deep", code=code) from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, numbers of 5,000 digits
        raise ApiError(400, f"{what} is not JSON: {error}", code=code) from None


def validate(kind: type[Model], body: Any, known: Collection[str]) -> Model:
    """A body as a model. Raises ApiError: what is wrong with it first, and where."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, got a {type(body).__name__}")
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        complaints = error.errors(include_url=False, include_context=False)
        if len(complaints[0]["loc"]) == 1:
            known = kind.model_fields  # a field of the body itself
        raise of_validation(complaints, body, known) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
