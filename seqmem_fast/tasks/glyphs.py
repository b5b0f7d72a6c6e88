"""Letters as pictures: the fonts that matplotlib ships, each letter in up to 16 styles.

Nothing is downloaded. DejaVu Sans, Mono and Serif and STIX General, each upright and slanted, light
and bold, know some 1,500 letters of the Latin, Greek, Cyrillic, Armenian and Georgian scripts in
ten styles or more: as many classes as Omniglot has, with as many pictures of each.
"""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .optional import MissingPackage

STYLES = {  # font files are named by these
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
LEAST_STYLES = 10  # of a letter that is used
EM = 48  # pixels, at which a letter is measured
MARGIN = 2  # pixels on each side, within which a picture may be moved
ALIKE = 0.2  # two letters whose blurred pictures differ by less, relative to their ink, are one
QUARTER_TURNS = 4
TEST_SHARE = 5  # one letter in so many is kept for tests


class Glyphs(NamedTuple):
    """Pictures of all classes, each a letter in one of four rotations."""

    pictures: Tensor  # [classes, styles, side + 2 MARGIN, the same] uint8; 0 if a style lacks it
    known: Tensor  # [classes, styles] bool
    letters: str  # of each class
    train: Tensor  # int64, the classes of training
    test: Tensor  # those of other letters


@functools.lru_cache(maxsize=1)
def load(side: int, most: int) -> Glyphs:
    """At most so many letters, drawn anew in each process (some seconds), alike every time.

    A class is a letter in one of four rotations, unless it looks like an earlier one: the Greek
    capital alpha is no class beside the Latin A, nor u beside a turned n. All rotations of a
    letter are in the same part.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    draw = Pen(side)
    often = Counter(code for codes in draw.codes for code in codes)
    codes = [c for c in sorted(often) if often[c] >= LEAST_STYLES and _is_letter(chr(c))][:most]
    known = torch.tensor([[code in has for has in draw.codes] for code in codes])
    first = known.int().argmax(1).tolist()  # the first style that has the letter
    upright = torch.stack([draw(code, style) for code, style in zip(codes, first, strict=True)])
    letter, turns = _distinct(upright)
    used = letter.unique().tolist()
    pictures = torch.zeros(*known.shape, side, side, dtype=torch.uint8)
    for row in used:
        for style in known[row].nonzero().flatten().tolist():
            pictures[row, style] = draw(codes[row], style)
    chosen = zip(letter.tolist(), turns.tolist(), strict=True)
    every = torch.stack([pictures[row].rot90(quarters, (1, 2)) for row, quarters in chosen])
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    held_back = (order % TEST_SHARE == 0)[letter]
    return Glyphs(
        F.pad(every, (MARGIN,) * 4),
        known[letter],
        "".join(chr(codes[row]) for row in letter),
        (~held_back).nonzero().flatten(),
        held_back.nonzero().flatten(),
    )


def moved(pictures: Tensor, which: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Of [P, side + 2 MARGIN, ..] the chosen, [..., side, side], moved by -MARGIN to MARGIN."""
    side = pictures.shape[-1] - 2 * MARGIN
    places = pictures.unfold(1, side, 1).unfold(2, side, 1)
    return places[which, MARGIN - down, MARGIN - right]


class Pen:
    """Draws a letter as large as fits within the margins.

    `codes` has the numbers of the characters that each style knows.
    """

    def __init__(self, side: int) -> None:
        try:
            from matplotlib import ft2font, get_data_path
        except ImportError as error:
            raise MissingPackage(
                "the letters come from matplotlib's fonts: run `pip install matplotlib`"
            ) from error
        folder = Path(get_data_path()) / "fonts" / "ttf"
        names = [f"{family}{style}.ttf" for family, styles in STYLES.items() for style in styles]
        self._fonts = [ft2font.FT2Font(str(folder / name)) for name in names]
        known: Any = ft2font
        new = hasattr(ft2font, "LoadFlags")  # since matplotlib 3.10
        self._plain = known.LoadFlags.NO_HINTING if new else known.LOAD_NO_HINTING
        self._side = side
        self.codes = [font.get_charmap().keys() for font in self._fonts]

    def __call__(self, code: int, style: int) -> Tensor:
        """[side, side] uint8, 255 where the ink is."""
        font, side = self._fonts[style], self._side
        font.set_size(EM, 72)  # 72 dots an inch: points are pixels
        outline = font.load_char(code, flags=self._plain)
        largest = max(outline.width, outline.height, 1) / 64  # it counts in 64ths of a pixel
        font.set_size(EM * (side - 2 * MARGIN - 1) / largest, 72)  # edges may take one pixel more
        font.set_text(chr(code), flags=self._plain)
        font.draw_glyphs_to_bitmap(antialiased=True)
        ink = torch.tensor(font.get_image())
        down, across = ink.any(1).nonzero(), ink.any(0).nonzero()
        result = torch.zeros(side, side, dtype=torch.uint8)
        if len(down):
            ink = ink[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            top, left = ((side - length) // 2 for length in ink.shape)
            result[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        return result


def _is_letter(letter: str) -> bool:
    """A letter in its own right, neither a ligature nor another one in an ornamental style."""
    own = unicodedata.normalize("NFKC", letter) == letter
    return own and unicodedata.category(letter) in ("Lu", "Ll", "Lo")


def _distinct(upright: Tensor) -> tuple[Tensor, Tensor]:
    """Of [letters, side, side]: classes that look like no earlier one, each letter and quarters.

    All letters come before the first turned one.
    """
    letters = len(upright)
    every = torch.cat([upright.rot90(turns, (1, 2)) for turns in range(QUARTER_TURNS)])
    every = torch.stack([_cornered(picture) for picture in every]).float()
    blurred = F.avg_pool2d(every.unsqueeze(1), 3, 1, 1).flatten(1)  # a pixel's shift is no matter
    ink = blurred.square().sum(1)
    both = ink + ink.unsqueeze(1)
    alike = both - 2 * blurred @ blurred.t() < ALIKE / 2 * both
    kept = torch.zeros(len(every), dtype=torch.bool)
    for index, row in enumerate(alike):
        kept[index] = not (row & kept).any()
    chosen = kept.nonzero().flatten()
    return chosen % letters, chosen // letters


def _cornered(picture: Tensor) -> Tensor:
    """The picture moved into its corner but for a pixel."""
    dark = picture > 100
    down, right = (int(dark.any(axis).int().argmax()) for axis in (1, 0))
    return picture.roll((1 - down, 1 - right), (0, 1))
