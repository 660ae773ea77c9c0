"""The playground's files: whole, guarded by a strict policy, and without a way for a text to become markup."""

import asyncio
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from sae_steer.errors import SteerError
from sae_steer_http import routes_playground
from sae_steer_http.errors import steer_error_response

FOLDER = Path(str(files("sae_steer_http"))) / "playground"
NAMES = sorted(path.name for path in FOLDER.iterdir())
SCRIPTS = [name for name in NAMES if name.endswith(".js")]


def ask(path: str, **headers: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(routes_playground.router)

    async def answer(_: Request, error: Exception) -> Response:
        assert isinstance(error, SteerError)
        return steer_error_response(error)

    app.add_exception_handler(SteerError, answer)

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


@pytest.mark.parametrize("name", ["", *(f"/{name}" for name in NAMES)])
def test_every_file_comes_with_the_policy(name: str) -> None:
    reply = ask(f"/playground{name}")
    assert reply.status_code == 200
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("form-action") == "'none'"
    assert policy.pop("frame-ancestors") == policy.pop("trusted-types") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy == dict.fromkeys(("script-src", "style-src", "connect-src", "img-src"), "'self'")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.content == (FOLDER / (name[1:] or "index.html")).read_bytes()


def test_types_are_told() -> None:
    kinds = {name: ask(f"/playground/{name}").headers["content-type"].partition(";")[0] for name in NAMES}
    expected = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert kinds == {name: expected[Path(name).suffix] for name in NAMES}


def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    first = ask("/playground/main.js")
    again = ask("/playground/main.js", **{"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert ask("/playground/main.js", **{"If-None-Match": '"old"'}).status_code == 200
    assert len({ask(f"/playground/{name}").headers["etag"] for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "name", ["none.js", "..", "%2e%2e", "..%2frouting.py", "..%2f..%2fREADME.md", "%00", "__init__.py", ""]
)
def test_nothing_else_is_served(name: str) -> None:
    reply = ask(f"/playground/{name}")
    assert reply.status_code in (404, 307)
    assert b"import" not in reply.content


class _Page(HTMLParser):
    """What a page refers to, and what it has inline."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.inline: list[str] = []
        self.ids: list[str] = []
        self.named: list[str] = []
        self._script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [given[name] or "" for name in ("src", "href") if name in given]
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in given) else []
        self.ids += [given["id"] or ""] if "id" in given else []
        self.named += [given[key] or "" for key in ("for", "aria-labelledby", "aria-controls") if given.get(key)]


def test_the_page_is_of_its_own_files_and_holds_no_script() -> None:
    page = _Page()
    page.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert page.inline == []
    loaded = [link for link in page.links if not link.startswith("#")]
    assert loaded
    # Relative to /playground, so that a proxy may put a prefix before all of it.
    assert all(link.startswith("playground/") for link in loaded)
    assert {link.removeprefix("playground/") for link in loaded} <= set(NAMES)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.named) <= set(page.ids), "labels and controls name what is there"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_each_other_and_name_what_is_on_the_page(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    imported = re.findall(r'from "([^"]+)"', text)
    assert {path.removeprefix("./") for path in imported} <= set(SCRIPTS)
    page = _Page()
    page.feed((FOLDER / "index.html").read_text(encoding="utf-8"))
    assert set(re.findall(r'\$\("([a-z-]+)"\)', text)) <= set(page.ids)


_MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|setHTML"
    r"|\beval\b|new Function|javascript:|https?://"
)


@pytest.mark.parametrize("name", NAMES)
def test_no_text_can_become_markup_and_nothing_is_fetched_elsewhere(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert _MARKUP.findall(text) == []


def test_the_check_for_markup_sees() -> None:
    for bad in (
        "node.innerHTML = label",
        "node.insertAdjacentHTML('beforeend', x)",
        "import('https://cdn.example/x.js')",
    ):
        assert _MARKUP.search(bad)
