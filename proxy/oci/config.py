"""Image configurations: an image's command and its layers' history (image-spec, config.md).

They are parsed for display only, so missing fields are left empty.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import msgspec

from proxy.errors import InvalidManifestError
from proxy.oci.platform import Platform

# Prefixes that docker's classic builder puts before an instruction and before a RUN command.
_NOP_PREFIX = "/bin/sh -c #(nop) "
_SHELL_PREFIX = "/bin/sh -c "


class _HistoryEntry(msgspec.Struct):
    created_by: str | None = None
    empty_layer: bool = False


class _ExecutionConfig(msgspec.Struct, rename="pascal"):
    user: str | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    labels: dict[str, str] | None = None
    exposed_ports: dict[str, Any] | None = None
    working_dir: str | None = None


class _ConfigDocument(msgspec.Struct):
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None
    created: str | None = None
    config: _ExecutionConfig | None = None
    history: list[_HistoryEntry] | None = None


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of an image. `commands` created its layers, in order, as far as known."""

    platform: Platform | None
    created: str
    user: str
    env: Sequence[str]
    entrypoint: Sequence[str]
    cmd: Sequence[str]
    workdir: str
    labels: dict[str, str]
    ports: Sequence[str]
    commands: Sequence[str]

    def commands_for_layers(self, layer_count: int) -> Iterator[str]:
        """Yield the command of each layer; "" for all if their number does not match."""
        has_all = len(self.commands) == layer_count
        yield from self.commands if has_all else repeat("", layer_count)


def parse_config(content: bytes) -> ImageConfig:
    """Parse an image configuration, or raise `InvalidManifestError`."""
    try:
        document = msgspec.json.decode(content, type=_ConfigDocument)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidManifestError(f"not an image configuration: {str(error)[:80]}") from error
    run = document.config or _ExecutionConfig()
    platform = None
    if document.os and document.architecture:
        platform = Platform(document.os, document.architecture, document.variant or "")
    return ImageConfig(
        platform=platform,
        created=document.created or "",
        user=run.user or "",
        env=run.env or (),
        entrypoint=run.entrypoint or (),
        cmd=run.cmd or (),
        workdir=run.working_dir or "",
        labels=run.labels or {},
        ports=sorted(run.exposed_ports or ()),
        commands=[
            _dockerfile_command(step.created_by or "")
            for step in document.history or ()
            if not step.empty_layer
        ],
    )


def _dockerfile_command(text: str) -> str:
    """Return a line of the history as it was in the Dockerfile, as far as possible."""
    if text.startswith(_NOP_PREFIX):
        return text.removeprefix(_NOP_PREFIX).strip()
    if text.startswith(_SHELL_PREFIX):
        return f"RUN {text.removeprefix(_SHELL_PREFIX).strip()}"
    return text.removesuffix("# buildkit").strip()
