"""mine: a handful of captions gives exactly these entries; the package's own lists are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from rsvlm_infer.evaluation.datasets import RSICD_THEMES, read_rsicd
from rsvlm_infer.knowledge.mine import (
    OBJECT,
    REGION,
    SCENE,
    Entry,
    Lexicon,
    Scene,
    mine,
    phrases,
    plural,
    read_lexicon,
    read_scenes,
    tokens,
)

LEXICON = Lexicon.from_dict(
    {
        "objects": [["tree"], ["plane", "airplane"], ["parking lot"], ["building"], ["river"], ["terminal"]],
        "places": ["side", "airport", "lot", "area"],
        "modifiers": ["green", "curved", "parking", "white"],
        "numbers": ["two"],
        "links": ["of", "near", "next to"],
        "determiners": ["a", "the", "many", "some"],
        "quantities": ["piece", "lot", "lots"],
    }
)
SCENES = (Scene("airport", "runways", ("rsicd/airport",)), Scene("river", "water", ("rsicd/river",)))
IMAGES = [
    ("airport", ["Many airplanes are near a terminal .", "some white planes in an airport ."]),
    ("airport", ["airplanes and green trees .", "airplanes near the terminal in an airport ."]),
    ("river", ["many green trees are in two sides of a curved river .", "a green tree near the river ."]),
    ("river", ["two sides of the river .", "it is a piece of green trees with lots of unknown things ."]),
]


def found(caption: str) -> list[str]:
    return [" ".join(words) for _, words in phrases(tokens(caption), LEXICON)]


def test_entries_of_four_images() -> None:
    assert mine(IMAGES, LEXICON, SCENES, min_images=2) == [
        Entry("trees", OBJECT, 3),
        Entry("airplanes", OBJECT, 2),  # the most frequent of plane, planes, airplane, airplanes
        Entry("river", OBJECT, 2),
        Entry("terminal", OBJECT, 2),
        Entry("green trees", REGION, 3),
        Entry("airport: runways", SCENE),
        Entry("river: water", SCENE),
        Entry("airport with airplanes and terminal", SCENE, 2),
        Entry("river with trees", SCENE, 2),  # not with river
    ]


def test_a_phrase_needs_enough_images_and_is_no_whole_caption() -> None:
    regions = [entry.text for entry in mine(IMAGES, LEXICON, SCENES, min_images=1) if entry.level == REGION]
    # "two sides of the river" and "a green tree near the river" are captions; "curved river" is only a part of a longer phrase
    assert regions == ["green trees", "airplanes near the terminal", "two sides of a curved river", "white planes"]
    assert [entry.level for entry in mine(IMAGES, LEXICON, SCENES, min_images=4)] == [SCENE, SCENE]


def test_a_phrase_that_also_stands_alone_stays() -> None:
    images = [("", ["it has white green trees ."])] * 9 + [("", ["it has green trees ."])] * 2
    assert [entry for entry in mine(images, LEXICON, (), 1) if entry.level == REGION] == [
        Entry("green trees", REGION, 11),  # 9 < 0.9 x 11
        Entry("white green trees", REGION, 9),
    ]
    images = images[:10]
    assert [entry.text for entry in mine(images, LEXICON, (), 1) if entry.level == REGION] == ["white green trees"]


def test_no_captions_leave_the_facts() -> None:
    assert mine([], LEXICON, SCENES) == [Entry("airport: runways", SCENE), Entry("river: water", SCENE)]


def test_an_image_counts_once() -> None:
    assert mine([("", ["a tree .", "a tree .", "trees ."])], LEXICON, (), 1) == [Entry("tree", OBJECT, 1)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "Many green trees are next to a parking lot near the white buildings .",
            ["green trees", "parking lot", "parking lot near the white buildings", "white buildings"],
        ),
        (
            "two curved sides of a river, trees",
            ["curved sides", "two curved sides of a river", "curved sides of a river", "sides of a river"],
        ),
        ("a lot of trees and parking lot of the airport", ["parking lot", "parking lot of the airport"]),
        ("a piece of green area", ["green area"]),
        ("green unknown trees of", []),
        ("tree near the the river", []),
        ("", []),
    ],
)
def test_phrases(caption: str, expected: list[str]) -> None:
    assert found(caption) == expected


def test_variants_have_one_key() -> None:
    keys = {key for caption in ("sides of a river", "side of the rivers") for key, _ in phrases(tokens(caption), LEXICON)}
    assert keys == {("side", "of", "river")}


def test_plural() -> None:
    assert [plural(noun) for noun in ("tree", "bus", "church", "city", "runway", "gym")] == [
        "trees",
        "buses",
        "churches",
        "cities",
        "runways",
        "gyms",
    ]


def test_facts_cover_every_class_once() -> None:
    eurosat = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
    eurosat += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
    rsscn7 = ["Field", "Forest", "Grass", "Industry", "Parking", "Resident", "RiverLake"]
    classes = [name for scene in read_scenes() for name in scene.classes]
    assert sorted(classes) == sorted(
        [f"rsicd/{theme}" for theme in RSICD_THEMES]
        + [f"eurosat/{name}" for name in eurosat]
        + [f"rsscn7/{name}" for name in rsscn7]
    )
    for scene in read_scenes():
        for name in scene.classes:
            if name.startswith("rsicd/"):
                assert scene.name == RSICD_THEMES[name.removeprefix("rsicd/")]
    assert all(20 <= len(scene.fact) <= 100 for scene in read_scenes())


def test_lexicon_has_no_word_of_two_kinds_that_would_hide_one() -> None:
    lexicon = read_lexicon()
    names = [name for names in lexicon.objects for name in names]
    assert len(names) == len(set(names))
    closed = lexicon.determiners | {word for link in lexicon.links for word in link}
    assert not closed & (set(lexicon.nouns) | lexicon.modifiers | lexicon.numbers)
    assert not lexicon.numbers & (lexicon.modifiers | set(lexicon.nouns))


@pytest.mark.data
def test_the_rsicd_training_captions(data_root: Path) -> None:
    if not (data_root / "rsicd" / "captions.json").is_file():
        pytest.skip("the data folder has no rsicd/captions.json")
    images = [(image.theme, image.captions) for image in read_rsicd(data_root / "rsicd", "train")]
    entries = mine(images, read_lexicon(), read_scenes())
    assert [sum(entry.level == level for entry in entries) for level in (OBJECT, REGION, SCENE)] == [110, 688, 70]
    assert entries[:2] == [Entry("trees", OBJECT, 4638), Entry("buildings", OBJECT, 4178)]
    assert Entry("residential area", REGION, 669) in entries
    assert Entry("two sides of a river", REGION, 172) in entries
    assert Entry("airport with planes, terminal and runway", SCENE, 336) in entries
    captions = {caption.strip(" .").lower() for _, captions in images for caption in captions}
    assert not {entry.text for entry in entries if entry.level == REGION} & captions
