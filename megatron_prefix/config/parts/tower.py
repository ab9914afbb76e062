"""Sizes of a vision tower and its projector, and the operations that pictures take in them.

The pixels of a picture become patches, which attend to each other in a stack of layers, and the
projector makes a token of each patch, or of several that are merged. For C channels, F of the
feed-forward layer (gated or not), P values of a patch:

    per patch        2 P C  +  layers (8 C C  +  4 C F, gated 6 C F); no 2 P C for a class token
    per entry        layers 4 C              (scores and weighted sum)
    per projection   2 (a b + b c)           (two matrices, a x b and b x c)

A picture is cut into one tile or several of fixed size, each of which attends to itself (`entries`
are tiles times the square of a tile's patches), or it keeps its shape, and most layers attend
within windows (Qwen2.5-VL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class PictureWork(NamedTuple):
    """Work of one picture, forward: operations, and of how much they are."""

    tower: float
    projector: float
    patches: int
    projections: int


@dataclass(kw_only=True, frozen=True)
class VisionTower:
    """Sizes in channels; patches count a class token."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    gated_linear_unit: bool = False
    patch_values: int
    """Numbers of one patch: colours times height times width, times the pictures of a video that
    are one patch."""
    projector_sizes: tuple[int, int, int]
    """Channels before, between and after the two matrices of the projector."""
    merged_patches: int = 1
    """Patches that become one token."""
    tile_patches: int | None = None
    """Patches of a tile, a class token included; None: a picture keeps its shape."""
    class_tokens: int = 0
    """Of a tile."""
    projected_tile_patches: int | None = None
    """Those of a tile that go through the projector: not its class token."""
    window_patches: int | None = None
    """Height and width of a window in patches, in the layers with windows; None: no windows."""
    windowed_layers: int = 0

    def of_tiles(self, num_tiles: int) -> PictureWork:
        """A picture that is cut into tiles."""
        assert self.tile_patches is not None and self.projected_tile_patches is not None
        entries = num_tiles * self.tile_patches**2 * self.num_layers
        projections = num_tiles * self.projected_tile_patches // self.merged_patches
        work = self._work(num_tiles * self.tile_patches, entries, projections)
        unread = 2 * self.patch_values * self.hidden_size * num_tiles * self.class_tokens
        return work._replace(tower=work.tower - unread)

    def of_grid(self, frames: int, height: int, width: int) -> PictureWork:
        """A picture of so many tokens that keeps its shape."""
        edge = round(self.merged_patches**0.5)
        rows, columns = height * edge, width * edge
        full = frames * (rows * columns) ** 2
        windowed = full
        if (window := self.window_patches) is not None:
            # 5 rows in windows of 2 are 2 + 2 + 1, squared 4 + 4 + 1
            squares = [(n // window) * window**2 + (n % window) ** 2 for n in (rows, columns)]
            windowed = frames * squares[0] * squares[1]
        full_layers = self.num_layers - self.windowed_layers
        entries = full_layers * full + self.windowed_layers * windowed
        patches = frames * rows * columns
        return self._work(patches, entries, patches // self.merged_patches)

    def _work(self, patches: int, entries: int, projections: int) -> PictureWork:
        width = self.hidden_size
        matrices = 3 if self.gated_linear_unit else 2
        layer = 8 * width**2 + 2 * matrices * width * self.ffn_hidden_size
        per_patch = 2 * self.patch_values * width + self.num_layers * layer
        before, between, after = self.projector_sizes
        return PictureWork(
            tower=per_patch * patches + 4 * width * entries,
            projector=2 * (before * between + between * after) * projections,
            patches=patches,
            projections=projections,
        )
