"""What .mkdocs.yml asks for: links from docs/ into the rest of the checkout lead to pages that show those files.

A file becomes a page with its text, a folder one with a list of its files; a link to what is not there stays as it is,
and the strict build fails on it.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs"
# [text](target), [text](target#anchor); images and external addresses are left alone.
_LINK = re.compile(r"(?<!!)\]\((?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def _outside(page: str, target: str) -> str | None:
    """The checkout's path of a link that leaves docs/, or None."""
    path = normpath(PurePosixPath(DOCS, page).parent / target)
    return None if path.split("/")[0] == DOCS or not (ROOT / path).exists() else path


def _shown(path: str) -> str:
    """Where the site shows a file or folder of the checkout."""
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _content(path: str) -> str:
    if (ROOT / path).is_dir():
        inside = sorted(file for file in (ROOT / path).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        listed = "\n".join(f"- `{file.relative_to(ROOT / path)}`" for file in inside)
        return f"# {path}/\n\n{listed}\n"
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n~~~~~{language}\n{(ROOT / path).read_text()}\n~~~~~\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every path outside docs/ that a page links to."""
    linked = set()
    for file in files.documentation_pages():
        for target, _ in _LINK.findall(Path(str(file.abs_src_path)).read_text()):
            if path := _outside(file.src_uri, target):
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, _shown(path), content=_content(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links."""

    def turned(match: re.Match[str]) -> str:
        path = _outside(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        return f"]({relpath(_shown(path), PurePosixPath(page.file.src_uri).parent)})"

    return markdown if page.file.src_uri.startswith("source/") else _LINK.sub(turned, markdown)
