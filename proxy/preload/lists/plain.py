"""A plain list: an image a line, `#` comments, and perhaps its platforms. PURE.

So are k3s's, RKE2's and hauler's image lists, and what `kubeadm config images list` prints.
"""

import re
from collections.abc import Sequence

from proxy.preload.lists.result import Found

_COMMENT = re.compile(r"(?:^|\s)#.*")
_PLATFORM = re.compile(r"(?:--)?platforms?(?:=(.*))?")


def read_plain(lines: Sequence[str], found: Found) -> None:
    """Read `nginx:1.27 platform=linux/amd64,linux/arm64  # comment`, line by line."""
    found.format("plain list")
    for number, line in enumerate(lines, 1):
        words = iter(_COMMENT.sub("", line).split())
        references: list[str] = []
        platforms: list[str] = []
        for word in words:
            if option := _PLATFORM.fullmatch(word):
                platforms += (option[1] or next(words, "")).split(",")
            else:
                references.append(word)
        if len(references) == 1:
            found.image(number, references[0], platforms)
        elif references or platforms:
            found.problem(number, f"{line.strip()[:60]!r} is not one image: put one on each line")
