"""Reading pictures: every mode and form, and everything that can be wrong with a file."""

import base64
import io

import numpy as np
import pytest
import vision_samples as samples

from qwen_jax.prompt import image_files

pytest.importorskip("PIL", reason="needs the extra 'vision'")

from PIL import Image

NAME = "messages[0].content[1]"


def read(source) -> np.ndarray:
    return image_files.read_picture(source, NAME)


def picture(mode: str = "RGB"):
    return Image.fromarray(samples.noise(40, 60, 3, seed=5)).convert(mode)


# ---- forms -----------------------------------------------------------------------------------


def test_path_file_url_data_url_bytes_image_and_array_give_the_same_pixels(tmp_path):
    image = picture()
    raw = samples.encoded(image, "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(raw)
    code = base64.b64encode(raw).decode()
    for source in (
        image,
        np.asarray(image),
        raw,
        bytearray(raw),
        path,
        str(path),
        path.as_uri(),
        f"data:image/png;base64,{code}",
        f"data:;base64,{code[:40]}\n{code[40:]}\n",
    ):
        np.testing.assert_array_equal(read(source), np.asarray(image))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_formats_that_lose_nothing_lose_nothing(kind):
    image = picture("P") if kind == "GIF" else picture()
    np.testing.assert_array_equal(
        read(samples.encoded(image, kind)), np.asarray(image.convert("RGB"))
    )


def test_a_file_is_turned_upright_by_its_exif_orientation():
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees when it was stored
    raw = samples.encoded(image, "PNG", exif=exif)
    np.testing.assert_array_equal(read(raw), np.rot90(np.asarray(image), k=-1))


def test_an_image_object_is_taken_as_it_lies():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(samples.encoded(picture(), "PNG", exif=exif)))
    np.testing.assert_array_equal(read(opened), np.asarray(picture()))


def test_transparency_is_laid_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = 10, 20, 30, 255
    pixels[0, 1] = 10, 20, 30, 0
    pixels[1, 0] = 0, 0, 0, 51  # a fifth
    for source in (
        pixels,
        Image.fromarray(pixels),
        samples.encoded(Image.fromarray(pixels), "PNG"),
    ):
        found = read(source)
        assert found[0, 0].tolist() == [10, 20, 30]
        assert found[0, 1].tolist() == [255, 255, 255]
        assert found[1, 0].tolist() == [204, 204, 204]


def test_a_clear_palette_entry_is_white():
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode=None)
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.info["transparency"] = 1
    assert read(image).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_grey_arrays_are_grey_in_all_colours():
    grey = samples.noise(4, 6, 1)
    for array in (grey, grey[..., 0]):
        np.testing.assert_array_equal(read(array), np.repeat(grey, 3, axis=2))


def test_cmyk_is_converted_as_pillow_does_it():
    ink = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    assert read(ink)[0, 0].tolist() == [255, 0, 0]
    assert read(samples.encoded(ink, "TIFF"))[0, 1].tolist() == [255, 0, 0]


def test_a_phones_picture_with_a_preview_behind_it_is_a_picture():
    image = picture()
    raw = samples.encoded(image, "MPO", save_all=True, append_images=[image.resize((20, 10))])
    assert Image.open(io.BytesIO(raw)).format == "MPO"
    assert read(raw).shape == (40, 60, 3)


# ---- what is wrong with it -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_is_refused_by_name(kind):
    raw = samples.encoded(picture(), kind)
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[1\].*(truncated|no picture)"):
        read(raw[: len(raw) * 2 // 3])


@pytest.mark.parametrize("junk", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"])
def test_junk_is_refused_by_name(junk):
    with pytest.raises(ValueError, match=r"messages\[0\]\.content\[1\]: the \d+ bytes (is|are)"):
        read(junk)


def test_damaged_bytes_never_raise_anything_else():
    raw = samples.encoded(picture(), "PNG")
    for at in range(8, len(raw), max(1, len(raw) // 150)):
        broken = bytearray(raw)
        broken[at] ^= 0xFF
        try:
            pixels = read(bytes(broken))
        except ValueError as raised:
            message = str(raised)
        else:
            message = f"{NAME}: still {pixels.shape[2]} colours"
        assert message.startswith(NAME)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch):
    raw = samples.encoded(picture(), "PNG")
    for limit in (40 * 60 - 1, 40 * 60 // 2 - 1):  # Pillow warns above one, and raises above two
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"content\[1\] is above .*bombs.*: scale the"):
            read(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60)
    assert read(raw).shape == (40, 60, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused_with_two_ways_out(kind):
    frames = [picture(), picture().rotate(90)]
    raw = samples.encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"has 2 frames \({kind}\): give it as a video, or one"):
        read(raw)
    opened = Image.open(io.BytesIO(raw))
    with pytest.raises(ValueError, match="has 2 frames"):
        read(opened)
    opened.seek(1)
    assert read(opened.copy()).shape == (40, 60, 3)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_instead_of_clipped(mode):
    wide = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(wide))
    assert image.mode == mode
    with pytest.raises(ValueError, match=rf"more than 8 bits per pixel \(mode {mode}\).*>> 8"):
        read(image)
    with pytest.raises(ValueError, match="more than 8 bits"):
        read(samples.encoded(image, "TIFF"))


def test_16_bits_per_colour_are_read_with_8():
    # A 16-bit RGB PNG, by hand: Pillow keeps the upper byte of each colour.
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    row = b"\0" + struct.pack(">6H", 0x1234, 0xFF00, 0, 0x80FF, 0x7F00, 0xFFFF)
    raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0))
    raw += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert read(raw).tolist() == [[[0x12, 0xFF, 0], [0x80, 0x7F, 0xFF]]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"array of float32: give uint8 in 0 \.\. 255"),
        (np.zeros((4, 4, 3), np.uint16), "array of uint16"),
        (np.zeros((3, 40, 60), np.uint8), r"shape \(3, 40, 60\).*transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"shape \(2, 4, 4, 3\)"),
        (np.zeros((4, 0, 3), np.uint8), r"shape \(4, 0, 3\) is no picture"),
        (np.zeros((7,), np.uint8), r"shape \(7,\)"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        read(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "there is no file 'nowhere.png'"),
        ("file:///nowhere/a.png", "there is no file '/nowhere/a.png'"),
        ("x" * 5000, "there is no file 'xxx"),
        ("a\0b", "there is no file"),
        ("https://example.org/a.png", r"'https://example\.org/a\.png' is not fetched: download"),
        ("HTTP://example.org/a.png", "is not fetched"),
        ("data:image/png,abc", r"'data:image/png' is not a data: URL with base64"),
        ("data:image/png;base64", "not a data: URL"),
        ("data:image/png;base64,@@@@", "no valid base64"),
        ("data:image/png;base64,abc", "no valid base64"),
        (7, "is a int: give a path"),
        (None, "is a NoneType"),
    ],
)
def test_sources_that_lead_nowhere_are_refused(source, message):
    with pytest.raises(ValueError, match=rf"messages\[0\]\.content\[1\].*{message}"):
        read(source)


def test_a_format_that_runs_other_programs_is_not_opened():
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(ValueError, match="no picture in a format that is read here; convert it"):
        read(postscript)


def test_without_pillow_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qwen-jax\[vision\]'"):
        read(b"")
