"""Images from files: one way to find, open and decode them, for data sets and for search alike.

Recipe: first frame, EXIF orientation applied, transparency laid on white, grey or colour of more than 8 bits scaled
from its true depth (see :func:`to_8_bits`), RGB. ``decode`` then resamples the centre square of side min(width, height)
to size x size (Pillow bicubic, antialiased): "shorter side to ``size``, centre crop" in one resampling. A JPEG whose
sides are both 8 x size or more is first scaled down by the decoder, to no less than 4 x size. Files are described
by their content, whatever their extension says; HEIC comes from pillow-heif, the rest from Pillow.
"""

import io
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
import pillow_heif
from PIL import ExifTags, Image, ImageOps

from hamlet.errors import DataError

pillow_heif.register_heif_opener()

RECIPE = f"centre-square bicubic white 2 / Pillow {PIL.__version__}"
MAX_PIXELS = 100_000_000  # decoded pixels of one image; 98 megapixels with transparency took 1.3 GB
LARGE = 16_000_000  # images above are decoded one at a time, so that several do not meet in memory
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm "  # noqa: SIM905
    ".jp2 .j2k .jpx .heic .heif .hif .avif".split()
)
LITTER = frozenset(("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "#recycle"))
TABLES = ("captions.csv", "labels.csv")  # beside the images of a data set, and no images
Source = str | os.PathLike | bytes | Image.Image | np.ndarray
_large = threading.Lock()


class ImageError(DataError):
    """An image that cannot be used: ``reason`` says why, the message begins with the file's name."""

    def __init__(self, name: str, reason: str):
        self.reason = reason
        super().__init__(f"{name}: {reason}; replace or remove it")


def scan(root: str | os.PathLike) -> tuple[list[str], list[tuple[str, str]]]:
    """Image files below ``root`` and what was left out as (path, reason); paths relative, with "/", sorted.

    An image is a regular file with one of EXTENSIONS. Not looked at: hidden names (a leading dot), LITTER of file
    managers, and TABLES in ``root``. Links are followed, after all real folders; a folder already read under
    another name is left out, so a loop of links ends. A name that is not UTF-8 holds surrogates (``os.fsencode``
    gives its bytes). Raises DataError if ``root`` itself cannot be read.
    """
    root, files, excluded, seen = Path(root), [], [], set()
    real, linked = deque([root]), deque()
    while real or linked:
        folder = (real or linked).popleft()
        relative = folder.relative_to(root).as_posix()
        try:
            info, entries = folder.stat(), sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise DataError(f"{root}: cannot be read ({error.strerror}); name a folder of images") from error
            excluded.append((relative, f"unreadable folder: {error.strerror}"))
            continue
        if (info.st_dev, info.st_ino) in seen:
            excluded.append((relative, "link to a folder already read"))
            continue
        seen.add((info.st_dev, info.st_ino))
        entries = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LITTER]
        if not entries and folder != root:
            excluded.append((relative, "empty folder"))
        for entry in entries:
            path = Path(entry.path).relative_to(root).as_posix()
            reason = _left_out(entry)
            if reason is None:
                files.append(path)
            elif reason == "folder":
                (linked if entry.is_symlink() else real).append(Path(entry.path))
            elif path not in TABLES:
                excluded.append((path, reason))
    return sorted(files), excluded


def _left_out(entry: os.DirEntry) -> str | None:
    """Why an entry is no image: "folder" for folders, None for what looks like an image."""
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "link to nothing" if entry.is_symlink() else "not a regular file"
    except OSError as error:
        return f"unreadable link: {error.strerror}"
    suffix = os.path.splitext(entry.name)[1].lower()
    return None if suffix in EXTENSIONS else f"not an image: {suffix or 'no'} extension"


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Centre square of an RGB image, resampled to uint8 (size, size, 3)."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def to_8_bits(values: np.ndarray, significant: int | None = None) -> np.ndarray:
    """Integers in 0..65535 as uint8, scaled from the depth that they have in truth: v * 255 // (2^depth - 1).

    Cameras and microscopes store 10 to 14 bits in 16-bit files, as they are. ``significant`` is what a PNG says of
    itself (its sBIT chunk): the depth, where all values fit into so many bits; otherwise the values were stretched
    to 16. Without it the depth is the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value.
    """
    values = values.astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels of {low} to {high}, outside 0..65535")
    depths = (8, 10, 12, 14, 16) if significant is None else (significant, 16)
    depth = next(d for d in depths if high < 1 << d)
    return (values * 255 // ((1 << depth) - 1)).astype(np.uint8)


def _colour_16(file: io.BufferedIOBase, significant: int | None) -> Image.Image:
    """A PNG of 16-bit colour through torchvision, the one library here that keeps all its bits."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    colour, alpha = to_8_bits(values[..., :3], significant), values[..., 3:] >> 8
    return Image.fromarray(np.concatenate([colour, alpha.astype(np.uint8)], axis=2))


def _rgb(image: Image.Image, size: int | None, significant: int | None = None) -> Image.Image | np.ndarray:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # without the test, a copy of every image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion would clip them at 255
        image = Image.fromarray(to_8_bits(np.asarray(image), significant))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save as 8 or 16 bit")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if size is None else fit(image, size)


def _from_file(file: io.BufferedIOBase, size: int | None) -> Image.Image | np.ndarray:
    head = file.read(4096).split(b"IDAT")[0]
    file.seek(0)
    said = re.match(rb"(?s)\x89PNG.*?\0\0\0[\1-\4]sBIT(.)", head)
    significant = said and said[1][0]
    with Image.open(file) as image:
        if size is not None:
            image.draft(None, (4 * size, 4 * size))  # JPEG only: the decoder scales
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} px, more than {MAX_PIXELS // 10**6} megapixels")
        with _large if pixels > LARGE else nullcontext():
            if re.match(rb"(?s)\x89PNG.{20}\x10[\2\6]", head):  # 16-bit colour, which Pillow cuts to its high bytes
                exif, image = image.info.get("exif"), _colour_16(file, significant)
                image.info |= {"exif": exif} if exif else {}
            result = _rgb(image, size, significant)
            image.close()  # its memory goes before the next large one begins
            return result


def _from_array(array: np.ndarray) -> Image.Image:
    shape, kind = array.shape, array.dtype.name
    if 0 in shape or kind not in ("uint8", "uint16") or (shape[2:] or (3,)) not in ((3,), (4,)) or len(shape) < 2:
        raise ValueError(f"{kind} {shape}: expected uint8 or uint16 (H, W), (H, W, 3) or (H, W, 4)")
    return Image.fromarray(array if kind == "uint8" else to_8_bits(array))


def _read(source: Source, size: int | None) -> Image.Image | np.ndarray:
    named = isinstance(source, str | os.PathLike)
    name = os.fsencode(source).decode(errors="replace") if named else f"image ({type(source).__name__})"
    try:
        if named and not stat.S_ISREG(os.stat(source).st_mode):
            raise ValueError("not a regular file")  # a named pipe would block for ever
        if named or isinstance(source, bytes):
            with open(source, "rb") if named else io.BytesIO(source) as file:
                return _from_file(file, size)
        if not isinstance(source, Image.Image | np.ndarray):
            raise ValueError("expected a path, bytes, a PIL image or an array")
        return _rgb(_from_array(source) if isinstance(source, np.ndarray) else source, size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many types; the reason is always reported
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # its message names the file once more
        raise ImageError(name, "not an image of a known format" if unknown else reason) from error


def open_image(source: Source) -> Image.Image:
    """An image as PIL RGB at its own size, from a path, an encoded file's bytes, a PIL image or an array.

    Arrays are uint8 or uint16, (H, W), (H, W, 3) or (H, W, 4). Raises ImageError with the name and the reason.
    """
    return _read(source, None)


def decode(source: Source, size: int) -> np.ndarray:
    """An image as uint8 (size, size, 3), RGB, by the module's recipe; sources and errors of :func:`open_image`."""
    return _read(source, size)


def decode_many(sources: Iterable[Source], size: int, ahead: int = 128) -> Iterator[np.ndarray | ImageError]:
    """``decode`` of each in order, by threads (Pillow frees the lock), at most ``ahead`` in memory.

    What does not decode is yielded as its ImageError, not raised.
    """

    def attempt(source: Source) -> np.ndarray | ImageError:
        try:
            return decode(source, size)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(min(8, cores())) as pool:
        begun = (pool.submit(attempt, source) for source in sources)
        waiting = deque(islice(begun, ahead))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(islice(begun, 1))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
