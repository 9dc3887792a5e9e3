"""Hooks of the documentation's site."""

import re
from typing import Any

# Pages in docs/ may link to files beside docs/, which are there in the repository and not on the site.
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links out of the site become the path of the file."""
    return markdown if "/" in page.file.src_uri else OUTSIDE.sub(r"\1 (`\2`)", markdown)


# The plugin for sites on a disk loads a script from another host; docs/worker.js takes its place.
REMOTE = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The script of this site, by its place from the page."""
    return output.replace(REMOTE, "../" * page.file.dest_uri.count("/") + "worker.js")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages outside of the documents, such as 404.html."""
    return output_content.replace(REMOTE, "worker.js")
