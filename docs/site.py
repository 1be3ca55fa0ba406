"""What `mkdocs build` adds to the pages of docs/: the other files of the repository that they link to.

A page links relative to its own place in the repository, so that the links work on GitHub. The site has docs/ as its
root. A linked file outside docs/ keeps its path below that root, and the links are rewritten to match. A linked folder
becomes a page that lists its files. Docstrings use Sphinx's roles, which Markdown does not have: they become links.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`\.?([\w.]+)`")
NAVIGATED = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "experiments/published/report.md"]


def _linked(page: str, text: str) -> set[str]:
    """The files and folders, as paths in the repository, that a page of the repository links to."""
    paths = (posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link, _ in LINK.findall(text))
    return {path for path in paths if (ROOT / path).exists()}


def _place(path: str) -> str:
    """Where a file or folder of the repository is below the root of the site."""
    return posixpath.join(path, "index.md") if (ROOT / path).is_dir() else path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what the pages link to, and what the added pages link to in turn."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting, added = [*NAVIGATED], set(pages)
    for page in pages:
        waiting += _linked(page, (ROOT / page).read_text())
    while waiting:
        path = waiting.pop()
        if path in added:
            continue
        added.add(path)
        options: dict[str, Any] = {"abs_src_path": str(ROOT / path)}
        if (ROOT / path).is_dir():
            inside = sorted(f for f in (ROOT / path).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
            names = [file.relative_to(ROOT / path).as_posix() for file in inside]
            options = {"content": f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)}
            waiting += [posixpath.join(path, name) for name in names]
        elif path.endswith(".md"):
            waiting += _linked(path, (ROOT / path).read_text())
        files.append(File.generated(config, _place(path), inclusion=InclusionLevel.NOT_IN_NAV, **options))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links from places in the repository to places in the site."""
    uri, source = page.file.src_uri, page.file.abs_src_path
    folder = posixpath.dirname(f"docs/{uri}" if source and source.startswith(config.docs_dir + "/") else uri)
    if uri.startswith(("benchmarks/", "log/20")):
        page.meta["search"] = {"boost": 0.1}  # long tables and old entries come last in the results of a search

    def rewritten(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():
            return match[0]  # mkdocs reports it
        return f"]({posixpath.relpath(_place(path), posixpath.dirname(uri) or '.')}{match[2] or ''})"

    return LINK.sub(rewritten, markdown)


class Roles(griffe.Extension):
    """Turns the roles of Sphinx in docstrings into links, or into plain code where the site has no such name."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        def link(match: re.Match) -> str:
            name = match[1]
            try:
                target = obj.resolve(name)
            except griffe.NameResolutionError:
                target = name
            return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'

        if obj.docstring:
            obj.docstring.value = ROLE.sub(link, obj.docstring.value)
