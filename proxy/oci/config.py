"""Image configurations: what an image runs, and which command made which layer (image-spec, config.md).

Read for showing only, so whatever is missing or odd is left out; nothing here raises on foreign content but
`parse_config` itself.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import msgspec

from proxy.errors import InvalidManifestError
from proxy.oci.manifest import Platform

# What the classic builder writes before a command that runs nothing, and before one that does.
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
    """What an image's configuration says. `commands` made its layers, in their order, as far as they are known."""

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
        """Yield a command for each of so many layers; "" for all if the history does not fit them."""
        fits = len(self.commands) == layer_count
        yield from self.commands if fits else repeat("", layer_count)


def parse_config(content: bytes) -> ImageConfig:
    """Return what a configuration says. Raises `InvalidManifestError` if it is none of an image."""
    try:
        document = msgspec.json.decode(content, type=_ConfigDocument)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidManifestError(f"not an image's configuration: {str(error)[:80]}") from error
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
    """Return a line of history as it stood in the Dockerfile, as far as that can be told."""
    if text.startswith(_NOP_PREFIX):
        return text.removeprefix(_NOP_PREFIX).strip()
    if text.startswith(_SHELL_PREFIX):
        return f"RUN {text.removeprefix(_SHELL_PREFIX).strip()}"
    return text.removesuffix("# buildkit").strip()
