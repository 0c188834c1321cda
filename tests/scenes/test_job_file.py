"""The job file: what it says, and what it refuses by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rsvlm_infer.errors import ConfigError, InputError
from rsvlm_infer.scenes.job_file import _KEYS, _SETTINGS, JobFile, find_scenes, parse_bytes, read_job_file
from rsvlm_infer.scenes.settings import RunSettings

WHOLE = """
scenes = ["scenes/*.tif", "other.tif", "/vsizip/archive.zip/a.tif"]
output = "out"
mode = "ask"
query = "Is there water?"
choices = ["yes", "no"]
window = 512
overlap = 64
budget = 128
bands = [3, 2, 1]
stretch = [0, 3000.5]
max_ram = "512MiB"
allow_vsi = true
deterministic = true
formats = ["geojson"]
checkpoint = "model"
backend = "eager"
precision = "float32"
micro_batch = 2
engine = "ray"
workers = 3
ray_address = "auto"
cpus = 0.5
gpus = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("scenes/b.tif", "scenes/a.tif", "scenes/deep/c.tif", "other.tif", "out/a/quicklook.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def test_every_key_arrives(folder: Path) -> None:
    found = read_job_file(write(folder, WHOLE))
    assert found == JobFile(
        scenes=(
            str(folder / "scenes" / "a.tif"),
            str(folder / "scenes" / "b.tif"),
            str(folder / "other.tif"),
            "/vsizip/archive.zip/a.tif",
        ),
        output=folder / "out",
        settings=RunSettings(
            mode="ask",
            query="Is there water?",
            choices=("yes", "no"),
            window_px=512,
            overlap_px=64,
            max_visual_tokens=128,
            bands=(3, 2, 1),
            stretch=(0, 3000.5),
            max_ram_bytes=512 << 20,
            allow_vsi=True,
            deterministic=True,
        ),
        formats=("geojson",),
        checkpoint=folder / "model",
        backend="eager",
        precision="float32",
        micro_batch=2,
        engine="ray",
        workers=3,
        ray_address="auto",
        cpus=0.5,
        gpus=1,
    )


def test_the_least_file_takes_the_defaults(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write(folder, 'scenes = "other.tif"\noutput = "out"')
    found = read_job_file(Path("job.toml"))  # also when it is named from its own folder
    assert found == JobFile(scenes=(str(folder / "other.tif"),), output=folder / "out", settings=RunSettings())


def test_every_setting_and_every_field_has_a_key() -> None:
    assert set(_SETTINGS) <= set(_KEYS)
    assert {field.name for field in fields(RunSettings)} == set(_SETTINGS.values())
    assert {field.name for field in fields(JobFile)} - {"settings"} == set(_KEYS) - set(_SETTINGS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'scenes = "a.tif"\noutput = "o"\nqerry = "x"\nwindows = 3',
            r"unknown keys \['qerry', 'windows'\]; known are .*'query'",
        ),
        ('output = "o"', 'must have the key "scenes"'),
        ('scenes = "a.tif"', 'must have the key "output"'),
        ("scenes = ", "must be TOML"),
        ('scenes = 3\noutput = "o"', "scenes must be a list of texts, got 3"),
        ('scenes = "a.tif"\noutput = "o"\nwindow = "512"', "window must be a whole number, got '512'"),
        ('scenes = "a.tif"\noutput = "o"\nwindow = true', "window must be a whole number, got True"),
        ('scenes = "a.tif"\noutput = "o"\nbands = [1, "2"]', "bands must be a list of whole numbers"),
        (
            'scenes = "a.tif"\noutput = "o"\nstretch = [1]',
            r'stretch must be "auto", "percentile", "none" or \[low, high\], got \[1\]',
        ),
        ('scenes = "a.tif"\noutput = "o"\nallow_vsi = 1', "allow_vsi must be true or false, got 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_job_file(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('mode = "look"', "mode must be one of"),
        ('mode = "ask"', "query must hold the question"),
        ('max_ram = "lots"', r'max_ram must be bytes above 0, such as 800000000 or "768MiB", got \'lots\''),
        ('engine = "spark"', r"engine must be one of \['local', 'ray'\], got 'spark'"),
        ("workers = 2", 'workers need engine "ray", got engine "local"'),
        ("micro_batch = 0", "micro_batch must be at least 1, got 0"),
        ('engine = "ray"\ncpus = -1', "cpus must be at least 0, got -1"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_job_file(write(tmp_path, f'scenes = "a.tif"\noutput = "o"\n{text}'))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"job file .*none\.toml cannot be read"):
        read_job_file(tmp_path / "none.toml")


def test_scenes_are_found_once_sorted_and_never_in_the_output(folder: Path) -> None:
    found = find_scenes(["other.tif", "**/*.tif"], folder, folder / "out")
    assert [Path(name).relative_to(folder).as_posix() for name in found] == [
        "other.tif",
        "scenes/a.tif",
        "scenes/b.tif",
        "scenes/deep/c.tif",
    ]
    assert find_scenes(["absent.tif", "https://example.com/*.tif"]) == ("absent.tif", "https://example.com/*.tif")
    (folder / "odd[1].tif").touch()
    assert find_scenes([str(folder / "odd[1].tif")]) == (str(folder / "odd[1].tif"),)


@pytest.mark.parametrize(
    ("patterns", "words"), [([], "at least one scene"), ([" "], "blank name"), (["none/*.tif"], "meets no file")]
)
def test_patterns_that_name_nothing_are_refused(tmp_path: Path, patterns: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_scenes(patterns, tmp_path)


def test_bytes_are_read_with_their_units() -> None:
    assert [parse_bytes("max_ram", value) for value in (7, "7", "2 kB", "1.5GiB", "3mib")] == [7, 7, 2000, 3 << 29, 3 << 20]
    for bad in (0, -1, True, 1.5, "", "MiB", "1 parsec", "0"):
        with pytest.raises(InputError, match="max_ram must be bytes above 0"):
            parse_bytes("max_ram", bad)
