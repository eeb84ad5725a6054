"""mkdocs' hook: links of a page to files outside docs/ become the file's name, as the site has no such page.

`python -m bench.docs` checks that they lead somewhere in a checkout; here they would be dead.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

# text in brackets, target without a scheme; blocks and spans of code are matched first, and left as they are
LINK = re.compile(
    r"(^```.*?^```|`[^`\n]*`(?!\]))|(?<!!)\[([^\]\n]*)\]\((?![a-z]+:)([^)\s#]+)(#[^)\s]*)?\)", re.S | re.M
)


def inside(markdown: str, page: str) -> str:
    """The page's text with links out of docs/ replaced by `path from the root`. page: its path in docs/."""

    def plain(match: re.Match[str]) -> str:
        code, text, target = match[1], match[2], match[3]
        if code is not None:
            return code
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith("docs/"):
            return match[0]
        words = text.strip("`")
        return f"`{path}`" if path.endswith(words) else f"{text} (`{path}`)"

    return LINK.sub(plain, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return inside(markdown, page.file.src_uri)
