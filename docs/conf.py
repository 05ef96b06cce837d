"""Sphinx settings: the Markdown of this folder as a site (sphinx-build -W docs site). The pages need no site to be read:
the table of contents is what index.md links to, in its order, and a page that it does not link to ends the build with a warning."""

import ast
import re
from pathlib import Path

DOCS = Path(__file__).parent

project = "gpmlp"
author = "the gpmlp authors"
copyright = "2026, the gpmlp authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "gpmlp"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
smartquotes = False  # f' is a derivative
myst_heading_anchors = 4
default_role = "literal"  # one backtick in a docstring
autodoc_typehints = "description"


def contents(page: str, text: str) -> str:
    """The pages that a page named index links to, as a hidden table of contents."""
    folder = (DOCS / page).parent
    linked = [link for link in re.findall(r"\]\(([\w./-]+)\.md\)", text) if DOCS in (folder / link).resolve().parents]
    return "\n```{toctree}\n:hidden:\n\n" + "\n".join(dict.fromkeys(linked)) + "\n```\n"


def outside(page: str, text: str) -> str:
    """Links to files that are not part of the site lead to a copy of the file."""

    def copied(link: re.Match) -> str:
        inside = DOCS in ((DOCS / page).parent / link[1]).resolve().parents
        return link[0] if inside else f"](path:{link[1]})"

    return re.sub(r"\]\((\.\./[^)#]+)\)", copied, text)


def scripts() -> str:
    """Each example under the question that it answers."""
    out = ""
    for file in sorted((DOCS.parent / "examples").glob("*.py")):
        question = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")[0]
        out += f"\n## {question}\n\n```{{literalinclude}} ../examples/{file.name}\n:caption: {file.name}\n```\n"
    return out


def prepare(app: object, page: str, source: list[str]) -> None:
    """Text of a page as Sphinx reads it."""
    added = scripts() if page == "examples" else contents(page, source[0]) if Path(page).name == "index" else ""
    source[0] = outside(page, source[0]) + added


def setup(app) -> None:
    app.connect("source-read", prepare)
