import io
import multiprocessing
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from hamlet.data import DataError
from hamlet.data import decode as module
from hamlet.data.decode import ImageError, decode, decode_many, fit, open_image, scan, to_8_bits

RED = Image.new("RGB", (64, 48), (200, 30, 40))


def test_fit_takes_the_centre_square_of_a_wide_and_of_a_tall_image():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200  # the centre square, and nothing else
    assert (fit(Image.fromarray(pixels), 8) == 200).all()
    assert (fit(Image.fromarray(pixels.transpose(1, 0, 2)), 8) == 200).all()


def test_fit_antialiases():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel on, one off: subsampling gives 0 or 255, averaging gives grey
    assert abs(fit(Image.fromarray(stripes), 8).astype(int) - 127).max() < 10


def test_decode_applies_exif_orientation(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # upper half white
    exif = Image.Exif()
    exif[274] = 6  # stored turned: to be shown rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    shown = decode(tmp_path / "turned.png", 16)
    assert (shown[:, 8:] == 255).all() and (shown[:, :8] == 0).all()


def test_decode_modes(tmp_path):
    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return decode(tmp_path / name, 8)

    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "p.png") == (255, 0, 0)).all()
    assert np.abs(saved(red.convert("CMYK"), "c.jpg").astype(int) - (255, 0, 0)).max() <= 3
    assert (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "clear.png") == 255).all()  # white shows through
    assert (saved(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), "full.png") == (255, 0, 0)).all()
    grey16 = Image.fromarray(np.full((8, 8), 32896, np.uint16))  # 128 * 257
    assert (saved(grey16, "16.png") == 128).all()
    assert (saved(Image.new("1", (8, 8), 1), "bit.png") == 255).all()
    assert (saved(Image.new("LA", (8, 8), (7, 255)), "la.png") == 7).all()


def test_large_photo_is_close_to_its_exact_reduction(tmp_path):
    """The decoder's own scaling of big JPEGs stays within a few grey levels of resampling the full image."""
    ramp = np.linspace(0, 255, 640, dtype=np.uint8)
    pixels = np.stack([np.tile(ramp, (640, 1)), np.tile(ramp[:, None], (1, 640)), np.full((640, 640), 90)], 2)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "big.jpg", quality=95)
    exact = fit(Image.open(tmp_path / "big.jpg").convert("RGB"), 16)
    assert np.abs(decode(tmp_path / "big.jpg", 16).astype(int) - exact).max() <= 4


def test_a_big_jpeg_is_scaled_to_four_times_the_size_and_the_rest_is_bicubic(tmp_path):
    """The recipe that is part of a data set's identity, to the last bit."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "big.jpg", quality=95)
    image = Image.open(tmp_path / "big.jpg")
    image.draft(None, (64, 64))
    expected = image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert image.size == (64, 64)
    np.testing.assert_array_equal(decode(tmp_path / "big.jpg", 16), np.asarray(expected))


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.jfif", "a.ppm", "a.jp2", "a.heic", "a.avif", "a.webp", "a.tiff", "a.bmp", "a.gif"]
)
def test_every_format_is_found_and_read(tmp_path, name):
    RED.save(tmp_path / name, format={"jfif": "JPEG"}.get(name[2:]))
    assert scan(tmp_path) == ([name], [])
    assert np.abs(decode(tmp_path / name, 8).astype(int) - (200, 30, 40)).max() <= 4
    assert open_image(tmp_path / name).size == (64, 48)


def test_a_path_its_bytes_the_image_and_its_pixels_give_the_same(tmp_path, picture):
    path = picture(tmp_path / "a.png", 3, (40, 30))
    image = Image.open(path)
    sources = [str(path), path, path.read_bytes(), image, np.asarray(image)]
    assert len({decode(source, 12).tobytes() for source in sources}) == 1
    assert len({open_image(source).tobytes() for source in sources}) == 1
    assert open_image(path).mode == "RGB" and open_image(path).size == (40, 30)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 4, 3)), r"float64 \(4, 4, 3\): expected uint8 or uint16"),
        (np.zeros((4, 0, 3), np.uint8), "expected uint8"),
        (b"GIF", r"image \(bytes\): not an image of a known format"),
        ("/no/such.jpg", r"/no/such\.jpg: No such file"),
        (Image.new("F", (4, 4)), "floating-point"),
        (7, "expected a path"),
    ],
)
def test_what_is_no_image_is_said_in_one_line(source, message):
    with pytest.raises(ImageError, match=message) as error:
        decode(source, 8)
    assert "\n" not in str(error.value)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        shown = decode(tmp_path / name, 8)
        assert (shown[..., 0] > 240).all() and (shown[..., 2] < 15).all()


def test_depth_by_hand():
    assert to_8_bits(np.array([0, 65535, 32896])).tolist() == [0, 255, 128]
    assert to_8_bits(np.array([0, 4095, 2048])).tolist() == [0, 255, 127]  # 12 bits
    assert to_8_bits(np.array([0, 900])).tolist() == [0, 900 * 255 // 1023]  # 10 bits, as far as the data tell
    assert to_8_bits(np.array([0, 900]), 12).tolist() == [0, 900 * 255 // 4095]  # 12 bits, as the file says
    assert to_8_bits(np.array([0, 65535]), 12).tolist() == [0, 255]  # stretched to 16 bits, as PNG advises
    assert to_8_bits(np.array([0, 200])).tolist() == [0, 200]
    with pytest.raises(ValueError, match=r"outside 0\.\.65535"):
        to_8_bits(np.array([-1, 5]))


def png(values: np.ndarray, significant: int | None = None) -> bytes:
    """A 16-bit PNG, grey (H, W) or colour (H, W, 3), written by hand with or without sBIT."""
    channels = 1 if values.ndim == 2 else 3
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if significant:
        chunks.insert(1, (b"sBIT", bytes([significant] * channels)))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_twelve_bits_in_a_sixteen_bit_png_are_not_black(shape):
    assert (decode(png(np.full(shape, 4095)), 8) == 255).all()
    assert (decode(png(np.full(shape, 1000), 12), 8) == 1000 * 255 // 4095).all()
    assert (decode(png(np.full(shape, 32896)), 8) == 128).all()
    assert (decode(png(np.full(shape, 65535), 12), 8) == 255).all()


def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded():
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13300, 13300, 8, 6, 0, 0, 0))
    packed = zlib.compress(bytes(1000))
    tracemalloc.start()
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ImageError, match="13300 x 13300 px, more"):
        decode(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b""), 64)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "LARGE", 100)
    at_once, most = [], []
    rgb = module._rgb

    def watched(*arguments):
        at_once.append(1)
        most.append(len(at_once))
        result = rgb(*arguments)
        at_once.pop()
        return result

    monkeypatch.setattr(module, "_rgb", watched)
    buffer = io.BytesIO()
    Image.effect_noise((256, 256), 90).convert("RGB").save(buffer, "PNG")
    assert len(list(decode_many([buffer.getvalue()] * 24, 16))) == 24
    assert len(most) == 24 and max(most) == 1


def test_decode_many_keeps_the_order_and_yields_the_faults(tmp_path, picture):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(9)]
    paths[4].write_bytes(b"")
    results = list(decode_many(iter(paths), 8, ahead=2))
    assert isinstance(results[4], ImageError) and results[4].reason == "not an image of a known format"
    for i in {*range(9)} - {4}:
        assert np.array_equal(results[i], decode(paths[i], 8))


def test_scan_says_what_it_leaves_out_and_does_not_hang(tmp_path, picture):
    for name in ("a/1.jpg", "a/.thumbs/1.jpg", "a/@eaDir/1.jpg", "__MACOSX/1.jpg", ".hidden.jpg", "b/c/2.PNG"):
        picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("words")
    (tmp_path / "captions.csv").write_text("file,caption\n")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "early").symlink_to(tmp_path / "b" / "c")  # read after the real folder, whatever its name
    (tmp_path / "hollow").mkdir()
    os.close(os.open(os.fsencode(tmp_path / "b") + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    files, excluded = scan(tmp_path)
    assert files == ["a/1.jpg", "b/c/2.PNG", os.fsdecode(b"b/\xff.png")]
    assert dict(excluded) == {
        "a/notes.txt": "not an image: .txt extension",
        "a/pipe.jpg": "not a regular file",
        "a/gone.jpg": "link to nothing",
        "a/self.jpg": "unreadable link: Too many levels of symbolic links",
        "early": "link to a folder already read",
        "hollow": "empty folder",
    }
    with pytest.raises(ImageError, match="not a regular file"):
        decode(tmp_path / "a" / "pipe.jpg", 8)
    with pytest.raises(DataError, match="cannot be read"):
        scan(tmp_path / "absent")


def _scan_as_nobody(root, found) -> None:
    os.setgid(65534)
    os.setuid(65534)
    found.put(scan(root))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody who may not read")
def test_an_unreadable_folder_is_listed(tmp_path_factory, picture):
    root = tmp_path_factory.mktemp("photos")
    for part in (root, *root.parents[:3]):
        part.chmod(part.stat().st_mode | 0o055)
    picture(root / "open" / "1.jpg")
    picture(root / "shut" / "1.jpg")
    (root / "shut").chmod(0)
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    worker = context.Process(target=_scan_as_nobody, args=(root, found))
    worker.start()
    assert found.get(timeout=20) == (["open/1.jpg"], [("shut", "unreadable folder: Permission denied")])
    worker.join(20)
