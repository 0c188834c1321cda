"""Settings are plain values that survive JSON, and refuse what does not belong together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rsvlm_infer.errors import InputError
from rsvlm_infer.scenes.settings import RunSettings
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from tests.tasks.telling_model import telling_config


@pytest.mark.parametrize(
    "settings",
    [
        RunSettings(),
        RunSettings(mode="ask", query="Which?", choices=("a", "b"), window_px=100, overlap_px=10),
        RunSettings(mode="classify", labels=("a", "b"), stretch=((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), bands=(3, 2, 1)),
        RunSettings(mode="find", query="boats", stretch=(1.0, 2.0), allow_drivers=("VRT",), allow_vsi=True),
    ],
)
def test_settings_survive_json(settings: RunSettings) -> None:
    assert RunSettings(**json.loads(json.dumps(settings.to_dict()))) == settings


def test_reading_is_no_part_of_the_identity() -> None:
    one = RunSettings(max_ram_bytes=1 << 28, allow_drivers=("VRT",), allow_vsi=True, max_pixels=10)
    assert one.identity() == RunSettings().identity()
    assert RunSettings(stretch="percentile").identity() != RunSettings().identity()


def test_words_and_prompts_of_each_mode() -> None:
    assert RunSettings().words == CAPTION_PROMPT
    assert RunSettings(query="Roads?").prompts("") == ("Roads?",)
    labels = RunSettings(mode="classify", labels=("a", "b"))
    assert labels.words == "a, b"
    assert labels.prompts("alignment") == ("a satellite image of a", "a satellite image of b")
    assert len(labels.prompts("language")) == 3
    assert RunSettings(mode="ask", query="Which?", choices=("a", "b")).prompts("") == ("Which?", "a", "b")


def test_a_whole_scene_is_planned_by_its_question() -> None:
    config = telling_config()
    for settings, aware in (
        (RunSettings(mode="ask", query="x"), True),
        (RunSettings(mode="find", query="x"), True),
        (RunSettings(mode="ask", query="x", window_px=10), False),
        (RunSettings(mode="ask", query="x", query_aware=False), False),
        (RunSettings(query_aware=True), True),
        (RunSettings(), False),
    ):
        assert settings.planning(config).dris.query_aware is aware


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "draw"}, r"mode must be one of \['describe', 'ask', 'classify', 'find'\], got 'draw'"),
        ({"mode": "ask"}, "query must hold the question"),
        ({"mode": "classify", "labels": ("a", "b"), "query": "x"}, 'query has no meaning in mode "classify"'),
        ({"mode": "classify", "labels": ("a", "a")}, "labels must differ"),
        ({"labels": ("a", "b")}, 'labels belong to mode "classify"'),
        ({"choices": ("a", "b")}, 'choices belong to mode "ask"'),
        ({"overlap_px": 3}, "overlap_px needs window_px"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_tiles": 0}, "max_tiles must be at least 1"),
        ({"max_ram_bytes": 1.5}, "max_ram_bytes must be a whole number"),
        ({"bands": "red"}, "bands must be a sequence of whole numbers"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RunSettings(**values)
