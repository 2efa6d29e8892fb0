"""What every page must be: well nested, self-contained, its links leading somewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "line", "circle", "rect", "path"}


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, links, texts and attributes."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing open"

    def handle_data(self, data: str) -> None:
        self.text += data

    def get(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def check(markup: str) -> Page:
    page = Page(markup)
    assert len(page.ids) == len(set(page.ids))
    for link in page.get("href"):
        assert link.startswith("#") and link[1:] in page.ids
    assert not page.get("src") and "link" not in page.tags and "img" not in page.tags
    assert page.tags.count("script") == 1 and not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", markup)
    # The figures hold no number that a drawing cannot.
    geometry = {"d", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height", "viewbox"}
    assert not [value for name, value in page.attributes if name in geometry and re.search("nan|inf", value)]
    return page
