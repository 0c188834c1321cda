"""Owns `rsvlm kb`: build, show and search a knowledge base. Knows the pipeline and the store, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..config import LEVELS, AugmentationConfig
from ..errors import CheckpointError, InputError
from ..evaluation.datasets import read_rsicd
from ..knowledge.mine import MIN_IMAGES, Entry, mine, read_lexicon, read_scenes
from ..knowledge.own import read_own_entries
from ..knowledge.store import EMBEDDINGS, ENTRIES, KnowledgeBase
from ..models.load import embedder_digest
from ..pipeline import RSVLM, default_checkpoint
from . import options as opt
from .console import EXIT_OK, Console

EMBED_TOGETHER = 64  # texts between two steps of the progress bar


class LevelChoice(StrEnum):
    object = "object"
    region = "region"
    scene = "scene"


Knowledge = Annotated[
    Path | None,
    typer.Option(
        "--knowledge", "-k", help="Knowledge base folder; default CHECKPOINT/knowledge, else CHECKPOINT-knowledge beside it."
    ),
]
Level = Annotated[LevelChoice | None, typer.Option("--level", "-l", help="Only this level.")]


def knowledge_app(console: Console) -> typer.Typer:
    """The commands of `rsvlm kb`, which write to a console."""
    app = typer.Typer(
        name="kb",
        help="Build, show and search the knowledge base: object nouns, region phrases and scene facts.",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def finish(command: Callable[[], int]) -> None:
        raise typer.Exit(console.run(command))

    @app.command("build")
    def build(
        rsicd: Annotated[
            Path | None,
            typer.Option("--rsicd", help="RSICD folder with captions.json: objects and regions come from its train split."),
        ] = None,
        add: Annotated[
            list[Path] | None, typer.Option("--add", "-a", help="Your own entries: .jsonl or .csv of text, level; repeatable.")
        ] = None,
        extend: Annotated[
            Path | None, typer.Option("--extend", help="Keep the entries of this knowledge base and add to them.")
        ] = None,
        output: Annotated[
            Path | None, typer.Option("--output", "-o", help="Folder to write; default CHECKPOINT-knowledge beside it.")
        ] = None,
        min_images: Annotated[
            int, typer.Option("--min-images", min=1, help="Leave out what fewer training images name.")
        ] = MIN_IMAGES,
        output_format: opt.OutputFormat = opt.Format.text,
        checkpoint: opt.Checkpoint = None,
        backend: opt.Backend = "auto",
        precision: opt.Precision = "auto",
    ) -> None:
        """Mine entries, embed them with the checkpoint's text side and write them to a folder."""
        finish(
            lambda: _build(console, rsicd, add or [], extend, output, min_images, output_format, checkpoint, backend, precision)
        )

    @app.command("show")
    def show(
        knowledge: Knowledge = None,
        level: Level = None,
        output_format: opt.OutputFormat = opt.Format.text,
        checkpoint: opt.Checkpoint = None,
    ) -> None:
        """List entries as lines of level and text."""
        finish(lambda: _show(console, knowledge, level, output_format, checkpoint))

    @app.command("search")
    def search(
        text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Words to look for.", show_default=False)] = None,
        image: Annotated[
            str | None, typer.Option("--image", "-i", help="An image to look for; TEXT is then its query.")
        ] = None,
        level: Level = None,
        top: Annotated[int, typer.Option("--top", min=1, help="Entries for each level.")] = 5,
        query_weight: Annotated[
            float | None, typer.Option("--query-weight", help="Weight of TEXT beside an image; default from the checkpoint.")
        ] = None,
        knowledge: Knowledge = None,
        output_format: opt.OutputFormat = opt.Format.text,
        checkpoint: opt.Checkpoint = None,
        backend: opt.Backend = "auto",
        precision: opt.Precision = "auto",
    ) -> None:
        """The entries nearest to a text, to an image, or to an image and a question, by level."""
        finish(
            lambda: _search(
                console, text, image, level, top, query_weight, knowledge, output_format, checkpoint, backend, precision
            )
        )

    return app


def _build(
    console: Console,
    rsicd: Path | None,
    add: Sequence[Path],
    extend: Path | None,
    output: Path | None,
    min_images: int,
    output_format: opt.Format,
    checkpoint: Path | None,
    backend: str,
    precision: str,
) -> int:
    if extend is not None and rsicd is not None:
        raise InputError("--extend keeps the mined entries of a base and --rsicd mines new ones, got both; choose one of them")
    source = _checkpoint(checkpoint)
    target = _beside(source) if output is None else output.expanduser()
    _check_target(target)
    own = [entry for file in add for entry in read_own_entries(file)]  # mistakes in a file cost no minutes
    embedder = embedder_digest(source)
    kept = None
    if extend is not None:
        kept = KnowledgeBase.load(extend.expanduser())
        kept.require_embedder(embedder)
        mined = []
    else:
        if rsicd is None:
            console.note("no --rsicd: only scene facts and your own entries, no mined objects and regions")
        images = [] if rsicd is None else [(image.theme, image.captions) for image in read_rsicd(rsicd.expanduser(), "train")]
        mined = mine(images, read_lexicon(), read_scenes(), min_images)
    entries = _new_entries([*mined, *own], kept)
    if kept is None or entries:
        with console.working("loading the checkpoint"):
            model = RSVLM.from_pretrained(source, backend, precision)
        vectors = _embed(console, model, [entry.text for entry in entries])
        levels = np.array([entry.level for entry in entries], dtype=np.int8)
        texts = [entry.text for entry in entries]
        if kept is not None:
            texts, levels = [*kept.texts, *texts], np.concatenate([kept.levels, levels])
            vectors = np.concatenate([kept.embeddings.astype(np.float32), vectors])
        base = KnowledgeBase(texts, levels, vectors, embedder)
    else:
        base = kept
    try:
        base.save(target)
    except OSError as error:
        raise InputError(f"--output {target} cannot be written ({error.strerror}); choose another place") from None
    counts = _counts(base)
    if output_format is opt.Format.json:
        console.json({"folder": str(target), "entries": len(base), **counts, "embedder": embedder})
    else:
        console.data(f"{target}\t{len(base)} entries\t" + "\t".join(f"{count} {level}" for level, count in counts.items()))
    return EXIT_OK


def _show(
    console: Console, knowledge: Path | None, level: LevelChoice | None, output_format: opt.Format, checkpoint: Path | None
) -> int:
    base = KnowledgeBase.load(_knowledge(knowledge, checkpoint))
    for index, (text, number) in enumerate(zip(base.texts, base.levels, strict=True)):
        name = LEVELS[number]
        if level is not None and level.value != name:
            continue
        if output_format is opt.Format.json:
            console.json({"id": index, "level": name, "text": text})
        else:
            console.data(f"{name}\t{text}")
    counts = ", ".join(f"{count} {name}" for name, count in _counts(base).items())
    console.note(f"{len(base)} entries ({counts}), embedded by checkpoint {(base.embedder or 'not recorded')[:12]}")
    return EXIT_OK


def _search(
    console: Console,
    text: str | None,
    image: str | None,
    level: LevelChoice | None,
    top: int,
    query_weight: float | None,
    knowledge: Path | None,
    output_format: opt.Format,
    checkpoint: Path | None,
    backend: str,
    precision: str,
) -> int:
    if text is None and image is None:
        raise InputError("give a TEXT or --image, got neither; write rsvlm kb search WORDS")
    base = KnowledgeBase.load(_knowledge(knowledge, checkpoint))
    source = _checkpoint(checkpoint)
    base.require_embedder(embedder_digest(source))
    with console.working("loading the checkpoint"):
        model = RSVLM.from_pretrained(source, backend, precision)
    query = None if text is None else model.embed_text(text)
    seen = None if image is None else model.embed_levels(image)
    settings = model.config.augmentation or AugmentationConfig(num_heads=1)  # for its default of beta
    beta = settings.query_weight if query_weight is None else query_weight
    for number, name in enumerate(LEVELS):
        if level is not None and level.value != name:
            continue
        if seen is None:
            assert query is not None
            visual, asked = query[None], None  # [1, De]: a text alone is searched by plain cosine
        else:
            part: Any = getattr(seen, name)
            if part.size == 0:
                console.note(f"warning: the checkpoint has no {name} head; no {name} entries for an image")
                continue
            visual, asked = part.reshape(-1, part.shape[-1]), query
        for score, index, found in zip(*base.search(number, visual, asked, top, beta), strict=True):
            if output_format is opt.Format.json:
                console.json({"level": name, "score": round(float(score), 6), "id": int(index), "text": found})
            else:
                console.data(f"{name}\t{score:.4f}\t{found}")
    return EXIT_OK


def _new_entries(entries: Sequence[Entry], kept: KnowledgeBase | None) -> list[Entry]:
    """Entries whose text is new at their level, letters' case aside; the first one stays."""
    known = (
        set() if kept is None else {(int(level), text.casefold()) for text, level in zip(kept.texts, kept.levels, strict=True)}
    )
    new = []
    for entry in entries:
        name = (entry.level, entry.text.casefold())
        if name not in known:
            known.add(name)
            new.append(entry)
    return new


def _embed(console: Console, model: RSVLM, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[N, De]. Texts of like length go together, which pads least; the rows come back in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    batches = [order[first : first + EMBED_TOGETHER] for first in range(0, len(order), EMBED_TOGETHER)]
    parts = [model.embed_text([texts[index] for index in batch]) for batch in console.each(batches, "embedding", len(batches))]
    rows = np.concatenate(parts)
    vectors = np.empty_like(rows)
    vectors[order] = rows
    return vectors


def _counts(base: KnowledgeBase) -> dict[str, int]:
    counts = Counter(LEVELS[level] for level in base.levels)
    return {level: counts[level] for level in LEVELS}


def _checkpoint(checkpoint: Path | None) -> Path:
    folder = default_checkpoint() if checkpoint is None else checkpoint.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist; pass a checkpoint folder, or run `rsvlm pull`")
    return folder


def _beside(checkpoint: Path) -> Path:
    """Not inside: a checkpoint is used with a base only when somebody puts it there."""
    folder = checkpoint.resolve()
    return folder.with_name(f"{folder.name}-knowledge")


def _knowledge(knowledge: Path | None, checkpoint: Path | None) -> Path:
    if knowledge is not None:
        return knowledge.expanduser()
    source = _checkpoint(checkpoint)
    places = (source / "knowledge", _beside(source))
    found = next((place for place in places if (place / ENTRIES).is_file()), None)
    if found is None:
        raise InputError(f"no knowledge base in {places[0]} or {places[1]}; run `rsvlm kb build`, or pass --knowledge FOLDER")
    return found


def _check_target(target: Path) -> None:
    """A base replaces its folder whole, so nothing else may lie there.

    Raises:
        InputError: the target is a file, or a folder with other files.
    """
    if target.is_dir():
        others = sorted(path.name for path in target.iterdir() if path.name not in (ENTRIES, EMBEDDINGS))
        if others:
            raise InputError(
                f"--output {target} must be a new folder or a knowledge base, it also holds {others[:5]}; choose another folder"
            )
    elif target.exists():
        raise InputError(f"--output {target} must be a folder, it is a file; choose another place")
