"""Owns the command `rsvlm scene`: one scene, as a whole or window by window, or several as a job. Knows no model and no file format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..engine.checks import check_texts
from ..errors import InputError
from ..imagery.source import DEFAULT_MAX_RAM, StretchChoice
from ..pipeline import RSVLM
from ..scenes.answers import DEFAULT_BATCH, SceneAnswers
from ..scenes.job_file import JobFile, find_scenes
from ..scenes.outputs import FORMATS, Overview, write_outputs
from ..scenes.outputs.write import check_formats, require_libraries
from ..scenes.record import SceneHeader, WindowRecord
from ..scenes.run import open_scene_run
from ..scenes.settings import RunSettings
from ..tasks.classify import LABEL_TEMPLATE
from . import options as opt
from .console import EXIT_OK, terminal
from .run import DryRun, Retry, run_job_file


class ModeChoice(StrEnum):
    describe = "describe"
    ask = "ask"
    classify = "classify"
    seek = "find"  # str has a method find


_SCENE, _READING = "Scene", "Reading"

Window = Annotated[
    int | None,
    typer.Option(
        "--window", min=1, metavar="PX", help="A grid: one record for each window of this side.", rich_help_panel=_SCENE
    ),
]
Overlap = Annotated[int, typer.Option("--overlap", min=0, metavar="PX", help="What two windows share.", rich_help_panel=_SCENE)]
StretchOption = Annotated[
    str,
    typer.Option(
        "--stretch",
        metavar="LOW:HIGH",
        help="auto, percentile, none, or values to show as black and white: one, or one for each band with commas.",
        rich_help_panel=_SCENE,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Nothing but a window's own pixels may change its answer.", rich_help_panel=_SCENE),
]
QueryAware = Annotated[
    bool | None,
    typer.Option(
        "--query-aware/--no-query-aware",
        help="Plan by the question; default for a whole scene in ask and find.",
        rich_help_panel=_SCENE,
    ),
]
MaxRam = Annotated[
    int,
    typer.Option("--max-ram", min=1, metavar="MIB", help="Memory for reading, without the model.", rich_help_panel=_READING),
]
AllowDriver = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-driver", metavar="NAME", help="Also open files with this GDAL driver; repeatable.", rich_help_panel=_READING
    ),
]
AllowVsi = Annotated[
    bool, typer.Option("--allow-vsi", help="Allow GDAL's /vsi paths: archives, the network.", rich_help_panel=_READING)
]


def scene(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SCENE... [MODE] [WORDS]",
            help="Rasters or images; describe, ask, classify or find; the question (ask) or what to look for (find).",
            show_default=False,
        ),
    ],
    window: Window = None,
    overlap: Overlap = 0,
    labels: Annotated[
        str | None, typer.Option("--labels", "-l", metavar="A,B,...", help="Labels with commas between (classify).")
    ] = None,
    labels_file: Annotated[Path | None, typer.Option("--labels-file", help="One label on each line (classify).")] = None,
    method: Annotated[
        opt.MethodChoice, typer.Option("--method", help="Embeddings, or the language model (classify).")
    ] = opt.MethodChoice.auto,
    template: Annotated[str, typer.Option("--template", help="Text around a label (classify).")] = LABEL_TEMPLATE,
    choice: Annotated[list[str] | None, typer.Option("--choice", help="Allow only these answers (ask); repeat it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write files there, named after the scene.")
    ] = None,
    write: Annotated[str, typer.Option("--write", metavar="A,B,...", help=f"Which files: {', '.join(FORMATS)}.")] = "geojson",
    output_format: opt.OutputFormat = opt.Format.text,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = DEFAULT_BATCH,
    bands: opt.Bands = None,
    stretch: StretchOption = "auto",
    deterministic: Deterministic = False,
    query_aware: QueryAware = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    max_pixels: opt.MaxPixels = None,
    max_ram: MaxRam = DEFAULT_MAX_RAM >> 20,
    allow_driver: AllowDriver = None,
    allow_vsi: AllowVsi = False,
    dry_run: DryRun = False,
    retry: Retry = False,
) -> int:
    """Ask scenes of any size: describe, ask "QUESTION", classify --labels A,B or find "TEXT".

    Several scenes with -o are a job: killed at any moment, the same command goes on. See docs/jobs.md.
    """
    patterns, mode, query = split_words(words)
    sources = find_scenes(patterns, output=output)
    source = sources[0]
    common = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    budget = {name: value for name, value in common.items() if value is not None}
    settings = RunSettings(
        mode=mode.value,
        query=query,
        labels=_labels(mode, labels, labels_file),
        choices=tuple(choice or ()),
        method=method.value,
        template=template,
        window_px=window,
        overlap_px=overlap,
        stretch=parse_stretch(stretch),
        deterministic=deterministic,
        query_aware=query_aware,
        max_new_tokens=max_new_tokens,
        max_ram_bytes=max_ram << 20,
        allow_drivers=tuple(check_texts("--allow-driver", allow_driver or [])),
        allow_vsi=allow_vsi,
        **budget,  # type: ignore[arg-type]
    )
    formats = () if output is None else check_formats([name.strip() for name in write.split(",")], mode.value)
    require_libraries(formats)
    if len(sources) > 1 or dry_run or retry:
        if output is None:
            raise InputError(f"several scenes, --dry-run and --retry need --output, got {len(sources)} scenes; add -o FOLDER")
        job = JobFile(
            scenes=sources,
            output=output,
            settings=settings,
            formats=formats,
            checkpoint=checkpoint,
            backend=backend,
            precision=precision,
            micro_batch=batch_size,
        )
        return run_job_file(job, dry_run=dry_run, retry=retry, output_format=output_format)
    with terminal.working("loading the checkpoint"):
        model = RSVLM.from_pretrained(checkpoint, backend, precision)
    with terminal.working("reading the scene"):
        run = open_scene_run(model, source, settings)
        picture = Overview(*run.overview()) if {"quicklook", "html"} & set(formats) else None
    with closing(SceneAnswers(run, batch_size)) as answers:
        _note_header(answers.header)
        if output_format is opt.Format.json:
            terminal.json({"scene": answers.header.to_dict()})
        records = []
        for record in terminal.each(answers, "windows", len(answers)):
            records.append(record)
            _show(record, window is not None, output_format)
            for warning in record.warnings if window is None else ():
                terminal.note(f"warning: {source}: {warning}")
        header = answers.header
    if output is not None:
        _write(output, header, records, formats, picture)
    return EXIT_OK


def split_words(words: Sequence[str]) -> tuple[list[str], ModeChoice, str]:
    """Scenes, mode and question. The mode is the last word, or the last but one with a question behind it; a file of such a name is ./ask.

    Raises:
        InputError: no scene before the mode.
    """
    for behind in (2, 1):
        if len(words) >= behind and words[-behind] in list(ModeChoice):
            sources, mode, query = list(words[:-behind]), ModeChoice(words[-behind]), words[-1] if behind == 2 else ""
            break
    else:
        sources, mode, query = list(words), ModeChoice.describe, ""
    if not sources:
        raise InputError(f'SCENE must come before "{mode}", got none; write rsvlm scene FILE {mode}')
    return sources, mode, query


def parse_stretch(text: str) -> StretchChoice:
    """auto, percentile, none, or LOW:HIGH, each one number or one for each band.

    Raises:
        InputError: anything else.
    """
    if text in ("auto", "percentile", "none"):
        return text  # type: ignore[return-value]
    try:
        low, high = (tuple(float(value) for value in edge.split(",")) for edge in text.split(":"))
    except ValueError:
        raise InputError(
            f"--stretch must be auto, percentile, none or LOW:HIGH, got {text!r}; write for example --stretch 200:3000 or "
            "--stretch 300,250,200:2800,2500,2600"
        ) from None
    return (low[0], high[0]) if len(low) == len(high) == 1 else (low, high)


def _labels(mode: ModeChoice, labels: str | None, labels_file: Path | None) -> tuple[str, ...]:
    if mode is ModeChoice.classify or labels is not None or labels_file is not None:
        return tuple(opt.parse_labels(labels, labels_file))
    return ()


def _note_header(header: SceneHeader) -> None:
    """What is lost, and the ground that was left out."""
    for sentence in header.lost:
        terminal.note(f"warning: {header.source}: {sentence}")
    whole = header.height * header.width
    for name, pixels in (("empty", header.empty_px), ("uniform", header.uniform_px)):
        if pixels:
            terminal.note(f"{header.source}: {pixels / whole:.1%} of its area is left out, in {name} windows ({pixels:,} px)")


def _show(record: WindowRecord, gridded: bool, output_format: opt.Format) -> None:
    if output_format is opt.Format.json:
        terminal.json(record.to_dict())
        return
    if record.label is not None:
        answer = f"{record.label}\t{record.score:.4f}"
    elif record.score is not None:
        answer = f"{record.score:.4f}"
    else:
        answer = " ".join(record.text.split()) if gridded else record.text
    window = record.place.window
    place = f"{window.row_off}\t{window.col_off}\t{window.height}\t{window.width}\t"
    terminal.data(f"{place}{answer}" if gridded else answer)


def _write(
    folder: Path, header: SceneHeader, records: list[WindowRecord], formats: tuple[str, ...], picture: Overview | None
) -> None:
    """The files, said one by one."""

    def read_overview(_: SceneHeader) -> Overview:
        assert picture is not None  # it was read for every format that shows it
        return picture

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be made ({error.strerror}); choose another place") from None
    with terminal.working("writing"):
        files = write_outputs(header, records, folder, formats, read_overview=read_overview)
    for file in files:
        terminal.note(f"wrote {file}")
