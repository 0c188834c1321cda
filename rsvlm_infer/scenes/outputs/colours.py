"""Owns which colour says what, the same in the picture and on the page. Knows no records' meaning and no file."""

from __future__ import annotations

from collections.abc import Sequence

RGB = tuple[int, int, int]

# Okabe and Ito's colours that people with any colour vision tell apart, brighter where they lie on dark ground, then more
CLASSES: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 188, 140),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
    (90, 110, 235),
    (158, 218, 96),
    (178, 102, 255),
    (255, 152, 150),
    (140, 86, 75),
    (23, 190, 207),
)
ACCENT: RGB = (255, 196, 0)  # windows without a class or score
CITED: RGB = (255, 94, 58)
# dark blue to yellow: lightness rises evenly, so that it also reads in grey
RAMP: tuple[RGB, ...] = (
    (48, 18, 90),
    (87, 35, 130),
    (150, 44, 128),
    (205, 64, 113),
    (241, 105, 92),
    (253, 159, 108),
    (252, 253, 160),
)


def class_colours(labels: Sequence[str]) -> dict[str, RGB]:
    """One colour for each label, by the labels' order; they repeat when there are more labels than colours."""
    return {label: CLASSES[index % len(CLASSES)] for index, label in enumerate(sorted(set(labels)))}


def ramp_colour(share: float) -> RGB:
    """0..1 -> colour."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    rest = place - low
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return red, green, blue


def css(colour: RGB) -> str:
    """#rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
