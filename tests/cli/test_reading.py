"""Pictures of every common kind are read as they are seen, or refused with the reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deqdiff_fast.cli._invert import read
from deqdiff_fast.cli._output import CommandError

SIZE = 16
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)
COLOURS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)
WIDE = (RAMP * 65535).round().astype(np.uint16)
PALETTE = Image.fromarray(COLOURS).quantize(32)
Turn = Image.Transpose
TURNS = {  # EXIF orientation: how a picture is stored that is to be seen upright
    1: None, 2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE,
    6: Turn.ROTATE_90, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_270,
}  # fmt: skip


def over_white(colours: np.ndarray) -> np.ndarray:
    """What is seen of colours that are as opaque as ALPHA says."""
    return colours * (ALPHA / 255.0) + 255 * (1 - ALPHA / 255.0)


def seen(pixels: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) from 0 to 255 -> (3, H, W) in [-1, 1]."""
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.broadcast_to(planes, (3, SIZE, SIZE)) / 127.5 - 1


def through_palette() -> np.ndarray:
    pixels = np.array(PALETTE.convert("RGB"))
    pixels[np.asarray(PALETTE) == 3] = 255
    return pixels


KINDS = {
    "16 bits.png": (WIDE, 255 * RAMP),
    "16 bits.tif": (WIDE, 255 * RAMP),
    "16 bits.pgm": (WIDE, 255 * RAMP),
    "int32.tif": (WIDE.astype(np.int32), 255 * RAMP),
    "int32 of 8 bits.tif": ((255 * RAMP).astype(np.int32), (255 * RAMP).astype(int)),
    "int32 to its end.tif": ((RAMP * (2**31 - 1)).astype(np.int32), 255 * RAMP),
    "float to 1.tif": (RAMP.astype(np.float32), 255 * RAMP),
    "float to 255.tif": ((255 * RAMP).astype(np.float32), 255 * RAMP),
    "grey.png": (COLOURS[..., 0], COLOURS[..., 0]),
    "black and white.png": (RAMP > 0.5, 255 * (RAMP > 0.5)),
    "colours.bmp": (COLOURS, COLOURS),
    "CMYK.tif": (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
    "alpha.png": (np.concatenate([COLOURS, ALPHA], 2), over_white(COLOURS)),
    "alpha.tif": (np.concatenate([COLOURS, ALPHA], 2), over_white(COLOURS)),
    "grey alpha.png": (np.concatenate([COLOURS[..., :1], ALPHA], 2), over_white(COLOURS[..., :1])),
    "grey alpha.tif": (np.concatenate([COLOURS[..., :1], ALPHA], 2), over_white(COLOURS[..., :1])),
    "grey.gif": (COLOURS[..., 0], COLOURS[..., 0]),
    "black and white.tif": (RAMP > 0.5, 255 * (RAMP > 0.5)),
    "float to 1.pfm": (RAMP.astype(np.float32), 255 * RAMP),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(tmp_path, name):
    stored, expected = KINDS[name]
    (stored if isinstance(stored, Image.Image) else Image.fromarray(stored)).save(tmp_path / name)
    found = read([tmp_path / name], (3, SIZE, SIZE), False)[0].numpy()
    assert abs(found - seen(expected)).max() <= 0.005  # half a 255th
    grey = read([tmp_path / name], (1, SIZE, SIZE), False)[0].numpy()
    luma = np.tensordot([0.299, 0.587, 0.114], seen(expected), 1)
    assert abs(grey[0] - luma).max() <= 0.02


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palettes_with_a_transparent_colour(tmp_path, name):
    PALETTE.save(tmp_path / name, transparency=3)
    assert abs(read([tmp_path / name], (3, SIZE, SIZE), False)[0].numpy() - seen(through_palette())).max() < 1e-9


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("name", "pixels"), [("a.png", WIDE), ("a.tif", COLOURS), ("a.jpg", (255 * RAMP).astype("u1"))]
)
def test_turned_pictures(tmp_path, name, pixels, orientation):
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation]
    stored = picture if turn is None else picture.transpose(turn)
    stored.save(tmp_path / name, exif=exif, **({"quality": 100} if name == "a.jpg" else {}))
    expected = seen(255 * RAMP if pixels is WIDE else pixels.astype(float))
    assert abs(read([tmp_path / name], (3, SIZE, SIZE), False)[0].numpy() - expected).max() < 0.03


def test_tall_pictures_that_are_turned_have_the_turned_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png", exif=exif)
    assert read([tmp_path / "a.png"], (3, 8, 4), False).shape == (1, 3, 8, 4)


def test_tiff_with_black_at_the_end(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(WIDE).save(path)
    data = bytearray(path.read_bytes())
    entry = data.find(struct.pack("<HHIH", 262, 3, 1, 1))  # PhotometricInterpretation: BlackIsZero
    data[entry + 8] = 0
    path.write_bytes(data)
    assert abs(read([path], (3, SIZE, SIZE), False)[0].numpy() + seen(255 * RAMP)).max() < 1e-4


def test_resizing_keeps_what_8_bits_would_lose(tmp_path):
    Image.fromarray(np.repeat(np.repeat(WIDE, 2, 0), 2, 1)).save(tmp_path / "a.png")
    found = read([tmp_path / "a.png"], (3, SIZE, SIZE), True)[0].numpy()
    assert abs(found - seen(255 * RAMP))[:, 2:-2, 2:-2].max() < 0.03
    assert abs(found).max() <= 1


def png(bits: int, kind: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file as its specification has it, of kinds that pillow does not write; rows: (SIZE, bytes)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIZE, SIZE, bits, kind, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*each) for each in chunks) + body + chunk(b"IEND", b"")


def few_bits(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(SIZE, SIZE) values below 2^bits, and the rows of a file with them."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (SIZE, SIZE))
    each = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
    return values, np.packbits(each.reshape(SIZE, -1), axis=1)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits(tmp_path, bits):
    values, rows = few_bits(bits)
    colours = np.random.default_rng(0).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    opaque = np.random.default_rng(1).integers(0, 256, 2**bits, dtype=np.uint8)
    (tmp_path / "grey.png").write_bytes(png(bits, 0, rows))
    (tmp_path / "palette.png").write_bytes(
        png(bits, 3, rows, (b"PLTE", colours.tobytes()), (b"tRNS", opaque.tobytes()))
    )
    share = opaque[values][..., None] / 255
    expected = {"grey": 255 * values / (2**bits - 1), "palette": share * colours[values] + 255 * (1 - share)}
    for name, pixels in expected.items():
        found = read([tmp_path / f"{name}.png"], (3, SIZE, SIZE), False)[0].numpy()
        assert abs(found - seen(pixels)).max() < 0.005


def test_png_of_16_bits(tmp_path):
    """In colours, with transparency, and with one grey value that is transparent."""
    wide, clear = WIDE.astype(">u2"), 3 * SIZE + 5
    colours, alpha = (COLOURS.astype(">u2") * 257).astype(">u2"), (ALPHA.astype(">u2") * 257).astype(">u2")
    grey = 255 * RAMP[..., None]
    one = struct.pack(">H", int(WIDE.flat[clear]))
    files = {
        "colours": (png(16, 2, colours), COLOURS),
        "colours and alpha": (png(16, 6, np.concatenate([colours, alpha], 2).astype(">u2")), over_white(COLOURS)),
        "grey and alpha": (png(16, 4, np.concatenate([wide[..., None], alpha], 2).astype(">u2")), over_white(grey)),
        "grey, one value clear": (
            png(16, 0, wide, (b"tRNS", one)), np.where(np.arange(SIZE**2).reshape(SIZE, SIZE) == clear, 255, 255 * RAMP)
        ),
    }  # fmt: skip
    for name, (data, pixels) in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        found = read([tmp_path / f"{name}.png"], (3, SIZE, SIZE), False)[0].numpy()
        assert abs(found - seen(pixels)).max() <= 0.009, name


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "a.png"])
def test_the_first_of_several_pictures(tmp_path, name):
    frames = [Image.fromarray(np.full((SIZE, SIZE, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    assert abs(read([tmp_path / name], (3, SIZE, SIZE), False) - (10 / 127.5 - 1)).max() < 0.02


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_turns_that_are_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif, icc_profile=b"no profile")
    assert abs(read([tmp_path / "a.png"], (3, SIZE, SIZE), False)[0].numpy() - seen(COLOURS)).max() < 1e-9


def cut(path: Path) -> None:
    Image.fromarray(COLOURS).save(path)
    path.write_bytes(path.read_bytes()[:-300])


def not_a_number(path: Path) -> None:
    Image.fromarray(np.where(RAMP == 0, np.nan, RAMP).astype(np.float32)).save(path)


@pytest.mark.parametrize(
    ("name", "save", "message"),
    [
        (
            "dark.tif",
            lambda p: Image.fromarray((3000 * RAMP).astype(np.int32)).save(p),
            "from 0 to 3000, and nothing says",
        ),
        ("signed.tif", lambda p: Image.fromarray((RAMP - 0.5).astype(np.float32)).save(p), "from -0.5 to 0.5"),
        ("nan.tif", not_a_number, "from nan to nan"),
        ("cut.png", cut, "not a picture that can be read"),
        ("cut.tif", cut, "not a picture that can be read"),
        ("empty.png", Path.touch, "not a picture that can be read"),
        ("huge.png", lambda p: Image.new("1", (20000, 10000)).save(p), "exceeds limit"),
        ("folder.png", Path.mkdir, "that is a folder"),
        ("nothing.png", lambda p: None, "there is no such file"),
    ],
)
def test_refusals(tmp_path, name, save, message):
    save(tmp_path / name)
    with pytest.raises(CommandError, match=message) as caught:
        read([tmp_path / name], (3, SIZE, SIZE), True)
    assert name in str(caught.value)
