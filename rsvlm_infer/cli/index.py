"""Owns the commands `rsvlm index` and `rsvlm search`: options in, an archive or its finds out. Knows no embedding and no format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import AugmentationConfig
from ..errors import InputError, RsvlmError
from ..imagery.acquired import parse_time
from ..index.answers import answer_views, embedder_of
from ..index.archive import Archive
from ..index.encode import WINDOW_PX, EncodeSettings, content_hash, opened
from ..index.graph import GRAPH_FROM_ROWS, build_graph, find, held_segments
from ..index.results import check_results_path, hit_line, hit_values, results_geojson, write_results
from ..index.search import ArchiveQuery, Filters, SearchLevel, SearchResult, check_query
from ..index.writer import ArchiveUnwritableError, ArchiveWriter
from ..pipeline import RSVLM, default_checkpoint
from ..tasks.generation import GenerationSettings, check_labels
from ..tasks.result import Answer
from ..tasks.retrieve import require_alignment
from ..tasks.scene import SceneSettings
from . import options as opt
from .console import EXIT_OK, exit_code, terminal

_FILTER, _RESULT, _ANSWER = "Filter", "Result", "Answer"


class SearchLevelChoice(StrEnum):
    all = "all"
    object = "object"
    region = "region"
    scene = "scene"


class GraphChoice(StrEnum):
    object = "object"
    region = "region"
    scene = "scene"


class WayChoice(StrEnum):
    auto = "auto"
    exact = "exact"
    graph = "graph"


class FeaturesChoice(StrEnum):
    float32 = "float32"
    float16 = "float16"


class SearchFormat(StrEnum):
    text = "text"
    json = "json"
    geojson = "geojson"


def index_scenes(
    scenes: Annotated[list[str], typer.Argument(metavar="SCENE...", help="Rasters and photos.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The archive: a folder to make, or to add to.", show_default=False)
    ],
    window: Annotated[
        int, typer.Option("--window", min=1, help="Encode larger scenes in windows of at most this side in pixels.")
    ] = WINDOW_PX,
    date: Annotated[
        str | None,
        typer.Option("--date", help="When these scenes were taken, ISO 8601; default is what each file's tags say."),
    ] = None,
    graph: Annotated[
        list[GraphChoice] | None,
        typer.Option("--graph", help=f"Also build a graph of this level, for more than {GRAPH_FROM_ROWS:,} rows; repeatable."),
    ] = None,
    features: Annotated[
        FeaturesChoice | None,
        typer.Option("--features", help="Also keep what the vision encoder saw, for `rsvlm search --ask` without the scenes."),
    ] = None,
    output_format: opt.OutputFormat = opt.Format.text,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = 4,
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
) -> int:
    """Encode scenes once and keep their embeddings, to be searched with `rsvlm search`. A scene that is there is not encoded again."""
    settings = SceneSettings(**opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens))
    encode = EncodeSettings(settings, window, batch_size, None if features is None else features.value)
    output = output.expanduser()
    acquired = None if date is None else parse_time(date, "--date")
    source = _checkpoint(checkpoint)
    with terminal.working("loading the checkpoint"):
        model = RSVLM.from_pretrained(checkpoint, backend, precision)
        embedder = embedder_of(source)
    settings.apply(model.config)
    failed = 0
    encoding = encode.encoding_by(model)
    with ArchiveWriter(output, embedder, require_alignment(model.config).embed_size, encoding) as writer:
        for name in terminal.each(scenes, "scenes", len(scenes)):
            try:
                content = content_hash(name)
                known = writer.source_of(content)
                if known is not None:
                    _told(output_format, name, "known", {"as": known})
                    continue
                with opened(name, content, model, encode, acquired) as scene:
                    added = writer.add(scene.record, scene.views())
            except ArchiveUnwritableError:
                raise
            except RsvlmError as error:
                failed += 1
                terminal.failure(error, name)
                if output_format is opt.Format.json:
                    terminal.json({"source": name, "error": str(error)})
                continue
            if added.skipped_px:
                share = added.skipped_px / (added.height * added.width)
                terminal.note(
                    f"warning: {name}: {share:.1%} of its pixels lie in windows without anything valid; they were skipped"
                )
            _told(output_format, name, "added", {"views": added.num_views, "acquired": added.acquired})
        with terminal.working("merging small segments"):
            merged = writer.merge(held_segments(output, [level.value for level in graph or []]))
    if merged:
        terminal.note(f"{output}: merged {merged} segments")
    manifest = writer.manifest
    counts = {level: sum(each.rows(level) for each in manifest.segments) for level in ("scene", "region", "object")}
    terminal.note(f"{output}: " + ", ".join(f"{count} {level}" for level, count in counts.items()) + " embeddings")
    for level in graph or []:
        with terminal.working(f"building the graph of level {level.value}"):
            built = build_graph(Archive.open(output), level.value)
        terminal.note(f"wrote {built}")
    return exit_code(failed, len(scenes))


def search_archive(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="What `rsvlm index` made.", show_default=False)],
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Words to look for.", show_default=False)] = None,
    near: Annotated[str | None, typer.Option("--near", help="An image to look for; TEXT is then added to it.")] = None,
    level: Annotated[
        SearchLevelChoice | None,
        typer.Option(
            "--level",
            "-l",
            help="What is scored; all is the checkpoint's own score of windows. Default all, with --near scene.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-n", min=1, help="How many to find.")] = 10,
    bbox: Annotated[
        str | None,
        typer.Option(
            "--bbox",
            metavar="W,S,E,N",
            help="Only what meets this box, in degrees; W > E crosses 180.",
            rich_help_panel=_FILTER,
        ),
    ] = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="DATE", help="Only scenes of this time or later.", rich_help_panel=_FILTER)
    ] = None,
    before: Annotated[
        str | None, typer.Option("--before", metavar="DATE", help="Only scenes of an earlier time.", rich_help_panel=_FILTER)
    ] = None,
    gsd: Annotated[
        str | None,
        typer.Option("--gsd", metavar="MIN,MAX", help="Only scenes of so many metres per pixel.", rich_help_panel=_FILTER),
    ] = None,
    query_weight: Annotated[
        float | None, typer.Option("--query-weight", help="Weight of TEXT beside an image; default from the checkpoint.")
    ] = None,
    way: Annotated[
        WayChoice,
        typer.Option("--way", help=f"auto: exact below {GRAPH_FROM_ROWS:,} rows, from there on a graph where there is one."),
    ] = WayChoice.auto,
    output_format: Annotated[
        SearchFormat,
        typer.Option("--format", "-f", help="text, json: one object per line, or geojson.", rich_help_panel=_RESULT),
    ] = SearchFormat.text,
    ask: Annotated[
        str | None,
        typer.Option("--ask", metavar="QUESTION", help="Ask about each find, from kept features.", rich_help_panel=_ANSWER),
    ] = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Describe each find, from kept features.", rich_help_panel=_ANSWER)
    ] = False,
    choice: opt.Choice = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the finds: .geojson, or .png for a contact sheet; repeatable.",
            rich_help_panel=_RESULT,
        ),
    ] = None,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = 4,
    max_new_tokens: opt.MaxNewTokens = 64,
) -> int:
    """The windows of an archive that fit words or an image best: rsvlm search ARCHIVE "harbour with many ships"."""
    opt.check_words("TEXT", text)
    opt.check_words("--ask", ask)
    if describe and ask is not None:
        raise InputError("--describe asks for a caption, got --ask too; give one of them")
    choices = check_labels(choice, "--choice") if choice else None
    if choices and ask is None:
        raise InputError("--choice needs a question, got none; add --ask QUESTION")
    if text is None and near is None:
        raise InputError("give a TEXT or --near, got neither; write rsvlm search ARCHIVE WORDS")
    for path in output or []:
        check_results_path(path)
    filters = Filters(
        _numbers("--bbox", bbox, 4, "5.5,47.2,15.1,55.1"),  # type: ignore[arg-type]
        None if after is None else parse_time(after, "--after").timestamp(),
        None if before is None else parse_time(before, "--before").timestamp(),
        _numbers("--gsd", gsd, 2, "0.1,2"),  # type: ignore[arg-type]
    )
    found = Archive.open(archive)
    found.require_embedder(embedder_of(_checkpoint(checkpoint)))
    with terminal.working("loading the checkpoint"):
        model = RSVLM.from_pretrained(checkpoint, backend, precision)
    if describe or ask is not None:
        found.require_features(model.backend.name, model.backend.precision)
    query = _query(model, text, near, None if level is None else level.value, query_weight, found.manifest.encoding)
    check_query(found, query)
    with terminal.working("searching"):
        result = find(found, query, top, filters, way.value)
    if not result.exact:
        terminal.note("searched a graph, which may miss finds; --way exact misses none")
    if describe or ask is not None:
        views = list(dict.fromkeys(hit.view_name for hit in result.hits))  # finds may share one
        generation = GenerationSettings(max_new_tokens)
        answers = answer_views(model, found, views, ask, choices=choices, batch_size=batch_size, generation=generation)
        result = _answered(result, dict(zip(views, terminal.each(answers, "answers", len(views)), strict=True)))
    words = " ".join(filter(None, [text, None if near is None else f"near {Path(near).name}"]))
    if result.num_unknown:
        terminal.note(f"{result.num_unknown} scenes do not say what a filter asks for, and were left out")
    if output_format is SearchFormat.geojson:
        terminal.data(results_geojson(result, words), end="")
    for hit in result.hits:
        if output_format is SearchFormat.json:
            terminal.json(hit_values(hit))
        elif output_format is SearchFormat.text:
            terminal.data(hit_line(hit))
    for path in output or []:
        write_results(path.expanduser(), result, words)
        terminal.note(f"wrote {path}")
    return EXIT_OK


def _answered(result: SearchResult, answers: Mapping[str, Answer]) -> SearchResult:
    """The finds with what was said about their views."""
    for answer in answers.values():
        for warning in answer.warnings:
            terminal.note(f"warning: {answer.source}: {warning}")
    hits = [dataclasses.replace(hit, answer=answers[hit.view_name].text) for hit in result.hits]
    return dataclasses.replace(result, hits=hits)


def _query(
    model: RSVLM,
    text: str | None,
    near: str | None,
    level: SearchLevel | None,
    query_weight: float | None,
    encoding: Mapping[str, Any],
) -> ArchiveQuery:
    """The embeddings of what is looked for. An image stands for itself, read and planned as the archive's scenes were: its scene, its
    whole as a region, or its objects."""
    alignment = require_alignment(model.config)
    embedded = None if text is None else model.embed_text(text)
    if near is None:
        chosen = level or "all"
        return ArchiveQuery(chosen, embedded, weights=alignment.weights, salient=alignment.salient_patches)
    chosen = level or "scene"
    if chosen == "all":
        raise InputError("--level all scores texts, got --near too; choose --level scene, region or object")
    bands = encoding["bands"]
    levels = model.embed_levels(
        near,
        bands=None if bands is None else tuple(bands),
        **{name: encoding[name] for name in ("tiling", "max_tiles", "max_visual_tokens")},
    )
    visual = {
        "scene": levels.scene[None],
        "region": levels.region[:1],
        "object": levels.object[:1].reshape(-1, alignment.embed_size),
    }
    augmentation = model.config.augmentation or AugmentationConfig(num_heads=1)  # for its default
    weight = augmentation.query_weight if query_weight is None else query_weight
    return ArchiveQuery(chosen, embedded, visual[chosen], weight)


def _numbers(name: str, text: str | None, count: int, example: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise InputError(f"{name} must be {count} numbers with commas, got {text!r}; write for example {name} {example}")
    return values


def _told(output_format: opt.Format, name: str, state: str, values: dict[str, object]) -> None:
    if output_format is opt.Format.json:
        terminal.json({"source": name, "state": state, **values})
    else:
        terminal.data("\t".join([name, state, *(f"{key} {value}" for key, value in values.items() if value is not None)]))


def _checkpoint(checkpoint: Path | None) -> Path:
    return default_checkpoint() if checkpoint is None else checkpoint.expanduser()
