"""Screenshots of the page, the live search and duplicates, made by the commands themselves in a headless Chromium.

    python docs/screenshots.py                 # a hundred photos of the Grocery Store Dataset
    python docs/screenshots.py --photos DIR    # other photos

Writes docs/images/*.png, each below 300 KB. Needs chromium, chromedriver and the extras "web" and "test".
"""

import argparse
import html
import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver

from hamlet.data.decode import open_image, scan
from hamlet.paths import ROOT, data_roots
from hamlet.search import Index, page

IMAGES, LIMIT, PORT = ROOT / "docs" / "images", 300_000, 8123
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking hide-scrollbars"


def choose(source: Path | None, folder: Path) -> list[Path]:
    """Copy photos spread over a folder's classes, and a smaller, recompressed copy of three of them."""
    source = source or next(p for r in data_roots() if (p := r / "GroceryStoreDataset/dataset/test/Fruit").is_dir())
    names = scan(source)[0]
    chosen = [names[i * len(names) // 100] for i in range(100)] if len(names) > 100 else names
    for name in chosen:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    for name in chosen[10:90:27]:
        picture = open_image(source / name)
        (folder / "from the phone").mkdir(exist_ok=True)
        small = picture.resize((picture.width // 2, picture.height // 2))
        small.save(folder / "from the phone" / f"{Path(name).stem}.jpg", quality=85)
    return [folder / name for name in chosen]


def hamlet(*words: str | Path) -> str:
    command = [sys.executable, "-m", "hamlet", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def store(browser: webdriver.Chrome, name: str, width: int, height: int) -> None:
    browser.set_window_size(width, height)
    time.sleep(1)
    picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    for scale in (1.0, 0.85, 0.7, 0.6, 0.5):
        small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        small.quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
        if (IMAGES / f"{name}.png").stat().st_size < LIMIT:
            break


def groups(index: Index, told: str) -> str:
    """What `hamlet duplicates` printed, with the photos."""
    rows = ""
    for group in index.duplicates(0.97):
        pictures = (
            f'<li><img src="{page.data_uri(index.photo(i))}" alt=""><span class="name">{index.paths[i]}</span></li>'
            for i in group
        )
        rows += f"<ol>{''.join(pictures)}</ol>"
    return page.render("$ hamlet duplicates fruit-index", f"{rows}<p>{html.escape(told.splitlines()[-1])}</p>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    given = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder:
        for flag in (*FLAGS.split(), f"user-data-dir={folder}/browser"):
            options.add_argument(f"--{flag}")
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        photos, index, file = Path(folder, "fruit"), Path(folder, "fruit-index"), Path(folder, "page.html")
        chosen = choose(given.photos, photos)
        print(hamlet("index", photos, index))
        hamlet("page", index, file, "--queries", chosen[5], chosen[48], chosen[70])
        browser.get(file.as_uri())
        store(browser, "page", 1000, 900)
        Path(folder, "groups.html").write_text(groups(Index.load(index), hamlet("duplicates", index)), encoding="utf-8")
        browser.get(Path(folder, "groups.html").as_uri())
        store(browser, "duplicates", 800, 900)
        server = subprocess.Popen([sys.executable, "-m", "hamlet", "serve", index, "--port", str(PORT)], cwd=ROOT)
        try:
            for _ in range(120):
                time.sleep(1)
                try:
                    browser.get(f"http://127.0.0.1:{PORT}/")
                    break
                except Exception:  # not up yet
                    continue
            browser.find_element("css selector", "[type=file]").send_keys(str(chosen[30]))
            browser.implicitly_wait(60)
            browser.find_element("css selector", "li img")
            time.sleep(2)
            store(browser, "live", 1000, 900)
            store(browser, "phone", 390, 800)
            browser.get(f"http://127.0.0.1:{PORT}/?words=a+bunch+of+bananas")
            store(browser, "words", 1000, 900)
        finally:
            server.terminate()
            browser.quit()


if __name__ == "__main__":
    main()
