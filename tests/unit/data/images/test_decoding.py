"""Pictures are decoded as `datasets` and transformers do it; what these read in part is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import vision
from PIL import Image

from megatron_prefix.data.images.decoding import decode
from megatron_prefix.errors import InputError


def encoded(image, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


PICTURE = vision.picture(40, 24)


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF", "GIF", "WEBP", "JPEG"])
def test_a_picture_keeps_its_size_and_about_its_colours(form):
    decoded = decode(encoded(PICTURE, form), "it")
    assert decoded.mode == "RGB" and decoded.size == (40, 24)
    difference = np.asarray(decoded).astype(int) - np.asarray(PICTURE)
    assert np.abs(difference).mean() < (1 if form in ("PNG", "BMP", "PPM", "TIFF") else 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotations_of_cameras_are_applied(orientation):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PICTURE, exif=exif)
    expected = load_image(Image.open(io.BytesIO(content)))
    decoded = decode(content, "it")
    assert decoded.size == ((24, 40) if orientation > 4 else (40, 24))
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_those_of_transformers(mode):
    from transformers.image_transforms import convert_to_rgb

    image = PICTURE.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
    np.testing.assert_array_equal(decode(content, "it"), expected)


@pytest.mark.parametrize(
    ("mode", "kind", "form"),
    [("I;16", np.uint16, "PNG"), ("I", np.int32, "TIFF"), ("F", np.float32, "TIFF")],
)
def test_pixels_that_transformers_would_cut_are_refused(mode, kind, form):
    from transformers.image_transforms import convert_to_rgb

    grey = np.asarray(PICTURE.convert("L")).astype(kind)
    content = encoded(Image.fromarray(grey / 255 if mode == "F" else grey * 200 + 256), form)
    cut = convert_to_rgb(Image.open(io.BytesIO(content)), return_numpy=True)
    assert cut.min() == cut.max() == (0 if mode == "F" else 255), "read it as transformers does"
    with pytest.raises(InputError, match=f"it has pixels of mode {mode}, .* save it with 8 bits"):
        decode(content, "it")


def test_sixteen_bits_per_colour_are_read_as_eight():
    """Pillow scales these by itself."""
    colours = np.full((2, 3, 3), 257 * 200, ">u2")
    header = b"P6 3 2 65535\n"
    assert (np.asarray(decode(header + colours.tobytes(), "it")) == 200).all()


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    assert (np.asarray(decode(encoded(image), "it")) == 255).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has no bytes"),
        (b"\x89PNG\r\n\x1a\n", "it is (damaged|no picture)"),
        (b"not a picture", "it is no picture"),
        (encoded(PICTURE)[:-200], "it is damaged"),
        (encoded(PICTURE, "JPEG")[:300], "it is damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "it is no picture"),
        (
            encoded(PICTURE, "GIF", save_all=True, append_images=[vision.picture(40, 24, 3)]),
            "it has 2 frames",
        ),
    ],
)
def test_what_is_no_whole_picture_is_refused(content, message):
    with pytest.raises(InputError, match=message):
        decode(content, "it")


@pytest.mark.parametrize("most", [900, 400])
def test_a_picture_above_pillows_limit_is_refused_before_it_is_decoded(monkeypatch, most):
    """Pillow itself warns above its limit, and refuses above twice the limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(InputError, match="it (is too large|has 960 pixels)"):
        decode(encoded(PICTURE), "it")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 960)
    assert decode(encoded(PICTURE), "it").size == (40, 24)
