"""What MkDocs does not do itself: pages that lie outside ``docs/``, and links to them.

Links in the repository are those of its files, so that they work where the files are read. Here
they become links between the pages of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Pages of the site that are files of the repository outside ``docs/``.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "LICENSE": "LICENSE.txt",
    "examples/README.md": "examples.md",
}
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside ``docs/``."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "examples/README.md":
            text += "".join(_example(path) for path in sorted((ROOT / "examples").glob("*.*")))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from file to file become links from page to page."""
    here = page.file.src_uri
    source = next((name for name, made in PAGES.items() if made == here), f"docs/{here}")

    def rewrite(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        target, anchor = PAGES.get(path, path.removeprefix("docs/")), found[3] or ""
        if path.startswith("examples/") and path not in PAGES:
            target, anchor = "examples.md", f"#{path.removeprefix('examples/').replace('.', '')}"
        return f"{found[1]}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor}"

    return LINK.sub(rewrite, markdown)


def _example(path: Path) -> str:
    """A file's text under its name; none of the page that lists them."""
    if path.suffix not in LANGUAGES:
        return ""
    code = path.read_text(encoding="utf-8")
    return f"\n## {path.name}\n\n```{LANGUAGES[path.suffix]}\n{code}```\n"
