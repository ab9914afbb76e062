"""Images of prompts: as records have them, as a processor counts and scales them, and on disk.

A record refers to a `Picture`. An `ImageProcessor`, the image half of a vision model's processor,
says how many placeholder tokens it has. A data set keeps the encoded bytes, each picture
once, in an `ImageStore`. transformers and Pillow are imported when the first picture is read.
"""

from __future__ import annotations

from megatron_prefix.data.images.joined import JoinedImages
from megatron_prefix.data.images.pictures import IMAGE, Picture, PictureTable, StoredPicture
from megatron_prefix.data.images.processor import ImageProcessor
from megatron_prefix.data.images.store import ImageStore
from megatron_prefix.data.images.writer import ImageWriter

__all__ = [
    "IMAGE",
    "ImageProcessor",
    "ImageStore",
    "ImageWriter",
    "JoinedImages",
    "Picture",
    "PictureTable",
    "StoredPicture",
]
