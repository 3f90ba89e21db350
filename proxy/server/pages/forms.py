"""Forms as browsers send them: small fields in memory, and at most one file as a stream."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.web import BaseRequest

from proxy.errors import InvalidRequestError
from proxy.server.admin.api import MAX_DOCUMENT_SIZE

# Fields of one form.
MAX_FORM_FIELDS = 1000

_CHUNK_SIZE = 1 << 18
# What aiohttp and the standard library raise for malformed bodies.
_MALFORMED = (ValueError, LookupError, RuntimeError, BadHttpMessage, web.RequestPayloadError)


@dataclass(slots=True)
class Form:
    """The fields of a form, and the file that follows them, if it is taken as a stream."""

    values: dict[str, list[str]] = field(default_factory=dict)
    upload: AsyncIterator[bytes] | None = None
    _size: int = 0

    @property
    def last_values(self) -> Mapping[str, str]:
        """The last value of each field."""
        return {name: values[-1] for name, values in self.values.items()}

    def add(self, name: str, value: str) -> None:
        """Add a field. Raises `InvalidRequestError` if there are too many."""
        self.values.setdefault(name, []).append(value)
        if sum(map(len, self.values.values())) > MAX_FORM_FIELDS:
            raise InvalidRequestError(f"the form has more than {MAX_FORM_FIELDS} fields")

    def reserve(self, size: int) -> None:
        """Count bytes of the form. Raises `InvalidRequestError` if they are too many."""
        self._size += size
        if self._size > MAX_DOCUMENT_SIZE:
            raise InvalidRequestError(
                f"the form has more than {MAX_DOCUMENT_SIZE} bytes; for a long list, use the command line"
            )


async def read_form(request: BaseRequest, *, takes_upload: bool) -> Form:
    """Return the form in the body of a request.

    The text of a file is the value of its field, unless the action `takes_upload`: then fields after the
    file are not read. Raises `InvalidRequestError`.
    """
    form = Form()
    is_multipart = request.content_type == "multipart/form-data"
    if not is_multipart and request.content_type != "application/x-www-form-urlencoded":
        raise InvalidRequestError("a change must be the POST of a form")
    try:
        if is_multipart:
            reader = MultipartReader(request.headers, request.content)
            await _read_parts(form, reader, takes_upload=takes_upload)
        else:
            await _read_pairs(form, request)
    except _MALFORMED as error:
        reason = str(error).replace("\n", " ")[:80]
        raise InvalidRequestError(f"the form cannot be read: {reason}") from error
    return form


async def _read_pairs(form: Form, request: BaseRequest) -> None:
    content = bytearray()
    async for chunk in request.content.iter_any():
        form.reserve(len(chunk))
        content += chunk
    for name, value in parse_qsl(
        content.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS
    ):
        form.add(name, value)


async def _read_parts(form: Form, reader: MultipartReader, *, takes_upload: bool) -> None:
    while (part := await reader.next()) is not None:
        if not isinstance(part, BodyPartReader):
            raise InvalidRequestError("the form has a part in parts")
        if takes_upload and part.filename is not None:
            form.upload = _iter_part(part)
            return
        content = bytearray()
        while chunk := await part.read_chunk(_CHUNK_SIZE):
            form.reserve(len(chunk))
            content += chunk
        form.add(part.name or "", content.decode(errors="replace"))


async def _iter_part(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(_CHUNK_SIZE):
        yield bytes(chunk)
