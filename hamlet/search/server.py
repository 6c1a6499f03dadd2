"""The page live: drop a photo, type words, follow a photo to more like it. Only the index's own photos are served."""

import base64
import hashlib
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from hamlet.errors import HamletError
from hamlet.search import page
from hamlet.search.index import FILE, Index, version

UPLOAD = 32 << 20  # bytes; the largest photos of a phone are about 15 MB
HERE = ["127.0.0.1", "localhost"]
DROP = """
addEventListener("dragover", e => e.preventDefault());
addEventListener("drop", e => { e.preventDefault(); if (e.dataTransfer.files.length) send(e.dataTransfer.files); });
const file = document.querySelector("[type=file]");
const send = files => { file.files = files; file.form.submit(); };
file.addEventListener("change", () => file.form.submit());
"""
ALLOWED = f"'sha256-{base64.b64encode(hashlib.sha256(DROP.encode()).digest()).decode()}'"
FORMS = """<form method="post" enctype="multipart/form-data"><label>Drop a photo anywhere, or choose one:
<input type="file" name="photo" accept="image/*" required></label><button>Search by photo</button></form>"""
WORDS = """<form method="get"><label>Words: <input name="words" required maxlength="500"></label>
<button>Search by words</button></form>"""


def number(text: str) -> int:
    """The number that a text holds; -1 for what is none, or longer than any that is used here."""
    return int(text) if text.isdecimal() and len(text) < 19 else -1


class Live:
    """The application's state: an index that is read again when it changes, and its model."""

    def __init__(self, folder: Path):
        self.folder, self.index = folder, Index.load(folder)
        self.encoder = self.index.encoder()

    def current(self) -> Index:
        if version(self.folder / FILE) != self.index.version:
            index = Index.load(self.folder)
            self.index, self.encoder = index, index.encoder()  # together: others ask meanwhile
        return self.index

    def answer(self, heading: str, query: str | bytes | Path) -> HTMLResponse:
        """What is found for a photo, or for words (str), which are never taken for the path of a file."""
        index, photo = self.current(), None if isinstance(query, str) else query
        rows = self.encoder.encode([photo]) if photo else self.encoder.encode_text([query])
        return self.html(page.section(heading, photo, index.query(rows, 12), index, live=True))

    def html(self, body: str = "", error: str = "", status: int = 200) -> HTMLResponse:
        words = WORDS if self.encoder.knows_words else ""
        told = f'<p class="error" role="alert">{page.html.escape(error)}</p>' if error else ""
        text = f"{FORMS}{words}{told}{body}<script>{DROP}</script>"
        return HTMLResponse(page.render(f"Search {len(self.current()):,} photos", text, ALLOWED), status)

    def refused(self, request: Request, error: HamletError) -> HTMLResponse:
        return self.html(error=str(error), status=400)

    def home(self, request: Request) -> HTMLResponse:
        if words := request.query_params.get("words"):
            return self.answer(page.as_read(self.encoder, words), words)
        if chosen := request.query_params.get("photo"):
            path = self.current().photo(number(chosen))
            return self.answer(path.name, path)
        return self.html()

    async def upload(self, request: Request) -> HTMLResponse:
        if not 0 <= number(request.headers.get("content-length", "")) <= UPLOAD:
            return self.html(error=f"a photo of at most {UPLOAD >> 20} MB, please", status=413)
        async with request.form(max_files=1, max_fields=1) as form:
            photo = form.get("photo")
            content = await photo.read() if hasattr(photo, "read") else b""
        if not content:
            raise HamletError("no photo came; choose one")
        return await run_in_threadpool(self.answer, photo.filename or "photo", content)

    def photo(self, request: Request) -> Response:
        index, item = self.current(), number(request.path_params["item"])
        if item not in index.paths:
            return Response("no such photo", 404)
        return Response(page.thumbnail(index.photo(item)), media_type="image/jpeg")


def application(folder: str | Path, hosts: list[str] | None = None) -> Starlette:
    """The web application of an index. hosts: names a browser may call it by (against rebinding), default loopback."""
    live = Live(Path(folder))
    upload, photo = Route("/", live.upload, methods=["POST"]), Route("/photo/{item}", live.photo)
    known = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts or HERE)]
    return Starlette(False, [Route("/", live.home), upload, photo], known, {HamletError: live.refused})


def serve(folder: str | Path, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until Ctrl-C; on other machines' networks only where ``host`` asks for it."""
    import uvicorn

    if not 0 <= port < 1 << 16:
        raise HamletError(f"port {port}: expected 0 (any that is free) to 65535")
    served = application(folder, HERE if host in HERE else ["*"])
    config = uvicorn.Config(served, host=host, port=port, log_level="warning")
    listening = config.bind_socket()  # ends here, in a line, where the address cannot be had
    print(f"http://{host}:{listening.getsockname()[1]}  (Ctrl-C stops it)", flush=True)
    uvicorn.Server(config).run(sockets=[listening])
