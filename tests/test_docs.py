"""The site that opens without a network, and the figure of the architecture."""
import re
from html.parser import HTMLParser

import pytest

from conftest import ROOT, needs_browser

from hms_brain.docs import build_docs, library, list_pages, relink


class Names(HTMLParser):
    "Attributes of a page that name something else."

    def __init__(self, page):
        super().__init__()
        self.loads, self.links, self.scripts = [], [], 0
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.scripts += tag in ("script", "iframe", "object", "embed")
        if tag == "a": self.links.append(at.get("href") or "")
        elif found := at.get("src") or at.get("href"): self.loads.append(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build_docs(tmp_path_factory.mktemp("site")).parent


def test_nothing_comes_from_elsewhere(site):
    "Pages load files of the site and nothing else; every link within the site leads somewhere."
    pages = sorted(site.rglob("*.html"))
    lost = []
    for page in pages:
        names = Names(page)
        assert names.scripts == 0 and not any(":" in name for name in names.loads), page.name
        inside = [n.split("#")[0] for n in names.links if not re.match(r"https?:|mailto:|#", n)]
        lost += [(page.name, n) for n in [*names.loads, *inside] if not (page.parent / n).is_file()]
    assert lost == [] and not re.search(r"@import|url\(", (site / "site.css").read_text())
    assert len(pages) == sum(map(len, list_pages(ROOT / "nbs").values()))


def test_every_notebook_is_in_the_menu_of_every_page(site):
    places = {page for pages in list_pages(ROOT / "nbs").values() for page in pages.values()}
    for page in ("index.html", "tutorials/add_a_model.html"): assert places <= {n.removeprefix("../") for n in Names(site / page).links}


@needs_browser
def test_no_page_is_wider_than_its_window(site, browser):
    with browser.new_page(viewport={"width": 1300, "height": 900}) as view:
        wide = {}
        for page in site.rglob("*.html"):
            view.goto(page.as_uri())
            if (width := view.evaluate("document.documentElement.scrollWidth")) > 1300: wide[page.name] = width
    assert wide == {}


def test_links_elsewhere_stay():
    for text in ('<a href="https://a.example/x.ipynb">', '<a href="unknown.ipynb">', '<img src="https://a.example/x.svg">'): assert relink(text, "../", {"x.ipynb": "x.html"}) == text


def test_the_figure_names_what_exists():
    "Each box is one of the six nouns, or modules of the package."
    figure = (ROOT / "nbs/architecture.svg").read_text()
    boxes = [w for text in re.findall(r'class="t">([^<]+)<', figure) for w in text.split(", ")]
    modules = {re.sub(r"^\d+_", "", name) for name in library()}
    there = modules | {m.split(".")[0] for m in modules}
    assert {w for w in boxes if w not in there} == {"File", "Recording", "Window", "Run", "Bundle", "Prediction", "Alert"}
    assert "http" not in figure.replace('xmlns="http://www.w3.org/2000/svg"', "")
