"""The demo as a visitor sees it, in a headless Chromium."""

import re
from pathlib import Path

import pytest
from transformers import AutoModel, pipeline

import elastic_hf  # noqa: F401
from titled_model import TOP_K, TitledModel, Visit


pytest.importorskip("gradio", reason="the demo needs Gradio")
pytest.importorskip("playwright", reason="the demo is clicked through with Playwright")

from playwright.sync_api import expect  # noqa: E402

import render_demo  # noqa: E402


EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "elastic-tiny"
# Imported by Python at its start, if it finds it: says on which address of another machine anything was tried.
GUARD = """
import socket

def refuse(connect):
    def checked(self, address, *rest):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            with open({log!r}, "a") as log:
                print(address, file=log)
            raise OSError("no network")
        return connect(self, address, *rest)
    return checked

def resolve(host, *rest, getaddrinfo=socket.getaddrinfo, **options):
    if host not in (None, "127.0.0.1", "localhost", "::1", b"localhost", b"127.0.0.1", "0.0.0.0", ""):
        with open({log!r}, "a") as log:
            print(host, file=log)
        raise socket.gaierror("no network")
    return getaddrinfo(host, *rest, **options)

socket.socket.connect = refuse(socket.socket.connect)
socket.getaddrinfo = resolve
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the demo tried to reach beyond this machine."""
    return tmp_path_factory.mktemp("guard") / "log"


@pytest.fixture(scope="module")
def address(log):
    """The demo, without a network."""
    (log.parent / "sitecustomize.py").write_text(GUARD.format(log=str(log)))
    path = f"{log.parent}:{EXAMPLES.parent}"
    with render_demo.serve(environment={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with render_demo.browse() as browser:
        if browser is None:
            pytest.skip(f"no browser is installed, none of {', '.join(render_demo.BROWSERS)}")
        yield browser


@pytest.fixture
def page(address, browser):
    """The page as a new visitor finds it."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    page.goto(address)
    expect(page.locator(".found:visible")).to_have_count(TOP_K)
    yield page
    page.close()


@pytest.fixture(scope="module")
def recommend():
    """What the pipeline recommends, in titles."""
    pipe = pipeline("sequential-recommendation", model=str(MODEL), top_k=TOP_K)
    return lambda titles: [item["title"] for item in pipe(titles)]


def search(page, words):
    page.get_by_label("Search titles").fill(words)


def shown(page):
    """The titles that are recommended on the page, without what is said of their moves."""
    return [text.split(" · ")[0].strip() for text in page.locator(".next:visible").all_inner_texts()]


def history(page):
    """The titles of the history on the page, the latest first."""
    return page.get_by_role("listitem").all_inner_texts()


def test_a_search_finds_titles_that_hold_all_words(page):
    search(page, "JAZZ harbour")
    expect(page.locator(".found").nth(9)).to_contain_text("Harbour Jazz")
    assert all("Harbour Jazz" in text for text in page.locator(".found:visible").all_inner_texts())
    search(page, "no such title")
    expect(page.locator(".found:visible")).to_have_count(0)
    search(page, "winter choral waltz no. 2")
    expect(page.locator(".found:visible").first).to_have_text("Winter Choral Waltz No. 2")


def test_words_are_searched_for_that_were_typed_while_the_page_opened(browser, address):
    page = browser.new_page()
    page.goto(address)
    search(page, "harbour jazz waltz")
    expect(page.locator(".found:visible").first).to_contain_text("Harbour Jazz Waltz")
    page.close()


def test_every_click_changes_what_comes_next(page, recommend):
    expect(page.locator(".next:visible")).to_have_count(0)
    expect(page.get_by_text("Nothing yet")).to_be_visible()
    for name in ("Undo", "Clear", "Take the first one, 50 times"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()
    search(page, "harbour jazz waltz")
    page.locator(".found", has_text="Harbour Jazz Waltz No. 1").first.click()
    expect(page.get_by_text(re.compile(r"Reading item 1 and ranking 1,500 took \d+\.\d ms"))).to_be_visible()
    first = ["Harbour Jazz Waltz No. 1"]
    assert history(page) == first and shown(page) == recommend(first)

    second = [*first, shown(page)[3]]
    page.locator(".next").nth(3).click()
    expect(page.get_by_text("Reading item 2 and")).to_be_visible()
    assert history(page) == second[::-1] and shown(page) == recommend(second)
    before = recommend(first)
    for label in page.locator(".next:visible").all_inner_texts():
        title, _, move = label.partition(" · ")
        place = shown(page).index(title.strip())
        rise = before.index(title.strip()) - place if title.strip() in before else None
        expected = "new" if rise is None else f"▲ {rise}" if rise > 0 else f"▼ {-rise}" if rise < 0 else ""
        assert move.strip() == expected

    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_text("Reading item 1 and")).to_be_visible()
    assert history(page) == first and shown(page) == before
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_text("Nothing yet")).to_be_visible()
    expect(page.locator(".next:visible")).to_have_count(0)


def test_a_recommendation_is_explained(page):
    page.locator(".found").nth(0).click()
    page.locator(".next").nth(0).click()
    expect(page.get_by_text("Reading item 2 and")).to_be_visible()
    titles = shown(page)
    expect(page.get_by_role("heading", name=f"Why {titles[0]}?")).to_be_visible()
    page.get_by_role("button", name="Why 3?").click()
    expect(page.get_by_role("heading", name=f"Why {titles[2]}?")).to_be_visible()

    model = TitledModel(str(MODEL))
    by_title = {title: item for item, title in model.titles.items()}
    items = [by_title[title] for title in history(page)[::-1]]
    explanation, _ = model.explain(model.read(Visit(), items), 2)
    rows = page.get_by_role("table", name="contributions").get_by_role("row").all_inner_texts()
    expected = dict(zip(history(page)[::-1], explanation.contributions[0, 2].tolist(), strict=True))
    found = [re.match(r"(.*)\t([+-]\d+\.\d\d)", row).groups() for row in rows]
    assert sorted(title for title, _ in found) == sorted(expected)
    assert all(float(number) == pytest.approx(expected[title], abs=0.011) for title, number in found)
    rows = page.get_by_role("table", name="experts").get_by_role("row").all_inner_texts()[1:]
    half_lives = AutoModel.from_pretrained(MODEL).model.experts.half_lives
    assert len(rows) == 8
    for row in rows:
        head, expert, half_life = re.match(r"(\d)\.(\d)\s+([\d,.]+)", row).groups()
        assert half_life == f"{half_lives[int(head) - 1, int(expert) - 1]:,.1f}"


def test_a_long_history_in_one_click(page):
    page.locator(".found").nth(5).click()
    expect(page.get_by_text("Reading item 1 and")).to_be_visible()
    for number in (51, 101):
        page.get_by_role("button", name="Take the first one, 50 times").click()
        expect(page.get_by_text(f"Reading item {number} and")).to_be_visible()
    expect(page.get_by_text("and 89 before")).to_be_visible()
    assert len(history(page)) == 12
    expect(page.get_by_text("Click on a Why.")).to_be_visible()
    page.get_by_role("button", name="Why 1?", exact=True).click()
    expect(page.get_by_role("table", name="contributions")).to_be_visible()


def test_visitors_have_histories_of_their_own(page, browser, address):
    page.locator(".found").nth(0).click()
    expect(page.get_by_text("Reading item 1 and")).to_be_visible()
    other = browser.new_page()
    other.goto(address)
    expect(other.get_by_text("Nothing yet")).to_be_visible()
    other.close()


def test_nothing_is_asked_for_beyond_this_machine(browser, address, log):
    page = browser.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.locator(".found").nth(0).click()
    page.get_by_text("Reading item 1 and").wait_for()
    page.close()
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and not elsewhere and not errors
    assert not log.exists(), log.read_text()


def test_the_picture_is_small_and_shows_the_page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    assert render_demo.take_picture(page, address).startswith(b"\x89PNG")
    page.close()
    assert (EXAMPLES / "demo" / "screenshot.png").stat().st_size < 200_000


def test_titles_of_a_file_stand_for_item_ids(tmp_path):
    (tmp_path / "movies.dat").write_bytes(
        "260::Étoiles <b>& co</b> (1977)::A|B\n1196::Two (1980)::A\n".encode("latin-1")
    )
    folder = EXAMPLES / "elastic-ml1m"
    model = TitledModel(str(folder), str(tmp_path / "movies.dat"))
    (found,) = model.search("étoiles")
    assert model.titles[found] == "Étoiles <b>& co</b> (1977)"
    assert model.titles[model.search("1210")[0]] == "1210"
    (tmp_path / "movies.dat").write_text("0::None (1900)::A\n")
    with pytest.raises(ValueError, match="titles_file must name items of the model, such as 1, found none in"):
        TitledModel(str(folder), str(tmp_path / "movies.dat"))


def test_another_model_is_refused(tmp_path):
    from factories import elastic_model

    elastic_model(use_timestamps=True).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="must be an ELASTIC model that reads items alone, found model_type='elastic'"
    ):
        TitledModel(str(tmp_path))
