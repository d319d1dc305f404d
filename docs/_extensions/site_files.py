"""Beside the pages: descriptions for search engines and link previews, sitemap.xml, and 404.html at any address."""

from __future__ import annotations

import re
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from docutils import nodes
from sphinx.application import Sphinx

CARD = "_static/social-card.png"


def describe(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document | None) -> None:
    """Metadata of one page, by its first paragraph."""
    base = app.config.html_baseurl
    if page.startswith("api/torch_sagan."):  # generated from docstrings: no file in the repository to view or to edit
        context["theme_source_repository"] = ""
        context["has_source"] = False
    if page == "404":  # it is shown for any address, so its links start from the site's root
        context["metatags"] += f'<base href="{urlsplit(base).path}">\n'
        return
    if document is None:
        return
    paragraph = next(document.findall(nodes.paragraph), None)
    description = "" if paragraph is None else " ".join(paragraph.astext().split())[:200]
    properties = {
        "og:type": "website",
        "og:site_name": app.config.project,
        "og:title": unescape(re.sub("<.*?>", "", context["title"])),
        "og:description": description,
        "og:url": urljoin(base, f"{page}.html"),
        "og:image": urljoin(base, CARD),
        "twitter:card": "summary_large_image",
    }
    context["metatags"] += f'<meta name="description" content="{escape(description)}">\n'
    for name, content in properties.items():
        context["metatags"] += f'<meta property="{name}" content="{escape(content)}">\n'


def write_sitemap(app: Sphinx, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    pages = sorted(app.env.found_docs - {"404"})
    entries = "".join(f"<url><loc>{urljoin(app.config.html_baseurl, page)}.html</loc></url>\n" for page in pages)
    text = f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{entries}</urlset>\n'
    (Path(app.outdir) / "sitemap.xml").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", describe)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
