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


class Live:
    """The application's state: an index that is read again when it changes, and its model."""

    def __init__(self, folder: Path):
        self.folder, self.index = folder, Index.load(folder)
        self.encoder = self.index.encoder()

    def current(self) -> Index:
        if version(self.folder / FILE) != self.index.version:
            self.index = Index.load(self.folder)
            self.encoder = self.index.encoder()
        return self.index

    def answer(self, heading: str, picture: str, describe: str, query) -> HTMLResponse:
        """describe: "encode" for a picture, "encode_text" for words, which are never taken for the path of a file."""
        index = self.current()
        found = index.query(getattr(self.encoder, describe)([query]), 12)
        return self.html(page.section(heading, picture, found, index, "/photo/{}".format, "/?photo={}".format))

    def html(self, body: str = "", error: str = "", status: int = 200) -> HTMLResponse:
        words = WORDS if self.encoder.knows_words else ""
        told = f'<p class="error" role="alert">{page.html.escape(error)}</p>' if error else ""
        text = f"{FORMS}{words}{told}{body}<script>{DROP}</script>"
        return HTMLResponse(page.render(f"Search {len(self.current()):,} photos", text, ALLOWED), status)

    async def home(self, request: Request) -> HTMLResponse:
        try:
            if request.method == "POST":
                return await self.upload(request)
            if words := request.query_params.get("words"):
                told = await run_in_threadpool(page.as_read, self.encoder, words)
                return await run_in_threadpool(self.answer, told, "", "encode_text", words)
            if chosen := request.query_params.get("photo"):
                item = int(chosen) if chosen.isdecimal() else -1
                path = self.current().photo(item)
                return await run_in_threadpool(self.answer, path.name, f"/photo/{item}", "encode", path)
            return self.html()
        except HamletError as error:
            return self.html(error=str(error), status=400)

    async def upload(self, request: Request) -> HTMLResponse:
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > UPLOAD:
            return self.html(error=f"a photo of at most {UPLOAD >> 20} MB, please", status=413)
        async with request.form(max_files=1, max_fields=1) as form:
            photo = form.get("photo")
            content = await photo.read() if hasattr(photo, "read") else b""
        if not content:
            return self.html(error="no photo came; choose one", status=400)
        name = photo.filename or "photo"
        picture = await run_in_threadpool(page.data_uri, content)
        return await run_in_threadpool(self.answer, name, picture, "encode", content)

    def photo(self, request: Request) -> Response:
        try:
            path = self.current().photo(request.path_params["item"])
        except HamletError:
            return Response("no such photo", 404)
        return Response(page.thumbnail(path), media_type="image/jpeg")


def application(folder: str | Path, hosts: list[str] | None = None) -> Starlette:
    """The web application of an index. hosts: names a browser may call it by (against rebinding), default loopback."""
    live = Live(Path(folder))
    routes = [Route("/", live.home, methods=["GET", "POST"]), Route("/photo/{item:int}", live.photo)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts or HERE)])


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
