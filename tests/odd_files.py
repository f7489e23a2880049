"""A folder of odd and broken image files, each written by hand or by Pillow, for several tests.

Most good ones show the same 64x32 picture: red, green, blue and white quarters of 32x16.
"""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

pillow_heif.register_heif_opener()  # to write such files

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0),
)  # fmt: skip
COLOURS = (RED, GREEN, BLUE, WHITE)
LUMA = tuple((v,) * 3 for v in (76, 150, 29, 255))  # .299 R + .587 G + .114 B
# A gray ramp, exact in 8 bits: 16-bit levels are 257 times these.
GRAYS = tuple((v,) * 3 for v in (0, 60, 128, 255))
Four = tuple[tuple[int, ...], ...]


def quarters(colours: Four, mode: str = "RGB") -> Image.Image:
    """The picture: (top left, top right, bottom left, bottom right)."""
    image = Image.new(mode, (64, 32))
    for k, colour in enumerate(colours):
        x, y = 32 * (k % 2), 16 * (k // 2)
        image.paste(colour if len(colour) > 1 else colour[0], (x, y, x + 32, y + 16))
    return image


def gray_array(dtype: str, values: tuple[float, ...]) -> np.ndarray:
    return np.kron(np.array(values).reshape(2, 2), np.ones((16, 32))).astype(dtype)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG from its parts; colour is 0 gray, 2 RGB, 3 palette."""
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def png_rows(array: np.ndarray) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in array)


def tiff(size: tuple[int, int], pixels: bytes, tags: dict[int, int]) -> bytes:
    """An uncompressed little-endian TIFF of one strip; tags override or add SHORT values."""
    tags = {256: size[0], 257: size[1], 258: 8, 259: 1, 262: 1, 277: 1, 278: size[1]} | tags
    tags |= {273: 0, 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHIHH", t, 3, 1, v, 0) for t, v in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + pixels


def good_files() -> dict[str, tuple[bytes, tuple[int, int], Four]]:
    """Contents of each file that a viewer shows, with its (width, height) and quarters there."""
    picture, grays = quarters(COLOURS), quarters(GRAYS).convert("L")
    size, files = picture.size, {}

    def add(name: str, data: bytes, colours: Four = COLOURS, size: tuple[int, int] = size) -> None:
        files[name] = (data, size, colours)

    # Modes of eight bits.
    add("plain.jpg", encoded(picture, "JPEG"))
    add("progressive.jpeg", encoded(picture, "JPEG", progressive=True))
    add("gray.jpg", encoded(grays, "JPEG"), GRAYS)
    add("gray.png", encoded(grays, "PNG"), GRAYS)
    add(
        "one_bit.png", encoded(quarters((WHITE, BLACK) * 2).convert("1"), "PNG"), (WHITE, BLACK) * 2
    )
    add("palette.png", encoded(picture.quantize(), "PNG"))
    add("cmyk.jpg", encoded(picture.convert("CMYK"), "JPEG"))
    add("cmyk.tif", encoded(picture.convert("CMYK"), "TIFF"))
    add("ycbcr.tif", encoded(picture.convert("YCbCr"), "TIFF"))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    mid = ((200, 80, 60), (60, 160, 90), (70, 80, 180), (128, 128, 128))  # in every gamut
    lab = ImageCms.profileToProfile(quarters(mid), *profiles, outputMode="LAB")
    add("lab.tif", encoded(lab, "TIFF"), mid)
    for kind in ("bmp", "webp", "ppm"):
        add(f"plain.{kind}", encoded(picture, kind, **({"quality": 95} if kind == "webp" else {})))

    for name, kind, options in (
        ("plain.jfif", "JPEG", {}),
        ("plain.jpe", "JPEG", {}),
        ("plain.gif", "GIF", {}),
        ("gray.gif", "GIF", {}),
        ("plain.jp2", "JPEG2000", {}),
        ("plain.avif", "AVIF", {"quality": 95}),
        ("plain.heic", "HEIF", {"quality": 95}),
        ("plain.heif", "HEIF", {"quality": 95}),
        ("heic_called.jpg", "HEIF", {"quality": 95}),
    ):
        gray = name.startswith("gray")
        add(name, encoded(grays if gray else picture, kind, **options), GRAYS if gray else COLOURS)

    # More than eight bits.
    deep = tuple(257 * gray[0] for gray in GRAYS)
    words = gray_array("<u2", deep)
    ten = pillow_heif.from_bytes("RGB;16", size, np.repeat(words, 3, axis=1).tobytes())
    ten.save(buffer := BytesIO(), quality=95)
    add("rgb10.heic", buffer.getvalue(), GRAYS)
    add("gray16.png", encoded(Image.fromarray(words), "PNG"), GRAYS)
    add("gray16.tif", encoded(Image.fromarray(words), "TIFF"), GRAYS)
    add("gray16_big_endian.tif", encoded(Image.fromarray(words.astype(">u2")), "TIFF"), GRAYS)
    add("gray16.pgm", b"P5 64 32 65535\n" + words.astype(">u2").tobytes(), GRAYS)
    inverted = (65535 - words).astype("<u2").tobytes()
    add("gray16_white_is_zero.tif", tiff(size, inverted, {258: 16, 262: 0}), GRAYS)
    twelve = gray_array("u2", tuple(v // 16 for v in deep)).ravel()
    low, high = twelve[::2], twelve[1::2]
    packed = np.stack([low >> 4, (low & 15) << 4 | high >> 8, high & 255], 1).astype(np.uint8)
    add("gray12.tif", tiff(size, packed.tobytes(), {258: 12}), GRAYS)
    rgb = np.asarray(picture).astype(">u2") * 257
    add("rgb16.png", png(size, 16, 2, png_rows(rgb)))
    clear = chunk(b"tRNS", struct.pack(">H", 0))
    add(
        "gray16_clear.png",
        png(size, 16, 0, png_rows(words.astype(">u2")), clear),
        (WHITE, *GRAYS[1:]),
    )
    signed = gray_array("i4", (-1000, -1000 + 60 * 40, -1000 + 128 * 40, -1000 + 255 * 40))
    add("int32.tif", encoded(Image.fromarray(signed), "TIFF"), GRAYS)
    add("float_wide.tif", encoded(Image.fromarray(signed.astype("f4")), "TIFF"), GRAYS)
    dim = gray_array("f4", (0.0, 60 / 255, 128 / 255, 128 / 255))
    add("float_of_one.tif", encoded(Image.fromarray(dim), "TIFF"), (*GRAYS[:3], GRAYS[2]))
    dim[:16, :32] = np.nan
    add("float_nan.tif", encoded(Image.fromarray(dim), "TIFF"), (*GRAYS[:3], GRAYS[2]))

    # Transparent: the blue quarter is clear, the white one half so; a viewer shows them on white.
    alpha = gray_array("u1", (255, 255, 0, 255))
    shown = (RED, GREEN, WHITE, WHITE)
    rgba = picture.copy()
    rgba.putalpha(Image.fromarray(alpha))
    add("alpha.png", encoded(rgba, "PNG"), shown)
    add("alpha.webp", encoded(rgba, "WEBP", lossless=True), shown)
    half = picture.copy()
    half.putalpha(Image.fromarray(gray_array("u1", (255, 128, 0, 255))))
    add("half_alpha.tif", encoded(half, "TIFF"), (RED, (127, 255, 127), WHITE, WHITE))
    gray_alpha = grays.copy()
    gray_alpha.putalpha(Image.fromarray(alpha))
    add("gray_alpha.png", encoded(gray_alpha, "PNG"), (*GRAYS[:2], WHITE, WHITE))
    # Premultiplied (ExtraSamples 1).
    pairs = np.stack([gray_array("u1", (0, 60, 0, 64)), gray_array("u1", (255, 255, 0, 128))], -1)
    premultiplied = tiff(size, pairs.tobytes(), {277: 2, 338: 1})
    # Two values of eight bits fit into the tag itself.
    premultiplied = premultiplied.replace(
        struct.pack("<HHIHH", 258, 3, 1, 8, 0), struct.pack("<HHIHH", 258, 3, 2, 8, 8)
    )
    add("gray_premultiplied.tif", premultiplied, (*GRAYS[:2], WHITE, (191, 191, 191)))
    add("clear_colour.png", encoded(picture, "PNG", transparency=BLUE), shown)
    palette = picture.quantize()
    blue = palette.getpixel((0, 31))
    add("clear_palette.png", encoded(palette, "PNG", transparency=blue), shown)
    for name in ("clear_palette.gif.png", "clear_palette.gif"):
        add(name, encoded(palette, "GIF", transparency=blue), shown)
    for kind in ("avif", "heif"):
        add(f"alpha.{kind}", encoded(rgba, kind, quality=95), shown)

    # Several frames or pages, of which the first is shown.
    black = Image.new("RGB", size)
    several = {"save_all": True, "append_images": [black, black]}
    for name in ("animated.gif.png", "animated.gif"):
        add(name, encoded(picture, "GIF", duration=50, **several))
    add("animated.avif", encoded(picture, "AVIF", duration=50, quality=95, **several))
    add("burst.heic", encoded(picture, "HEIF", quality=95, **several))
    add("animated.webp", encoded(picture, "WEBP", lossless=True, **several))
    add("animated.png", encoded(picture, "PNG", **several))
    add("pages.tif", encoded(picture, "TIFF", **several))
    add("stereo.jpg", encoded(picture, "MPO", **several))

    # Turned by their metadata; what is stored is what the turn undoes.
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    for orientation, undo in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = picture.transpose(undo)
        add(f"exif_{orientation}.jpg", encoded(stored, "JPEG", exif=exif))
    exif[0x0112] = 6
    add("exif.png", encoded(picture.transpose(turns[6]), "PNG", exif=exif))
    add("exif.tif", encoded(picture.transpose(turns[6]), "TIFF", exif=exif))
    for kind in ("avif", "heif"):
        data = encoded(picture.transpose(turns[6]), kind, exif=exif.tobytes(), quality=95)
        add(f"exif.{kind}", data)

    # Names, metadata and shapes.
    plain = encoded(picture, "JPEG")
    add("png_called.jpg", encoded(picture, "PNG"))
    add("jpeg_called.png", plain)
    add("Näme mit Leerzeichen.JPEG", plain)
    add("junk_behind.jpg", plain + b"appended by a camera" * 50)
    broken = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0\0\0"
    app1 = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    add("broken_exif.jpg", plain[:2] + app1 + plain[2:])
    for width, height in ((1, 1), (1, 300), (3000, 1)):
        flat = Image.new("RGB", (width, height), RED)
        add(f"shape_{width}x{height}.png", encoded(flat, "PNG"), (RED,) * 4, flat.size)
    return files


def bad_files() -> dict[str, bytes]:
    """Contents of each file that is no image, or not a whole one."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    files = {}
    for kind in ("jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm"):
        whole = encoded(noise, kind)
        files[f"cut.{kind.replace('gif', 'gif.png')}"] = whole[: len(whole) * 2 // 3]
    whole = encoded(noise, "JPEG")
    for kind in ("avif", "heif", "jp2"):
        whole_file = encoded(noise, kind.replace("jp2", "JPEG2000"))
        files[f"cut_half.{kind}"] = whole_file[: len(whole_file) // 2]
        files[f"cut_in_header.{kind}"] = whole_file[:100]
    files["film.heic"] = b"\0\0\0\x18ftypmp42" + bytes(500)
    files["cut_at_end.jpg"] = whole[:-20]
    files["cut_in_header.jpg"] = whole[:200]
    files["cut_packed.tif"] = encoded(noise, "TIFF", compression="tiff_lzw")[:-500]
    files["zeros_behind.jpg"] = whole[: len(whole) // 2] + bytes(len(whole) // 2)
    files["empty.jpg"] = b""
    files["zeros.jpg"] = bytes(5000)
    files["text.jpg"] = b"this is a note and no photograph\n" * 9
    files["page.jpg"] = b"<!DOCTYPE html><html><body>404 not found</body></html>"
    files["drawing.png"] = b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>'
    files["script.jpg"] = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    whole = encoded(noise, "PNG")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    files["bit_flipped.png"] = bytes(flipped)
    files["sum_wrong.png"] = whole[:-16] + bytes([whole[-16] ^ 1]) + whole[-15:]
    files["no_end.png"] = whole[:-12]
    # The sum is right, the compressed data are not.
    rows = zlib.compress(bytes(33 * 32))
    flat = png((32, 32), 8, 0, b"")
    files["stream_broken.png"] = flat.replace(
        chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", rows[:8] + b"\xff" * 8)
    )
    files["no_palette.png"] = png((4, 4), 8, 3, png_rows(np.zeros((4, 4), np.uint8)))
    files["no_width.png"] = png((0, 4), 8, 0, b"\0" * 4)
    # One row over the limit, and far above it.
    files["bomb.png"] = png((13_000, 13_766), 1, 0, (b"\0" * 1626) * 13_766)
    files["bomb_far.png"] = png((50_000, 50_000), 1, 0, b"")
    return files


def odd_files(folder: Path) -> dict[str, str]:
    """Write them all, and say of each that `ImageFolder` would list whether it is good or bad.

    Beside them lie a note and a folder that is called like an image, which nobody lists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "folder.jpg").mkdir()
    (folder / "notes.txt").write_text("no image")
    kinds = {}
    for name, (data, _, _) in good_files().items():
        (folder / name).write_bytes(data)
        kinds[name] = "good"
    for name, data in bad_files().items():
        (folder / name).write_bytes(data)
        kinds[name] = "bad"
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    return kinds | dict.fromkeys(("dangling.jpg", "circle.jpg", "pipe.jpg"), "bad")
