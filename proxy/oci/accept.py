"""Content negotiation: which media types a client accepts (RFC 9110, section 12.5.1)."""

from collections.abc import Iterable

from proxy.oci.manifest import IMAGE_TYPES


def accepts(accept: Iterable[str], media_type: str) -> bool:
    """Tell whether a client that sent these `Accept` header lines accepts `media_type`.

    No header at all accepts everything, as do the wildcards that containerd and its relatives send.
    Quality values do not rank the types, as in distribution, but a quality of 0 excludes one. Types
    of artifacts are not negotiated: registries that have them send them to any client.
    """
    if media_type not in IMAGE_TYPES:
        return True
    lines = list(accept)
    if media_type in lines:
        return True
    wanted = {media_type, "application/*", "*/*"}
    for item in ",".join(lines).lower().split(","):
        name, _, parameters = item.partition(";")
        quality = parameters.strip().removeprefix("q=")
        if name.strip() in wanted and quality not in ("0", "0.0", "0.00", "0.000"):
            return True
    return not any(line.strip() for line in lines)
