"""What the site needs beyond Markdown: pages from the root, and links to files outside docs/.

The pages are read on GitHub, too, so their links are those that work there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./-]+)((?:#[\w-]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages whose sources lie in the root."""
    root = Path(config.config_file_path).parent
    for source, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(root / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Turns links on GitHub into links of the site.

    A module leads to its API page; other files that are no pages, of tests for example, become text.
    Links to files that do not exist stay, for `mkdocs build --strict` to refuse.
    """
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]  # front matter would show on GitHub
    root = Path(config.config_file_path).parent
    here = f"docs/{page.file.src_uri}"
    written = {f"docs/{page}": source for source, page in FROM_ROOT.items()}.get(here, here)

    def on_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(
            posixpath.join(posixpath.dirname(written), target)
        )  # from the root
        if not (root / path).exists():
            return link[0]
        path = f"docs/{FROM_ROOT[path]}" if path in FROM_ROOT else path
        if path.startswith("docs/"):
            return f"[{text}]({posixpath.relpath(path, posixpath.dirname(here))}{anchor})"
        if path.startswith("sfp/"):
            return f"[{text}][{path.removesuffix('.py').replace('/', '.')}]"
        return text

    return LINK.sub(on_site, markdown)
