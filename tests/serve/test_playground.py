"""The playground, in a browser."""

import base64
import hashlib
import re
import shutil
from contextlib import contextmanager

import httpx
import pytest

from testing.serving import Paced, running, save, service_of, until

api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
OFFLINE = "disable-background-networking disable-component-update disable-quic disable-sync no-first-run"
FLAGS = ["--no-sandbox", "--disable-gpu", *(f"--{name}" for name in OFFLINE.split())]

PROMPT = "the baker of the harbor is"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = save(tmp_path_factory.mktemp("served"))
    shutil.copytree(model.folder / "adapters" / "routed", model.folder / "adapters" / HOSTILE)
    return model


@pytest.fixture(scope="module")
def address(model):
    with running(service_of(model)) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens an address; in the end there was no complaint, no dialog and no request to anyone else."""
    contexts, complaints, asked = [], [], []

    def visit(address, expected=(), **options):
        context = chromium.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if not is_expected(said, expected) else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        context.on("request", lambda request: asked.append((request.url, address)))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        assert not context.cookies()
        context.close()
    assert not complaints
    assert asked
    assert [url for url, address in asked if not url.startswith((f"{address}/", "data:"))] == []


def is_expected(said, failures):
    """The browser itself puts failed requests on its console."""
    return said.text.startswith("Failed to load resource") and any(failure in said.text for failure in failures)


def side(page, index):
    return page.locator(".side").nth(index)


def send(page, text=PROMPT, tokens=12):
    page.fill("#tokens", str(tokens))
    page.fill("#text", text)
    page.click("#send")


def finished(page, index=0):
    """Waits for the answer of a side; its text."""
    api.expect(side(page, index).locator(".log")).to_have_attribute("aria-busy", "false", timeout=20_000)
    return side(page, index).locator(".answer").last.text_content()


def gates(page, index=0):
    rows = side(page, index).locator(".gates li")
    return [(row.locator("span").first.inner_text(), row.locator("span").last.inner_text()) for row in rows.all()]


def asked_for(address, name, prompt=PROMPT, tokens=12):
    body = {"model": name, "max_tokens": tokens, "temperature": 0, "ptmoe": True}
    if isinstance(prompt, str):
        return httpx.post(f"{address}/v1/completions", json={**body, "prompt": prompt}).json()["choices"][0]
    return httpx.post(f"{address}/v1/chat/completions", json={**body, "messages": prompt}).json()["choices"][0]


@contextmanager
def spelling(model, text, monkeypatch, api_keys=(), chat=True, **options):
    service = service_of(model)
    if not chat:
        service.tokenizer.chat_template = None
    service.engine = Paced(range(len(text)), **options)  # a token a character
    service.ends = frozenset()
    monkeypatch.setattr(service, "_decode", lambda ids: "".join(text[index] for index in ids))
    with running(service, api_keys=api_keys) as address:
        yield service.engine, address


def test_the_page_stands_alone_and_runs_its_own_script_only(model):
    with running(service_of(model)) as address:
        got = httpx.get(address)
        assert "/" not in httpx.get(f"{address}/openapi.json").json()["paths"]
    assert got.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in got.headers["content-security-policy"].split("; "))
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", got.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.findall(r"""innerHTML|(?:src|href|action)=(?!"data:)|\son\w+=|\sstyle=""", got.text)
    assert len(got.text.splitlines()) <= 350
    with running(service_of(model), with_playground=False) as address:
        assert httpx.get(address).status_code == 404


@in_browser
def test_answers_and_routing_are_those_of_the_api(visit, address):
    page = visit(address)
    api.expect(page.locator("#about")).to_have_text("base and 3 adapters")
    said = set()
    for name in ("routed", "fixed", "base"):
        side(page, 0).locator("select").select_option(name)
        for kind in ("completion", "chat"):
            page.check(f"#{kind}")
            send(page)
            want = asked_for(address, name, PROMPT if kind == "completion" else [{"role": "user", "content": PROMPT}])
            answer = finished(page)
            assert answer == (want["text"] if kind == "completion" else want["message"]["content"])
            said.add(answer)
            expert, gate = want["ptmoe"]["expert"], want["ptmoe"]["gate"] or []
            chosen = [f"Expert {index}" + (" ✓" if index == expert else "") for index in range(len(gate))]
            assert gates(page) == list(zip(chosen, (f"{value:.3f}" for value in gate), strict=True))
            about = {"routed": f"Expert {expert}, weight", "fixed": "It does not route", "base": "The base itself"}
            assert side(page, 0).locator(".routing").inner_text().startswith(about[name])
            assert side(page, 0).locator(".meta").inner_text().startswith(f"{name}: 12 tokens in ")
    assert len(said) > 3


@in_browser
def test_an_answer_is_seen_while_it_comes_and_stop_ends_one_side(visit, model, monkeypatch):
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    with spelling(model, text, monkeypatch, pause=0.1) as (engine, address):
        page = visit(address)
        page.check("#compare")
        for index, name in enumerate(("routed", "fixed")):
            side(page, index).locator("select").select_option(name)
        send(page, tokens=40)
        for index in (0, 1):
            api.expect(side(page, index).locator(".answer")).to_have_text(re.compile("^abc"))
            assert side(page, index).locator(".log").get_attribute("aria-busy") == "true"
        assert page.locator("#send").get_attribute("aria-disabled") == "true"
        api.expect(side(page, 0).locator(".routing")).to_have_text(re.compile("^Expert"))
        side(page, 0).locator(".stop").click()
        stopped = finished(page, 0)
        until(lambda: engine.open == 1)
        assert text.startswith(stopped)
        assert len(stopped) < 40
        api.expect(side(page, 0).locator(".meta")).to_have_text(re.compile("stopped after"))
        assert finished(page, 1) == text[:40]
        assert engine.ended == 1
        assert page.locator("#send").get_attribute("aria-disabled") == "false"
        send(page, tokens=40)
        api.expect(side(page, 1).locator(".answer")).to_have_text(re.compile("^a"))
        page.close()  # a reader who leaves ends the answers
        until(lambda: engine.open == 0)
        assert engine.ended == 1


@in_browser
def test_names_and_answers_are_shown_as_text(visit, model, monkeypatch):
    hostile = f"{HOSTILE}<script>alert(2)</script>&lt;b&gt;\n  ]]> {{{{x}}}} \u202eevil"
    with spelling(model, hostile, monkeypatch) as (_, address):
        page = visit(address)
        side(page, 0).locator("select").select_option(HOSTILE)
        for kind in ("completion", "chat"):
            page.check(f"#{kind}")
            send(page, HOSTILE, 200)
            assert finished(page) == hostile
            assert side(page, 0).locator(".input").text_content() == HOSTILE
            assert side(page, 0).locator(".meta").text_content().startswith(f"{HOSTILE}: ")
        assert page.locator("img, .log script, .log b").count() == 0


@in_browser
def test_it_is_used_by_keyboard_alone_on_a_phone(visit, address):
    page = visit(address, viewport={"width": 390, "height": 844})
    api.expect(page.locator("#about")).to_have_text("base and 3 adapters")
    reached = []

    def reach(control):
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
            if control.evaluate("control => control === document.activeElement"):
                return
        raise AssertionError(reached)

    reach(page.get_by_label("Max tokens"))
    page.keyboard.press("Control+A")
    page.keyboard.type("12")
    reach(page.get_by_label("Compare two adapters"))
    page.keyboard.press("Space")
    reach(page.get_by_label("Text"))
    page.keyboard.type(PROMPT)
    for letter, name in (("A", "fixed"), ("B", "routed")):
        reach(page.get_by_label(f"Adapter {letter}"))
        page.keyboard.type(name)
    reach(page.get_by_role("log").last)
    page.keyboard.press("Shift+Tab")
    order = ["completion", "tokens", "temperature", "compare", "text", "send", "clear", "model", "stop", "log", "model"]
    assert reached == [*order, "stop", "log"]
    for _ in range(6):
        page.keyboard.press("Shift+Tab")
    api.expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.keyboard.press("Enter")
    for index, name in enumerate(("fixed", "routed")):
        assert finished(page, index) == asked_for(address, name)["text"]
    api.expect(page.get_by_role("button", name="Send")).to_be_focused()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    controls = page.locator("input:visible, select:visible, textarea:visible, button:visible").all()
    names = "control => (control.matches('button') ? control : control.labels[0]).textContent"
    assert all(control.evaluate(names).strip() for control in controls)
    touched = page.locator("label.inline:visible, .field > input:visible, select:visible, button:visible")
    assert min(control.bounding_box()["height"] for control in touched.all()) >= 40


@in_browser
def test_keys_send_and_stop(visit, model, monkeypatch):
    with spelling(model, "ab" * 40, monkeypatch, pause=0.05) as (engine, address):
        page = visit(address)
        page.check("#compare")
        page.fill("#text", PROMPT)
        page.press("#text", "Control+Enter")
        for index in (0, 1):
            api.expect(side(page, index).locator(".answer")).to_have_text(re.compile("^ab"))
        page.keyboard.press("Escape")
        assert len(finished(page, 0)) < 64 > len(finished(page, 1))
        until(lambda: engine.open == 0)
        assert engine.ended == 0


@in_browser
def test_clear_ends_what_is_running_and_forgets_the_conversation(visit, model, monkeypatch):
    with spelling(model, "ab" * 40, monkeypatch, pause=0.05) as (engine, address):
        page = visit(address)
        page.check("#chat")
        send(page, tokens=60)
        api.expect(side(page, 0).locator(".answer")).to_have_text(re.compile("^ab"))
        page.click("#clear")
        until(lambda: engine.open == 0)
        api.expect(page.locator(".turn")).to_have_count(0)
        send(page, tokens=4)
        assert finished(page) == "abab"
        with page.expect_request("**/v1/chat/completions") as asked:
            send(page, "more", tokens=4)
        sent = [message["content"] for message in asked.value.post_data_json["messages"]]
        assert sent == [PROMPT, "abab", "more"]


@in_browser
def test_errors_are_said_in_words_where_they_belong(visit, model, monkeypatch):
    with spelling(model, "abcdefgh", monkeypatch, chat=False, fault="the engine fell over") as (_, address):
        page = visit(address, expected=("400", "404"))
        page.check("#compare")
        side(page, 0).locator("select").select_option("fixed")
        side(page, 1).locator("select").select_option("routed")
        send(page)
        assert finished(page, 1) == "abcdefgh"
        assert finished(page, 0) == "abc"
        assert side(page, 0).locator(".error").text_content() == "the engine fell over"
        assert side(page, 1).locator(".error").count() == 0
        send(page, tokens=5000)
        api.expect(side(page, 1).locator(".error")).to_have_text("max_tokens=5000: this server gives at most 4096")
        page.check("#chat")
        for text in ("one", "two"):
            send(page, text)
            for index in (0, 1):
                finished(page, index)
        api.expect(side(page, 1).locator(".error")).to_have_text(
            re.compile(r"no chat template: give one message.*\. Clear begins a new conversation\.$")
        )
        assert page.input_value("#text") == "two"
        page.evaluate("sides[1].model.add(new Option('routd', 'routd')); sides[1].model.value = 'routd'")
        page.click("#clear")
        send(page)
        api.expect(side(page, 1).locator(".error")).to_have_text(re.compile("no model 'routd'; did you mean 'routed'"))


@in_browser
def test_a_server_that_is_gone_is_named(visit, model, monkeypatch):
    with spelling(model, "abc", monkeypatch) as (_, address):
        page = visit(address, expected=("",))
        send(page)
        assert finished(page) == "abc"
    page.fill("#text", PROMPT)
    page.click("#send")
    api.expect(side(page, 0).locator(".error")).to_have_text(re.compile("cannot be reached"))


@in_browser
def test_a_key_is_asked_for_where_one_is_needed_and_kept_nowhere(visit, model, monkeypatch):
    with spelling(model, "abc", monkeypatch, api_keys=["sesame"]) as (_, address):
        page = visit(address, expected=("401",))
        api.expect(page.locator("#problem")).to_have_text("The server asks for an API key.")
        api.expect(page.get_by_label("API key")).to_be_focused()
        for key, said in (("wrong", "does not know this API key"), ("ключ", "characters that a request cannot carry")):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            api.expect(page.locator("#problem")).to_have_text(re.compile(said))
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        api.expect(page.locator("#text")).to_be_focused()
        api.expect(page.locator("#unlock")).to_be_hidden()
        send(page)
        assert finished(page) == "abc"
        assert page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert "sesame" not in page.url
        page.reload()
        api.expect(page.locator("#unlock")).to_be_visible()
        assert page.input_value("#key") == ""


@in_browser
def test_many_adapters_are_searched(visit, address):
    page = visit(address)
    side(page, 0).locator("select").select_option("routed")
    names = ["base", *(f"task-{index}" for index in range(2000))]
    served = [{"id": name, "owned_by": "base" if name == "base" else "ptmoe"} for name in names]
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": served}))
    page.evaluate("load()")
    api.expect(page.locator("#about")).to_have_text("base and 2,000 adapters")
    chosen = side(page, 0).locator("select")
    api.expect(chosen.locator("option")).to_have_count(2002)
    assert chosen.locator("option").last.inner_text() == "routed (gone)"
    page.get_by_label("Search adapters of side A").fill("TASK-123")
    api.expect(chosen.locator("option")).to_have_count(12)
    chosen.select_option("task-1234")
    page.get_by_label("Search adapters of side A").fill("")
    api.expect(chosen).to_have_value("task-1234")
