"""Reading the project's Markdown: the documents, their sections, tables and lists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("config/**/*.md")),
    *sorted(DOCS.rglob("*.md")),
]


def read(name: str) -> str:
    """Return a document, by its path below the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    """Return the text without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[tuple[int, str]]:
    """Return the level and the text of each heading."""
    found = re.findall(r"^(#+) (.+)$", without_code(text), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def anchor(heading: str) -> str:
    """Return the fragment that names a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(text: str, level: int) -> dict[str, str]:
    """Return the text below each heading of a level, up to the next one of that level or above."""
    marks = "#" * level
    parts = re.split(rf"^{marks} (.+)$", text, flags=re.MULTILINE)[1:]
    return {
        title: re.split(rf"^#{{1,{level - 1}}} ", body, flags=re.MULTILINE)[0]
        if level > 1
        else body
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def rows(text: str, *header: str) -> list[list[str]]:
    """Return the rows of all tables with this header."""
    head = re.escape(f"| {' | '.join(header)} |")
    bodies = re.findall(rf"^{head}\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [
        [cell.strip() for cell in row.strip("|").split(" | ")]
        for row in "".join(bodies).splitlines()
    ]


def items(text: str) -> list[tuple[list[str], str]]:
    """Return the list items that begin with code: the code before the colon, and the rest.

    An item is written as "- `one`, `two`: text"; the text may begin on the next line.
    """
    found = re.findall(r"^- (`.*(?:\n  .+)*)", without_code(text), re.MULTILINE)
    joined = (" ".join(item.split()) for item in found)
    matches = (re.match(r"((?:`[^`]+`(?:, | and )?)+)[^`]*?: (.*)", item) for item in joined)
    return [(re.findall(r"`([^`]+)`", match[1]), match[2]) for match in matches if match]


def links(text: str) -> list[str]:
    """Return the targets of all links, outside code."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))
