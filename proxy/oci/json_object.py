"""Decode JSON objects of registries as leniently as Go's decoder, which most clients use. PURE.

Field names match in any case, a null leaves a field as it was, invalid UTF-8 is replaced, and what
follows the object is ignored.
"""

import json
from typing import Any

import msgspec

_WHITESPACE = " \t\r\n"


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


def decode_object(content: bytes) -> dict[str, Any]:
    """Return the fields of an object, by their names in lower case; `null` has no fields.

    Of names that differ only by case, the last one that is not null counts. Raises `ValueError`.
    """
    try:
        document = msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        document = _decode_first(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError("not an object")  # noqa: TRY004
    fields: dict[str, Any] = {}
    for name, value in document.items():
        if value is not None or name.lower() not in fields:
            fields[name.lower()] = value
    return fields


def _decode_first(content: bytes) -> Any:
    """Return the first value in the content, as Python's slower decoder reads it."""
    try:
        return _DECODER.raw_decode(content.decode(errors="replace").lstrip(_WHITESPACE))[0]
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
