"""What a user does on the playground, and what is to be seen on it."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.server.conftest import Served

API_KEY, ADMIN_KEY = "open sesame", "admin sesame"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}
SHOTS = Path(os.environ.get("SAE_STEER_SCREENSHOTS", Path(__file__).resolve().parents[2] / "build" / "screenshots"))
"""Where pictures of the page are kept, as artifacts of a test run."""

Page = Any
Json = dict[str, Any]


def give_keys(page: Page, admin: str = "") -> None:
    if page.locator("#keys").is_hidden():
        page.get_by_role("button", name="Keys", exact=True).click()
    page.get_by_label("API key").fill(API_KEY)
    page.get_by_label("Admin key").fill(admin)
    page.get_by_role("button", name="Use keys").click()
    page.get_by_text("transformers · embedded: 768 features").wait_for()


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    done(page)


def done(page: Page) -> None:
    """Waits until nothing runs and nothing is about to."""
    page.locator("#answers-card[aria-busy=false]").wait_for()
    page.get_by_role("button", name="Run", exact=True).wait_for()


def find(page: Page, words: str, feature: int) -> None:
    """Searches by label and edits what is found."""
    page.get_by_label("Words of a label, or a number").fill(words)
    page.get_by_role("button", name=re.compile(rf"^Edit feature {feature}\b")).click()


def answer(page: Page, pane: str) -> str:
    """The completion that a pane shows."""
    return (
        "".join(page.locator(f"#pane-{pane} .token:not(.prompt)").all_text_contents()).replace("⏎", "").replace("∅", "")
    )


def shown_request(page: Page) -> Json:
    """The body in the curl command on the screen."""
    text = page.locator("#code").text_content()
    return json.loads(re.search(r"-d '(.*)'$", text, flags=re.DOTALL)[1].replace("'\\''", "'"))


def post(served: Served, body: Json, route: str = "/v1/chat/completions") -> Json:
    with served.http(headers=HEADERS) as client:
        reply = client.post(route, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()


def shoot(page: Page, name: str) -> None:
    """Keeps a picture of the page as an artifact of the run."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def execute(command: list[str]) -> str:
    environment = os.environ | {"SAE_STEER_API_KEY": API_KEY}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lightness(page: Page, selector: str, name: str) -> float:
    """Relative luminance of a colour as it is drawn, 0 to 1."""
    return page.evaluate(
        """([selector, name]) => {
          const canvas = document.createElement("canvas").getContext("2d");
          canvas.fillStyle = getComputedStyle(document.querySelector(selector))[name];
          canvas.fillRect(0, 0, 1, 1);
          const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
          return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        }""",
        [selector, name],
    )


def contrast(page: Page, selector: str, ground: str) -> float:
    """WCAG's contrast of a text with a ground, 1 to 21."""
    a, b = lightness(page, selector, "color"), lightness(page, ground, "backgroundColor")
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def press_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Moves the focus with the keyboard until it is there, and is seen to be there."""
    for _ in range(60):
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"the focus on {selector} cannot be seen"
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector} cannot be reached with {key}")
