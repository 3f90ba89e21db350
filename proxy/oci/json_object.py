"""Decode JSON objects of registries as leniently as Go's decoder, which most clients use. Pure.

Field names match in any case, and a null leaves a field as it was. In documents of up to
`MAX_LENIENT_SIZE`, invalid UTF-8 and lone surrogates are replaced, and what follows the object is
ignored.
"""

import json
import re
from typing import Any

import msgspec

# Python's decoder takes ten times as long, and the event loop waits for it.
MAX_LENIENT_SIZE = 256 << 10

_WHITESPACE = " \t\r\n"
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    if len(content) > MAX_LENIENT_SIZE:
        raise ValueError("not JSON")
    text = content.decode(errors="replace").lstrip(_WHITESPACE)
    try:
        document, _ = _DECODER.raw_decode(text)
        # Once more, without lone surrogates, which cannot be encoded.
        return json.loads(_SURROGATE.sub("\ufffd", json.dumps(document, ensure_ascii=False)))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
