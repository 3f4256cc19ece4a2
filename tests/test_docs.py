"""The site and its pages are true: it builds, nothing in it is dead or remote, and every block of code runs."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = "https://site.invalid/deepeq/"
SECONDS = 120
# The code of these pages is only compiled, for the reason given.
NOT_RUN = {
    "docs/command-line.md": "opens a model that the reader has exported",
    "docs/data.md": "reads WikiText-103",
}
PACKAGES = ["deepeq", "deepeq.nn", "deepeq.models", "deepeq.data", "deepeq.train"]


class Page(HTMLParser):
    """What the tests ask of a page: its links, anchors, images, assets and headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "__skip"}
        self.assets: list[str] = []
        self.images: list[str] = []
        self.headings = 0
        self.formulas = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.headings += tag == "h1"
        self.formulas += tag == "math"
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values["src"])
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.assets.append(values["src"])
        if tag == "link" and {"stylesheet", "icon", "preload", "preconnect", "modulepreload"} & {
            *values["rel"].split()
        }:
            self.assets.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages of the built site by their address below its root."""
    pytest.importorskip("zensical", reason="the extra docs is not installed, so the site is not built")
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "src", "site_theme", "CHANGELOG.md", "mkdocs.yml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    built = folder / "site"
    pages = {path.relative_to(built).as_posix(): Page(path.read_text("utf-8")) for path in built.rglob("*.html")}
    files = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    return pages | {name: Page("") for name in files - pages.keys()}


def html(site: dict[str, Page]) -> Iterator[tuple[str, Page]]:
    # The page for a wrong address has absolute links, which only the published site can follow.
    return ((name, page) for name, page in site.items() if name.endswith(".html") and name != "404.html")


def dead(name: str, target: str, site: dict[str, Page]) -> bool:
    """Whether a link of a page leads nowhere within the site."""
    address = urlsplit(urljoin(SITE + name, target))
    if not address.geturl().startswith(SITE):
        return address.scheme not in ("http", "https", "mailto") or address.netloc == urlsplit(SITE).netloc
    path = unquote(address.path).removeprefix(urlsplit(SITE).path)
    page = site.get(path + "index.html" if path.endswith("/") or not path else path)
    return page is None or unquote(address.fragment) not in page.anchors


def test_no_link_anchor_or_image_is_dead(site: dict[str, Page]) -> None:
    checked = [(name, target) for name, page in html(site) for target in page.links + page.images + page.assets]
    assert len(checked) > 1000
    assert [f"{name}: {target}" for name, target in checked if dead(name, target, site)] == []


def test_dead_links_are_seen(site: dict[str, Page]) -> None:
    assert dead("install/index.html", "../nowhere/", site)
    assert dead("install/index.html", "../api/#nothing", site)
    assert dead("install/index.html", "../../outside/", site)
    assert not dead("install/index.html", "../api/#deepeq.DEQ", site)


def test_pages_have_one_heading_each_and_load_nothing_from_elsewhere(site: dict[str, Page]) -> None:
    assert {name: page.headings for name, page in html(site) if page.headings != 1} == {}
    remote = [(name, asset) for name, page in html(site) for asset in page.assets if urlsplit(asset).netloc]
    assert remote == []


def test_every_page_is_in_the_navigation(site: dict[str, Page]) -> None:
    linked = {urljoin(SITE, target).removeprefix(SITE).partition("#")[0] for target in site["index.html"].links}
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() + "/" for path in DOCS.rglob("*.md")} - {"index/"}
    assert pages - linked == set()


def test_formulas_are_drawn_when_the_site_is_built(site: dict[str, Page]) -> None:
    assert site["index.html"].formulas >= 1
    assert site["solvers/index.html"].formulas >= 1


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry_with_its_members(package: str, site: dict[str, Page]) -> None:
    entries = set().union(*(page.anchors for name, page in html(site) if name.startswith("api/")))
    assert {name for name in importlib.import_module(package).__all__ if f"{package}.{name}" not in entries} == set()
    if package == "deepeq":
        wanted = {"Result.CONVERGED", "Solution.num_evals", "Equilibrium.solver", "Broyden.history_size"}
        assert {name for name in wanted if f"deepeq.{name}" not in entries} == set()


def blocks(page: str) -> str:
    """Return the Python code of a page, each line where it is in the page."""
    lines, inside = [], False
    for line in (ROOT / page).read_text("utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


PAGES = [path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page).strip() and page not in NOT_RUN])
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    try:
        exec(compile(blocks(page), page, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(state)


@pytest.mark.parametrize("page", NOT_RUN)
def test_code_of_a_page_that_is_not_run_compiles(page: str) -> None:
    assert blocks(page).strip()
    compile(blocks(page), page, "exec")


def test_fences_name_a_language_that_the_tests_know() -> None:
    known = {"", "bash", "json", "python", "py", "text", "yaml"}
    for page in PAGES:
        opened = re.findall(
            r"^```(\w*)[^\n]*\n.*?^```", (ROOT / page).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
        )
        assert set(opened) <= known, page
