"""Quick-look and page: what is drawn where, in which colour; nothing from outside; words stay words."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("rasterio")
pytest.importorskip("matplotlib")

from rsvlm_infer.scenes.outputs import write_outputs
from rsvlm_infer.scenes.outputs.colours import CLASSES, class_colours, css, ramp_colour
from rsvlm_infer.scenes.outputs.legend import FIND_OPACITY, make_legend
from rsvlm_infer.scenes.outputs.quicklook import GAP, MARGIN_PX, PICTURE_PX, UNSEEN, draw_quicklook, round_distance
from rsvlm_infer.scenes.outputs.rows import output_rows
from rsvlm_infer.scenes.record import SceneHeader
from tests.scenes.outputs.cases import HEIGHT, WIDTH, header, overview, pixel, records, text_of

BLUE = (20, 60, 120)


def scene_part(scene: SceneHeader) -> Image.Image:
    """The picture's part that shows the scene."""
    picture = draw_quicklook(scene, output_rows(scene, records(scene.mode)), overview())
    width, height = PICTURE_PX, round(HEIGHT * PICTURE_PX / WIDTH)
    top = next(row for row in range(picture.height) if pixel(picture, row, MARGIN_PX + width // 8)[2] < 200 and row > 60)
    return picture.crop((MARGIN_PX, top, MARGIN_PX + width, top + height))


def mixed(colour: tuple[int, ...], opacity: float) -> tuple[int, ...]:
    return tuple(round(under + (over - under) * opacity) for under, over in zip(BLUE, colour, strict=True))


def at(part: Image.Image, row: float, col: float) -> tuple[int, ...]:
    """The colour at a place of the scene."""
    return pixel(part, round(row * part.height / HEIGHT), round(col * part.width / WIDTH))


def near(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 3


def test_classes_lie_on_their_windows_in_the_colours_of_the_legend() -> None:
    part = scene_part(header("classify"))
    legend = make_legend(header("classify"), output_rows(header("classify"), records("classify")))
    assert {label for label, _, _ in legend.classes} == {record.label for record in records("classify")}
    assert sum(share for _, _, share in legend.classes) == pytest.approx(1)
    colours = {label: colour for label, colour, _ in legend.classes}
    for record in records("classify"):
        core = record.place.core
        found = at(part, core.row_off + 60, core.col_off + 60)
        assert near(found, mixed(colours[str(record.label)], 0.38))
    skipped = at(part, 160, 160)
    assert near(skipped, tuple(int(value * UNSEEN) for value in BLUE)), "ground without an answer is dark"


def test_the_better_a_find_the_more_it_is_covered() -> None:
    part = scene_part(header("find"))
    for record in records("find"):
        share = (record.score or 0) / (11 / 64)
        opacity = FIND_OPACITY[0] + (FIND_OPACITY[1] - FIND_OPACITY[0]) * share
        core = record.place.core
        assert near(at(part, core.row_off + 60, core.col_off + 60), mixed(ramp_colour(share), opacity))


def test_invalid_ground_is_paper_grey() -> None:
    assert near(at(scene_part(header("describe")), 50, 10), (GAP[0],) * 3)
    assert near(at(scene_part(header("describe")), 50, 60), BLUE)


def test_without_a_ground_distance_there_is_no_scale_bar() -> None:
    rows = output_rows(header("find"), records("find"))
    known, unknown = (draw_quicklook(header("find", gsd_native_m=gsd), rows, overview()) for gsd in (10.0, None))
    corner = (MARGIN_PX * 2 + PICTURE_PX, known.height - MARGIN_PX - 34, known.width, known.height)
    assert len(set(known.crop(corner).getcolors() or [])) > 1
    assert len(set(unknown.crop(corner).getcolors() or [])) == 1


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, 1.0), (1.99, 1.0), (2.0, 2.0), (49_000, 20_000.0), (50_000, 50_000.0), (0.07, 0.05)]
)
def test_scale_bars_are_round(limit: float, expected: float) -> None:
    assert round_distance(limit) == expected


def test_colours_repeat_only_when_there_are_more_labels_than_colours() -> None:
    labels = [f"label {index:02d}" for index in range(len(CLASSES) + 1)]
    colours = class_colours(labels)
    assert len(set(colours.values())) == len(CLASSES)
    assert class_colours(labels[::-1]) == colours
    assert ramp_colour(-1) == ramp_colour(0)
    assert ramp_colour(2) == ramp_colour(1)
    brightness = [
        sum(weight * value for weight, value in zip((0.3, 0.6, 0.1), ramp_colour(i / 50), strict=True)) for i in range(51)
    ]
    assert brightness == sorted(brightness), "the ramp reads in grey"


class Page(HTMLParser):
    """What a page refers to, and its words outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in = tag
        self.links += [value or "" for name, value in attributes if name in ("href", "src", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        else:
            self.words += data


def page(folder: Path, scene: SceneHeader, formats: list[str]) -> tuple[Page, str]:
    pytest.importorskip("jinja2")
    paths = write_outputs(scene, records(scene.mode), folder, formats, name="a b", read_overview=overview)
    text = text_of(next(path for path in paths if path.suffix == ".html"))
    return Page(text), text


def test_the_page_needs_no_network_and_links_to_the_files(tmp_path: Path) -> None:
    found, text = page(tmp_path, header("find"), ["html", "geojson", "relevance", "stac"])
    pictures = [link for link in found.links if link.startswith("data:image/jpeg;base64,")]
    assert len(pictures) == 1
    with Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2]))) as picture:
        assert picture.size == (200, 150)
    files = [link for link in found.links if not link.startswith("data:")]
    assert files == ["a%20b.geojson", "a%20b.relevance.tif", "a%20b.stac.json"]
    assert all((tmp_path / name.replace("%20", " ")).is_file() for name in files)
    addresses = set(re.findall(r"https?://[^\"'\s<)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}, "names of vocabularies, nothing to load"
    assert "@import" not in text
    assert "url(" not in text


def test_the_page_holds_every_window_and_words_stay_words(tmp_path: Path) -> None:
    """No text of a model, label or query becomes markup or ends the script that holds it."""
    wild = header("classify", query='</script><script>alert("1")</script>', lost=("a < b & c",))
    found, _ = page(tmp_path, wild, ["html"])
    assert found.tags.count("script") == 2
    assert "a < b & c." in found.words
    assert 'Classes: </script><script>alert("1")</script>' in found.words
    data: dict[str, Any] = json.loads(found.scripts[0])
    assert [row[0] for row in data["rows"]] == [str(record.place.index) for record in records("classify")]
    assert {row[3] for row in data["rows"]} == {"farmland", "forest", "port & <harbour>"}
    legend = make_legend(wild, output_rows(wild, records("classify")))
    colours = {label: css(colour) for label, colour, _ in legend.classes}
    assert all(row[11] == colours[row[3]] for row in data["rows"])
    assert data["rows"][0][9:11] == pytest.approx((15.00692, 49.64806), abs=1e-4)
