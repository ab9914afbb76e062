"""Encoded bytes -> an upright RGB picture, as the library `datasets` and transformers decode it.

Rotations of EXIF are applied, and transparent pixels are put on white. Pictures that the two would
read only in part, or whose values they would cut at 255, or that could exhaust the memory, are
refused.
"""

from __future__ import annotations

import io
from typing import Any

from megatron_prefix.errors import InputError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded. Other decoders of Pillow run programs (EPS) or read no pictures."""

DEEP = ("I", "F")
"""First letters of Pillow's modes with more than 8 bits per pixel and channel: 16-bit and 32-bit
grey (I;16, I) and float (F)."""


def decode(content: bytes, name: str) -> Any:
    """The upright RGB picture, a PIL.Image. Raises InputError with `name`."""
    Image, ImageOps = _pillow()
    if not content:
        raise InputError(f"{name} has no bytes: give a picture, or remove the record")
    try:
        with Image.open(io.BytesIO(content), formats=_formats(Image)) as opened:
            _check(opened, Image.MAX_IMAGE_PIXELS, name)
            return _rgb(Image, ImageOps.exif_transpose(opened))
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large ({error}): scale it down") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(
            f"{name} is no picture that can be decoded ({', '.join(FORMATS)} can): write it as PNG "
            "or JPEG, or remove the record"
        ) from error
    except Exception as error:  # decoders raise many kinds for damaged bytes
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{name} is damaged ({reason}): replace the picture, or remove the record"
        ) from error


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise InputError("images need the package pillow: pip install pillow") from error
    return Image, ImageOps


def _formats(Image: Any) -> list[str]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check(opened: Any, most: int | None, name: str) -> None:
    width, height = opened.size
    if width < 1 or height < 1:
        raise InputError(f"{name} has no pixels ({width} x {height}): remove the record")
    if most is not None and width * height > most:
        raise InputError(
            f"{name} has {width * height:,} pixels ({width} x {height}), and Pillow's limit for "
            f"one picture is {most:,}: scale it down"
        )
    if opened.mode.startswith(DEEP):
        raise InputError(
            f"{name} has pixels of mode {opened.mode}, more than 8 bits each, and transformers "
            "cuts their values at 255, which leaves a white or a black picture: save it with 8 "
            "bits, its values scaled to 0 to 255, or remove the record"
        )
    # A camera's MPO file is a photograph with a preview after it.
    if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
        raise InputError(
            f"{name} has {opened.n_frames} frames, and an image is one picture: extract the frame "
            "that is meant, or remove the record"
        )


def _rgb(Image: Any, picture: Any) -> Any:
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
