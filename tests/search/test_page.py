"""The page and the live search: as HTML, over HTTP, and in a real headless Chromium."""

import base64
import io
import re
import socket
import threading
import time

import pytest
from PIL import Image

from hamlet.errors import HamletError
from hamlet.search import Index, page

from .conftest import Colours, photo

starlette = pytest.importorskip("starlette", reason="the live page needs the extra 'web'")
from starlette.testclient import TestClient  # noqa: E402

from hamlet.search import server  # noqa: E402

EVIL = '<img src=x onerror=alert(1)>" $title .png'


class Words(Colours):
    """Knows the words for colours."""

    knows_words = True

    def reading(self, sentence):
        return "crimson" if sentence == "red" else ""

    def encode_text(self, sentences):
        from PIL import ImageColor

        if "/" in sentences[0]:
            raise HamletError("unknown color")
        return self.encode([Image.new("RGB", (32, 32), ImageColor.getrgb(s)) for s in sentences])


@pytest.fixture
def index(photos, tmp_path, monkeypatch):
    """An index with a hostile file name among its photos, and the model that made it."""
    photo(photos / EVIL.replace("/", ""), 30)
    made = Index.from_folder(photos, tmp_path / "index", Words(), progress=False)
    monkeypatch.setattr(Index, "encoder", lambda self: Words())
    return made


@pytest.fixture
def client(index, tmp_path):
    return TestClient(server.application(tmp_path / "index"), base_url="http://127.0.0.1:8000")


def test_the_page_is_one_file_with_escaped_names_and_nothing_from_outside(index, photos):
    text = page.page(index, [str(photos / "a" / "00.png"), "red"], k=5)
    assert "<h2>red (read as ImageNet&#x27;s crimson)</h2>" in text
    assert "<h2>00.png</h2>" in text and str(photos) not in text  # nothing of the machine's folders
    assert EVIL not in text and "<script" not in text and "script-src 'none'" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert len(sources) == 1 + 1 + 5 + 5 and all(s.startswith("data:") for s in sources)
    first = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', text)[1])))
    assert first.format == "JPEG" and max(first.size) <= page.SIDE
    assert text.count(' alt="') == 11 and 'lang="en"' in text and "width=device-width" in text
    whole = page.page(index)
    assert whole.count("<section>") == 13 and "&lt;img src=x onerror=alert(1)&gt;" in whole


def test_thumbnails_carry_no_camera_data(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "secret maker"
    Image.new("RGB", (900, 600), "red").save(tmp_path / "a.jpg", exif=exif)
    content = page.thumbnail(tmp_path / "a.jpg")
    assert b"secret" in (tmp_path / "a.jpg").read_bytes() and b"secret" not in content
    assert Image.open(io.BytesIO(page.thumbnail(tmp_path / "gone.jpg"))).format == "JPEG"


def test_what_is_asked(index, photos):
    assert page.ask(index, Words(), photos / "a" / "00.png", 1)["path"].tolist() == [str(photos / "a" / "00.png")]
    with pytest.raises(HamletError, match=r"no photo at gone\.jpg"):
        page.ask(index, Words(), "gone.jpg")


def test_a_photo_a_word_and_a_result_are_searched(client, photos):
    with (photos / "b" / "07.png").open("rb") as file:
        answer = client.post("/", files={"photo": ("mine.png", file)})
    assert answer.status_code == 200 and answer.text.index("07.png") < answer.text.index("found 2")
    words = client.get("/", params={"words": "red"})
    assert words.status_code == 200 and words.text.count("<li>") == 12
    existing = client.get("/", params={"words": str(photos / "a" / "00.png")})  # words, not a path
    assert existing.status_code == 400 and "unknown color" in existing.text
    more = re.search(r'href="(/\?photo=\d+)"', words.text)[1]
    assert client.get(more).text.count("<li>") == 12
    picture = client.get("/photo/3")
    assert picture.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(picture.content)).size == (48, 48)


@pytest.mark.parametrize(
    "path",
    [
        "/photo/99",
        "/photo/-1",
        f"/photo/{'9' * 5000}",
        "/photo/../../etc/passwd",
        "/photo/%2e%2e%2fetc%2fpasswd",
        "/photo//etc/passwd",
        "/etc/passwd",
        "/index/index.safetensors",
    ],
)
def test_no_path_but_the_photos_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and b"root:" not in answer.content


@pytest.mark.parametrize("chosen", ["99", "-1", "x", "9" * 5000])
def test_more_like_a_photo_that_is_not_there_is_refused(client, chosen):
    answer = client.get("/", params={"photo": chosen})
    assert answer.status_code == 400 and 'role="alert"' in answer.text


def test_a_photo_that_became_a_link_elsewhere_is_not_given_away(client, index, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    file = index.photo(3)
    file.unlink()
    file.symlink_to(tmp_path / "secret.txt")
    answer = client.get("/photo/3")
    assert Image.open(io.BytesIO(answer.content)).size == (page.SIDE, page.SIDE) and b"secret" not in answer.content


def test_uploads_are_limited_and_what_is_no_photo_is_refused(client, monkeypatch):
    assert client.post("/", files={"photo": ("a.png", b"no photo")}).status_code == 400
    assert client.post("/", data={"photo": "text"}).status_code == 400
    assert client.post("/", content=iter([b"x" * 99])).status_code == 413  # no length said
    monkeypatch.setattr(server, "UPLOAD", 1000)
    assert client.post("/", files={"photo": ("a.png", b"x" * 1001)}).status_code == 413
    assert client.get("/", params={"photo": "99"}).status_code == 400
    assert client.get("/", params={"photo": "x"}).status_code == 400


def test_another_name_than_this_machine_s_is_refused(client, index, tmp_path):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    asked = TestClient(server.application(tmp_path / "index", ["*"]), base_url="http://lan.example")
    assert asked.get("/").status_code == 200


def test_an_index_that_changes_is_read_again(client, photos, tmp_path):
    assert "Search 13 photos" in client.get("/").text
    photo(photos / "new.png", 77)
    Index.from_folder(photos, tmp_path / "index", Words(), progress=False)
    assert "Search 14 photos" in client.get("/").text


# -- a real browser --------------------------------------------------------------------------------------------


@pytest.fixture
def address(index, tmp_path):
    """The server as ``hamlet serve`` runs it, on a free port."""
    uvicorn = pytest.importorskip("uvicorn", reason="the live page needs the extra 'web'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = uvicorn.Server(uvicorn.Config(server.application(tmp_path / "index"), port=port, log_level="error"))
    thread = threading.Thread(target=run.run)
    thread.start()
    while not run.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/"
    run.should_exit = True
    thread.join()


def fits(browser) -> bool:
    return browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def results(browser, count: int) -> list:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(
        lambda b: (found := b.find_elements("css selector", "li img")) and len(found) == count and found
    )


def shown(browser) -> bool:
    """Every picture that was asked for came, and has words for those who do not see it."""
    script = """for (const i of document.images) i.loading = "eager";
    return Promise.all([...document.images].map(i => i.decode())).then(
      () => [...document.images].every(i => i.naturalWidth > 0 && i.alt.length > 5))"""
    return browser.execute_script(script)


def test_the_page_in_a_browser_at_phone_width(browser, index, tmp_path):
    (tmp_path / "page.html").write_text(page.page(index), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert len(results(browser, 13 * 12)) == 156 and shown(browser) and fits(browser)
    assert browser.title == "13 photos searched" and not browser.get_log("browser")
    assert (
        browser.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )


def test_words_by_keyboard_in_a_browser(browser, address):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.get(address)
    for _ in range(3):  # the file, its button, the words
        ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.get_attribute("name") == "words"
    browser.switch_to.active_element.send_keys("red" + Keys.ENTER)
    results(browser, 12)
    assert shown(browser) and fits(browser)
    link = browser.find_element("css selector", "li a")
    link.send_keys(Keys.ENTER)
    results(browser, 12)
    assert "photo=" in browser.current_url and not browser.get_log("browser")


def test_a_dropped_and_a_chosen_photo_in_a_browser(browser, address, photos):
    browser.get(address)
    browser.find_element("css selector", "[type=file]").send_keys(str(photos / "b" / "07.png"))
    results(browser, 12)
    assert browser.find_element("css selector", ".name").text.endswith("b/07.png") and shown(browser)
    content = base64.b64encode((photos / "b" / "09.png").read_bytes()).decode()
    browser.execute_script(
        """const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
        const data = new DataTransfer(); data.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));""",
        content,
    )
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda b: "dropped.png" in b.find_element("css selector", "h2").text)
    assert browser.find_element("css selector", ".name").text.endswith("b/09.png")


def test_a_hostile_name_runs_nothing_in_a_browser(browser, address, index):
    item = next(i for i, path in index.paths.items() if "onerror" in path)
    browser.get(f"{address}?photo={item}")
    results(browser, 12)
    assert (
        not browser.find_elements("css selector", "img[src=x]")
        and "onerror" in browser.find_element("css selector", "h2").text
    )
