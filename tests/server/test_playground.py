"""The playground in a real browser, on a real server: what one sees is what the server did, and nothing else runs."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from sae_steer_server.settings import LabelSource, Settings
from tests.server.conftest import Served
from tests.server.playground_page import (
    ADMIN_KEY,
    API_KEY,
    HEADERS,
    Page,
    answer,
    contrast,
    done,
    execute,
    find,
    give_keys,
    lightness,
    post,
    press_to,
    run,
    shoot,
    shown_request,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the path (Debian: apt-get install chromium)")

SEA = 551
MARKUP = "<img src=x onerror=\"document.title='owned'\">"
MARKED = 1  # a feature without a label of its own
SEEN = 20_000
"""Milliseconds after which what should be on the screen is missed; a machine may be busy."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The demonstration model, with both keys, a folder for profiles, and one label that is markup."""
    folder = tmp_path_factory.mktemp("playground")
    (folder / "profiles").mkdir()
    (folder / "labels.csv").write_text(f'feature,label\n{MARKED},"{MARKUP.replace(chr(34), chr(34) * 2)}"\n')
    settings = Settings(
        model="demo",
        device="cpu",
        dtype="float32",  # in bfloat16, requests that share a batch with others may round to other tokens
        port=0,
        labels=(LabelSource("embedded", folder / "labels.csv"),),
        profiles=folder / "profiles",
        api_key=API_KEY,
        admin_key=ADMIN_KEY,
    )
    running = Served(settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1440, "height": 950}, reduced_motion="reduce")
    opened.set_default_timeout(SEEN)
    opened.grant_permissions(["clipboard-read", "clipboard-write"])
    yield opened
    opened.close()


@pytest.fixture
def page(context: Any, served: Served) -> Iterator[Page]:
    """The page with its keys given; whatever the browser complains of fails the test."""
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("request", lambda asked: None if asked.url.startswith(served.url) else complaints.append(asked.url))
    opened.goto(f"{served.url}/playground")
    opened.get_by_role("alert").get_by_text("invalid_api_key").wait_for()
    give_keys(opened)
    yield opened
    # The one thing that a browser logs by itself, for the answers that tests provoke.
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    assert opened.title() == "sae-steer playground"


def test_type_slide_and_see_the_steered_answer_differ(page: Page, served: Served) -> None:
    page.get_by_role("textbox", name="Prompt").fill("Tell me about my garden.")
    run(page)
    find(page, "sea", SEA)
    slider = page.get_by_label(f"value of feature {SEA}", exact=True)
    seen: list[str] = []
    for value in ("0.5", "1"):
        slider.fill(value)
        done(page)
        body = shown_request(page)
        assert body["steering"]["interventions"][0]["value"] == float(value)
        assert body["messages"] == [{"role": "user", "content": "Tell me about my garden."}]
        steered = post(served, body)["choices"][0]["message"]["content"]
        assert answer(page, "steered") == steered
        seen.append(steered)
    del body["steering"]["interventions"]
    plain = post(served, body)["choices"][0]["message"]["content"]
    assert answer(page, "plain") == plain
    assert len({plain, *seen}) == 3
    shoot(page, "steered")


def test_every_token_has_the_colour_of_its_activation(page: Page, served: Served) -> None:
    find(page, "sea", SEA)
    done(page)
    body = shown_request(page)
    (reading,) = post(served, body)["choices"][0]["steering"]["readings"]
    values = dict(zip(reading["positions"], (row[0] for row in reading["values"]), strict=True))
    assert max(values.values()) > 10
    tokens = page.locator("#pane-steered .token").evaluate_all(
        "nodes => nodes.map((node) => [node.textContent, Number(node.style.getPropertyValue('--heat')),"
        " getComputedStyle(node).backgroundColor])"
    )
    most = 35.1794
    # All of the prompt and of the answer; the last token never goes through the model.
    assert [heat for _, heat, _ in tokens] == pytest.approx(
        [min(values.get(i, 0) / most, 1) for i in range(len(tokens))], abs=2e-3
    )
    assert "".join(text for text, _, _ in tokens[: len(values)]) == "".join(reading["text"])
    assert len({colour for _, _, colour in tokens}) >= 4, "other values have other colours"
    assert page.locator("#scale-high").text_content() == "35.2"


def test_a_hovered_token_shows_what_fires_there(page: Page, served: Served) -> None:
    find(page, "sea", SEA)
    done(page)
    (reading,) = post(served, shown_request(page))["choices"][0]["steering"]["readings"]
    position = len(reading["positions"]) - 2
    page.locator("#pane-steered .token").nth(position).hover()
    page.get_by_text(f"steered, position {position}").wait_for()
    rows = page.locator("#token-body .bars li")
    numbers, values = (rows.locator(part).all_text_contents() for part in (".bar-number", ".bar-value"))
    top = reading["top"][position]
    assert numbers[: len(top)] == [f"#{feature}" for feature, _ in top]
    assert [float(text) for text in values[: len(top)]] == pytest.approx([value for _, value in top], rel=0.01)
    with served.http(headers=HEADERS) as client:
        ids = ",".join(str(feature) for feature, _ in top)
        found = client.get("/v1/steering/features", params={"sae": "embedded", "ids": ids}).json()["data"]
    labels = rows.locator(".bar-label").all_text_contents()
    assert labels[: len(top)] == [entry["label"] or "no label" for entry in found]
    rows.nth(0).get_by_role("button", name="Edit").click()
    assert page.locator("#edit-list .edit").count() == 2, "what fires can be edited at once"


def test_a_profile_is_saved_and_loaded_again(page: Page, served: Served) -> None:
    find(page, "sea", SEA)
    page.get_by_label(f"value of feature {SEA}, as a number").fill("0.65")
    page.get_by_label(f"Positions of feature {SEA}").select_option("completion")
    page.locator("summary", has_text="Profiles").click()
    page.get_by_role("textbox", name="Name", exact=True).fill("tides")
    page.get_by_label("Description").fill("By the sea")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Saving needs the admin key").wait_for()
    give_keys(page, "wrong")
    page.get_by_role("button", name="Save", exact=True).click()
    page.locator("#edits .error").get_by_text("The admin key is missing or wrong", exact=False).wait_for()
    shoot(page, "error")
    give_keys(page, ADMIN_KEY)
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_text("Saved tides.").wait_for()
    with served.http(headers=HEADERS) as client:
        stored = client.get("/v1/steering/profiles/tides").json()
    edit = {"sae": "embedded", "features": [SEA], "op": "clamp", "value": 0.65, "units": "reference_max"}
    assert stored["interventions"] == [edit | {"positions": "completion"}]
    assert stored["description"] == "By the sea"
    assert stored["saes"] == {"embedded": served.state.steering.catalog.saes["embedded"].sae.fingerprint}
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert "sesame" not in kept
    before = shown_request(page)
    page.reload()
    page.get_by_role("alert").get_by_text("invalid_api_key").wait_for()  # keys are in the page's memory alone
    give_keys(page)
    page.locator("summary", has_text="Profiles").click()
    page.get_by_role("combobox", name="Stored").select_option("tides")
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("Loaded tides.").wait_for()
    assert shown_request(page)["steering"] == before["steering"]
    assert page.get_by_label(f"value of feature {SEA}", exact=True).input_value() == "0.65"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl in the path")
def test_the_copied_curl_runs(page: Page) -> None:
    page.get_by_role("textbox", name="Prompt").fill("It's \"Anna's\" $HOME `id` \\ day")
    find(page, "sea", SEA)
    done(page)
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert API_KEY not in command
    reply = json.loads(execute(["bash", "-c", command]))
    assert reply["choices"][0]["message"]["content"] == answer(page, "steered")
    assert reply["choices"][0]["steering"]["applied"]["features"][0]["feature"] == SEA


def test_the_copied_python_runs(page: Page) -> None:
    page.get_by_role("combobox", name="As", exact=True).select_option("completion")
    page.get_by_role("textbox", name="Prompt").fill("It's \"Anna's\" ${HOME} \\ day")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Seed").fill("11")
    find(page, "sea", SEA)
    done(page)
    page.get_by_role("tab", name="Python").click()
    page.get_by_role("button", name="Copy", exact=True).click()
    page.get_by_role("button", name="Copied").wait_for()
    out = execute([sys.executable, "-c", page.evaluate("navigator.clipboard.readText()")])
    assert out.startswith(answer(page, "steered") + "\n")
    assert f"'feature': {SEA}" in out


def test_markup_stays_text(page: Page) -> None:
    pictures = page.locator("img").count()
    page.get_by_role("combobox", name="As", exact=True).select_option("completion")
    page.get_by_role("textbox", name="Prompt").fill(f"{MARKUP}<script>document.title='owned'</script>")
    find(page, "onerror", MARKED)
    done(page)
    assert page.locator("#found .found-label").first.text_content() == MARKUP
    assert page.locator("#edit-list .edit-title strong").text_content() == MARKUP
    assert MARKUP in page.locator("#colour option").nth(1).text_content()
    prompt = "".join(page.locator("#pane-plain .token.prompt").all_text_contents())
    assert prompt.endswith(f"{MARKUP}<script>document.title='owned'</script>")
    page.locator("#pane-plain .token.prompt").nth(3).hover()
    page.get_by_text(re.compile("plain, position 3")).wait_for()
    page.get_by_label("Words of a label, or a number").fill("x" * 300)  # the field's own limit holds it to 256
    assert len(page.get_by_label("Words of a label, or a number").input_value()) == 256
    assert page.locator("img").count() == pictures
    assert page.title() == "sae-steer playground"


def test_the_browser_itself_refuses_markup_and_other_places(context: Any, served: Served) -> None:
    opened = context.new_page()
    opened.goto(f"{served.url}/playground")
    attempt = "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    assert opened.evaluate(attempt) == "TypeError"
    elsewhere = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.name)"
    with opened.expect_console_message(lambda said: "Content Security Policy" in said.text):
        assert opened.evaluate(elsewhere) == "TypeError"


def test_what_the_server_refuses_is_shown_as_it_is(page: Page, served: Served) -> None:
    page.get_by_role("textbox", name="Prompt").fill("word " * 600)
    run(page)
    shown = page.locator("#pane-plain .error")
    body = shown_request(page)
    with served.http(headers=HEADERS) as client:
        error = client.post("/v1/chat/completions", json=body).json()["error"]
    assert shown.locator("strong").text_content() == error["code"] == "context_length_exceeded"
    assert shown.locator("code").text_content() == error["param"]
    assert shown.locator("span").text_content() == error["message"]


def test_what_fires_on_a_text_and_what_differs(page: Page) -> None:
    page.get_by_role("tab", name="On a text").click()
    page.get_by_label("Which features fire on").fill("We sailed over the ocean.")
    page.get_by_role("button", name="Find", exact=True).click()
    page.get_by_text("By their maximum").wait_for()
    assert page.locator("#found li").count() == 20
    assert any("sea" in text for text in page.locator("#found .found-label").all_text_contents())
    page.get_by_role("tab", name="Between two").click()
    page.get_by_label("Text A").fill("We sailed over the ocean.")
    page.get_by_label("Text B").fill("The train was late.")
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("By how far their maxima are apart.").wait_for()
    best = page.locator("#found .found-label").all_text_contents()[:6]
    assert any("train" in text for text in best)
    assert any("sea" in text for text in best)
    words = page.locator("#found .on code").all_text_contents()
    assert "ocean" in words
    assert "train" in words
    shoot(page, "compare")


def test_light_and_dark(page: Page) -> None:
    find(page, "sea", SEA)
    done(page)

    def is_dark() -> bool:
        # WCAG's least contrast of text, for what is muted and what is hottest as well
        for selector, ground in (("body", ".card"), (".note", ".card"), ("h3", ".pane"), ("#run", "#run")):
            assert contrast(page, selector, ground) >= 4.5, (selector, ground)
        page.evaluate("document.querySelector('#pane-steered .token:not(.prompt)').style.setProperty('--heat', 1)")
        hot = "#pane-steered .token:not(.prompt)"
        assert contrast(page, hot, hot) >= 4.5
        return lightness(page, ".card", "backgroundColor") < 0.2

    page.emulate_media(color_scheme="light")
    assert not is_dark()
    page.emulate_media(color_scheme="dark")
    assert is_dark()
    shoot(page, "dark")
    page.get_by_role("combobox", name="Theme").select_option("light")
    assert not is_dark()
    page.emulate_media(color_scheme="light")
    page.get_by_role("combobox", name="Theme").select_option("dark")
    assert is_dark()
    page.reload()
    assert lightness(page, ".card", "backgroundColor") < 0.2, "the choice is kept"
    page.get_by_role("combobox", name="Theme").select_option("auto")


def test_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    find(page, "sea", SEA)
    done(page)
    page.locator("#pane-steered .token").nth(9).click()
    page.get_by_text("steered, position 9").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than the screen"
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("ask", "answers-card", "find", "request")}
    tops = [box["y"] for box in boxes.values()]
    assert tops == sorted(tops), "the answers come before the search"
    plain, steered = (page.locator(f"#pane-{name}").bounding_box() for name in ("plain", "steered"))
    assert steered["y"] > plain["y"] + plain["height"] - 1
    small = page.locator("button:visible, select:visible").evaluate_all(
        "nodes => nodes.filter((node) => node.getBoundingClientRect().height < 28).map((node) => node.outerHTML)"
    )
    assert small == [], "every control can be touched"
    shoot(page, "phone")


def test_with_the_keyboard_alone(page: Page, served: Served) -> None:
    page.evaluate("document.activeElement.blur()")
    press_to(page, "#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("Tell me a story.")
    press_to(page, "#run")
    page.keyboard.press("Enter")
    done(page)
    press_to(page, "#query")
    page.keyboard.type("the sea")
    page.get_by_role("button", name=f"Edit feature {SEA}, the sea", exact=True).wait_for()
    press_to(page, f"[aria-label='Edit feature {SEA}, the sea']")
    page.keyboard.press("Enter")
    press_to(page, "input[type=range]")  # where it already is
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    done(page)
    assert shown_request(page)["steering"]["interventions"][0]["value"] == pytest.approx(1.1)
    press_to(page, f"[aria-label='Operation of feature {SEA}']", "Shift+Tab")
    page.keyboard.type("scale")
    assert page.evaluate("document.activeElement.ariaLabel") == f"Operation of feature {SEA}", "the focus stays"
    done(page)
    assert shown_request(page)["steering"]["interventions"][0]["op"] == "scale"
    press_to(page, "#pane-steered .tokens")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.get_by_text("steered, position 4").wait_for()
    active = page.locator("#pane-steered .tokens").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    press_to(page, "#tab-curl")
    page.keyboard.press("ArrowRight")
    assert "OpenAI(" in page.locator("#code").text_content()
    press_to(page, "#copy")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Copied").wait_for()


def test_every_control_has_a_name(page: Page) -> None:
    find(page, "sea", SEA)
    done(page)
    tree = page.locator("body").aria_snapshot()
    nameless = [
        line
        for line in tree.splitlines()
        if re.fullmatch(r"\s*- (button|textbox|combobox|slider|spinbutton|checkbox|listbox|tab)( \[.*\])?:?", line)
    ]
    assert nameless == []
    assert tree.count("slider") == 1


def test_running_again_stops_what_ran(page: Page, served: Served) -> None:
    page.get_by_label("Tokens", exact=True).fill("400")
    page.get_by_role("textbox", name="Prompt").fill("Tell me about the sea, music, and trains.")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).wait_for()
    page.get_by_label("Tokens", exact=True).fill("5")
    run(page)
    assert page.locator("#pane-plain .token:not(.prompt)").count() == 5
    with served.http() as client:
        line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith("sae_steer_choices"))
    assert float(line.split()[-1]) == 0, "a stopped answer holds nothing"
