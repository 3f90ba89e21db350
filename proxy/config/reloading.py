"""What a reload can take over, and what only a restart can."""

from typing import Any

from msgspec.structs import replace

from proxy.config.schema import Config

# What is bound, opened or begun once, by section.
FIXED = {
    "server": ("listen", "admin_listen", "admin_token_file", "tracing"),
    "log": ("format",),
    "store": ("path",),
}


def carry_over(old: Config, new: Config) -> tuple[Config, list[str]]:
    """Return `new`, with what is fixed as it is in `old`; and the paths of the keys in which they differ there."""
    sections: dict[str, Any] = {}
    differing = []
    for name, keys in FIXED.items():
        before, after = getattr(old, name), getattr(new, name)
        kept = {key: getattr(before, key) for key in keys}
        differing += [f"{name}.{key}" for key in keys if getattr(after, key) != kept[key]]
        sections[name] = replace(after, **kept)
    return replace(new, **sections), differing
