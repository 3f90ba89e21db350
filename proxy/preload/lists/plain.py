"""Plain lists: an image a line, optionally with its platforms, and `#` comments. Pure.

The image lists of k3s, RKE2 and hauler have this format, and so has `kubeadm config images list`.
"""

import re
from collections.abc import Sequence

from proxy.preload.lists.result import ParseResult

_COMMENT = re.compile(r"(?:^|\s)#.*")
_PLATFORM_OPTION = re.compile(r"(?:--)?platforms?(?:=(.*))?")


def read_plain(lines: Sequence[str], result: ParseResult) -> None:
    """Read lines such as `nginx:1.27 platform=linux/amd64,linux/arm64  # comment`."""
    result.add_format("plain list")
    for number, line in enumerate(lines, 1):
        words = iter(_COMMENT.sub("", line).split())
        references: list[str] = []
        platforms: list[str] = []
        for word in words:
            if option := _PLATFORM_OPTION.fullmatch(word):
                platforms += (option[1] or next(words, "")).split(",")
            else:
                references.append(word)
        if len(references) == 1:
            result.add_image(number, references[0], platforms)
        elif references or platforms:
            result.add_problem(
                number, f"{line.strip()[:60]!r} is not one image: put each image on its own line"
            )
