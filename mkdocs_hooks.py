"""Hooks of the documentation's site."""

import re
from typing import Any

# Pages in docs/ may link to files beside docs/, which are there in the repository and not on the site.
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links out of the site become the path of the file."""
    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(r"\1 (`\2`)", markdown)
