"""RSVLM on a fake backend whose answers are known, and once on the real model with random weights."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rsvlm_infer
from rsvlm_infer.config import AlignmentConfig, AugmentationConfig, DrisConfig
from rsvlm_infer.errors import CheckpointError, ImageReadError, InputError
from rsvlm_infer.pipeline import RSVLM, default_checkpoint
from rsvlm_infer.tasks.caption import CAPTION_PROMPT
from rsvlm_infer.text.tokenizer import Tokenizer
from tests.tasks.telling_model import TellingBackend, byte_ids, load_tokenizer, picture, telling_config


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend() -> TellingBackend:
    return TellingBackend()


@pytest.fixture
def model(backend: TellingBackend, tokenizer: Tokenizer) -> RSVLM:
    return RSVLM(backend, tokenizer)


def test_caption_carries_text_tokens_plan_and_timings(model: RSVLM, backend: TellingBackend) -> None:
    answer = model.caption(picture("green"))
    assert answer.ok
    assert answer.text == "A green scene."
    assert answer.token_ids == tuple(byte_ids(" A green scene.\n"))
    assert answer.finish_reason == "stop_id"
    assert answer.tokens.visual == 4
    assert answer.tokens.generated == len(" A green scene.\n") + 1
    assert answer.tokens.prompt == len(backend.prompts[0])
    assert answer.plan is not None
    assert len(answer.plan.tiles) == 1
    assert answer.cues == ("a cue",)
    times = answer.timings
    assert (times.encode_ms, times.augment_ms) == (2.0, 1.0)
    assert min(times.read_ms, times.plan_ms, times.preprocess_ms, times.prefill_ms, times.decode_ms) > 0
    assert times.ttft_ms > times.read_ms + times.plan_ms + times.preprocess_ms
    assert times.tpot_ms == pytest.approx(times.decode_ms / (answer.tokens.generated - 1))


def test_the_prompt_is_the_default_or_the_users(model: RSVLM, backend: TellingBackend) -> None:
    model.caption(picture("red"))
    model.caption(picture("red"), prompt="Roads?")
    model.ask(picture("red"), "How many?")
    assert [text.strip() for text in backend.prompts] == [CAPTION_PROMPT, "Roads?", "How many?"]


def test_streamed_pieces_join_to_the_same_text(model: RSVLM) -> None:
    stream = model.caption(picture("blue"), stream=True)
    with pytest.raises(InputError, match="only when the stream is exhausted"):
        _ = stream.answer
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.answer.text == model.caption(picture("blue")).text == "A blue scene."
    assert "".join(model.ask(picture("red"), "What?", stream=True)) == "A red scene."


def test_stop_strings_and_length(model: RSVLM) -> None:
    assert model.caption(picture("red"), stop=("scene",)).text == "A red"
    assert model.caption(picture("red"), stop="scene").finish_reason == "stop_text"
    short = model.caption(picture("red"), max_new_tokens=3)
    assert (short.text, short.finish_reason, short.tokens.generated) == ("A", "length", 3)
    one = model.caption(picture("red"), max_new_tokens=1)
    assert (one.timings.decode_ms, one.timings.tpot_ms) == (0.0, 0.0)


def test_choices_allow_nothing_else(model: RSVLM, backend: TellingBackend) -> None:
    backend.reply = "b"
    answer = model.ask(picture("red"), "a or b?", choices=["aa", "bb"])
    assert (answer.text, answer.finish_reason) == ("bb", "choice")
    with pytest.raises(InputError, match="choices must hold at least two texts"):
        model.ask(picture("red"), "a?", choices=["a"])


def test_every_kind_of_source_gives_the_same_answer(model: RSVLM, tmp_path: Path) -> None:
    file = tmp_path / "green.png"
    image = Image.fromarray(picture("green"))
    image.save(file)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sources = [file, str(file), buffer.getvalue(), image, picture("green")]
    assert [model.caption(source).text for source in sources] == ["A green scene."] * 5


def test_caption_many_keeps_order_and_survives_bad_images(model: RSVLM, backend: TellingBackend, tmp_path: Path) -> None:
    images = [picture("red"), tmp_path / "absent.png", picture("green", 56, 40), b"rubbish", picture("blue")]
    answers = list(model.caption_many(images, batch_size=3))
    assert [answer.text for answer in answers] == ["A red scene.", "", "A green scene.", "", "A blue scene."]
    assert [answer.ok for answer in answers] == [True, False, True, False, True]
    assert isinstance(answers[1].error, ImageReadError)
    assert answers[1].source.endswith("absent.png")
    assert answers[1].to_dict() == {"source": answers[1].source, "error": str(answers[1].error)}
    assert backend.prefills == [2, 1]
    with pytest.raises(ImageReadError):
        list(model.caption_many(images, strict=True))


def test_the_time_to_the_first_token_counts_the_groups_before(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in a batch of an engine of one row: each waits for the ones before it, on a clock that only prefill moves."""
    clock = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    backend = TellingBackend()
    prefill = backend.prefill

    def slow_prefill(*arguments: Any) -> Any:
        clock[0] += 2
        return prefill(*arguments)

    monkeypatch.setattr(backend, "prefill", slow_prefill)
    images = [picture(colour) for colour in ("red", "green", "blue")]
    answers = list(RSVLM(backend, tokenizer, max_batch=1).caption_many(images, batch_size=3))
    assert [answer.timings.prefill_ms for answer in answers] == [2000, 2000, 2000]
    assert [answer.timings.ttft_ms for answer in answers] == [2000, 4000, 6000]
    together = list(RSVLM(backend, tokenizer).caption_many(images, batch_size=3))
    assert [answer.timings.ttft_ms for answer in together] == [2000, 2000, 2000]


def test_caption_many_is_lazy(model: RSVLM) -> None:
    read: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for index in range(6):
            read.append(index)
            yield picture("red")

    answers = model.caption_many(images(), batch_size=2)
    assert read == []
    next(answers)
    assert read == [0, 1]
    assert len(list(answers)) == 5


def test_a_prompt_too_long_for_one_image_does_not_lose_the_others(tokenizer: Tokenizer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    config = telling_config(tiling="dris")
    config = dataclasses.replace(config, language=dataclasses.replace(config.language, max_positions=150))  # type: ignore[type-var]
    answers = list(RSVLM(TellingBackend(config), tokenizer).caption_many([picture("red"), image], max_new_tokens=60))
    assert answers[0].text == "A red scene."
    assert "lower max_visual_tokens" in str(answers[1].error)


def test_a_prompt_that_does_not_fit_raises_for_one_image_and_when_strict(model: RSVLM) -> None:
    for call in (model.caption, lambda image, **options: list(model.caption_many([image], strict=True, **options))):
        with pytest.raises(InputError, match="need 604 positions, but the model has 512"):
            call(picture("red"), prompt="a" * 500, max_new_tokens=100)


def test_a_blank_prompt_is_refused_where_the_template_needs_one(tokenizer: Tokenizer) -> None:
    chat = RSVLM(TellingBackend(telling_config(chat_template="vicuna_v1")), tokenizer)
    with pytest.raises(InputError, match="prompt must hold a question, got only blanks"):
        chat.caption(picture("red"), prompt="  ")
    assert RSVLM(TellingBackend(), tokenizer).caption(picture("red"), prompt="  ").text == "A red scene."


def test_settings_are_checked_before_any_image_is_read(model: RSVLM) -> None:
    with pytest.raises(InputError, match="max_new_tokens must be at least 1"):
        model.caption(picture("red"), max_new_tokens=0)
    with pytest.raises(InputError, match="batch_size must be at least 1"):
        model.caption_many([], batch_size=0)
    with pytest.raises(InputError, match=r"top_p must be in \(0, 1\]"):
        model.caption_many([], top_p=0.0)
    with pytest.raises(InputError, match=r"several images, got the single 'a\.png'"):
        model.caption_many("a.png")
    with pytest.raises(InputError, match="question must not be blank"):
        model.ask(picture("red"), " ")
    with pytest.raises(InputError, match="stop strings must not be empty"):
        model.caption(picture("red"), stop=("",))
    with pytest.raises(TypeError, match="maxtokens"):
        model.caption(picture("red"), maxtokens=3)  # type: ignore[call-arg]


WRONG_TYPES: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m.caption("a.png", bands=5), "bands must be a sequence of whole numbers, got 5 (int); pass for example"),
    (lambda m: m.caption("a.png", bands="321"), "bands must be a sequence of whole numbers, got '321' (str)"),
    (lambda m: m.plan("a.png", max_pixels="a"), "max_pixels must be a whole number, got 'a' (str); pass an int"),
    (lambda m: m.plan("a.png", max_tiles=1.5), "max_tiles must be a whole number, got 1.5 (float); pass an int"),
    (lambda m: m.caption("a.png", max_new_tokens=2.5), "max_new_tokens must be a whole number, got 2.5 (float)"),
    (lambda m: m.caption("a.png", prompt=7), "prompt must be a text, got 7 (int); pass a str"),
    (lambda m: m.caption("a.png", stop=5), "stop must be a list of texts, got 5 (int); pass a list"),
    (lambda m: m.caption("a.png", stop=["x", 5]), "stop[1] must be a text, got 5 (int); pass a str"),
    (lambda m: m.ask("a.png", None), "question must be a text, got None (NoneType); pass a str"),
    (lambda m: m.ask_many(["a.png"], "A?", choices=["a", 3]), "choices[1] must be a text, got 3 (int); pass a str"),
    (lambda m: m.classify("a.png", ["a", 3]), "labels[1] must be a text, got 3 (int); pass a str"),
    (lambda m: m.score("a.png", "forest"), "texts must be a list of texts, got the single text 'forest'; pass a list"),
    (lambda m: m.score("a.png", None), "texts must be a list of texts, got None (NoneType); pass a list"),
    (lambda m: m.embed_text(5), "text must be a list of texts, got 5 (int); pass a list"),
    (lambda m: m.caption_many(["a.png"], batch_size=1.5), "batch_size must be a whole number, got 1.5 (float)"),
    (lambda m: m.caption_many(5), "images must be several images, got int; pass a list of them"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_a_wrong_type_is_an_input_error_before_the_image_is_read(
    model: RSVLM, call: Callable[[RSVLM], Any], message: str
) -> None:
    """The image is absent, so a check that came later would be an ImageReadError."""
    with pytest.raises(InputError, match=re.escape(message)):
        call(model)


def test_labels_choices_and_stops_may_come_from_an_iterator(model: RSVLM, backend: TellingBackend) -> None:
    assert model.classify(picture("red"), iter(["a", "b", "c"]), template="{label}").label == "b"  # type: ignore[arg-type]
    assert model.caption(picture("red"), stop=iter(["scene"])).text == "A red"  # type: ignore[call-overload]
    backend.reply = "b"
    answers = model.ask_many([picture("red"), picture("green")], "?", choices=iter(["aa", "bb"]), batch_size=1)  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == ["bb", "bb"]


def test_ask_many_and_sampling_with_a_seed(model: RSVLM) -> None:
    answers = list(model.ask_many([picture("red"), picture("blue")], "What colour?", temperature=0.5, seed=3))
    alone = model.ask(picture("blue"), "What colour?", temperature=0.5, seed=3)
    assert answers[1].token_ids == alone.token_ids


def test_classify_by_alignment(model: RSVLM) -> None:
    """The fake text embedding is the last id modulo 3: '{label}' with labels a, b, c ends in 98 99 100, that is 2 0 1."""
    result = model.classify(picture("red"), ["a", "b", "c"], template="{label}")
    assert (result.label, result.method) == ("b", "alignment")
    colours = (np.array([200, 10, 10]) / 255 - 0.5) / 0.5
    colours /= np.linalg.norm(colours)
    np.testing.assert_allclose([result.raw_scores[name] for name in "bca"], colours, atol=1e-5)
    weights = np.exp(10 * colours)
    np.testing.assert_allclose([result.scores[name] for name in "bca"], weights / weights.sum(), atol=1e-5)
    assert result.timings.encode_ms == 2.0
    assert model.classify(picture("green"), ["a", "b", "c"], template="{label}").label == "c"


def test_classify_by_language(model: RSVLM, backend: TellingBackend) -> None:
    backend.reply = "sea"
    result = model.classify(picture("red"), ["forest", "sea", "sand"], method="language")
    assert (result.label, result.method) == ("sea", "language")
    assert list(result.scores) == ["sea", "sand", "forest"]
    assert result.raw_scores["sea"] == pytest.approx(-np.log(1 + 257 * np.exp(-8.0)), abs=1e-5)
    assert "forest, sea, sand" in backend.prompts[0]
    assert result.timings.prefill_ms > 0


def test_embeddings_of_images_and_texts(model: RSVLM) -> None:
    red = model.embed_image(picture("red"))
    assert red.shape == (3,)
    assert int(red.argmax()) == 0
    assert model.embed_image(picture("red"), level="region").shape == (1, 3)
    assert model.embed_text("b").tolist() == [1, 0, 0]
    assert model.embed_text(["b", "c"]).tolist() == [[1, 0, 0], [0, 1, 0]]
    np.testing.assert_allclose(model.score(picture("red"), ["b", "c"]), red[:2], atol=1e-6)
    with pytest.raises(InputError, match="at least one text"):
        model.embed_text([])
    with pytest.raises(InputError, match="level must be one of"):
        model.embed_image(picture("red"), level="pixel")  # type: ignore[arg-type]


def test_models_without_a_part_say_what_they_can_do(tokenizer: Tokenizer) -> None:
    blind = RSVLM(TellingBackend(telling_config(alignment=None)), tokenizer)
    with pytest.raises(InputError, match="no alignment heads"):
        blind.embed_image(picture("red"))
    with pytest.raises(InputError, match="no alignment heads"):
        blind.embed_text("sea")
    mute = RSVLM(TellingBackend(telling_config(language=None, projector=None, alignment=None)), tokenizer)
    with pytest.raises(InputError, match="no language model"):
        mute.caption(picture("red"))
    with pytest.raises(InputError, match="no language model"):
        mute.caption_many([picture("red")])


def test_the_query_reaches_the_augmentation(tokenizer: Tokenizer) -> None:
    backend = TellingBackend(telling_config(augmentation=AugmentationConfig(num_heads=2)))
    RSVLM(backend, tokenizer).ask(picture("red"), "abc")
    (query,) = backend.queries
    assert query is not None
    assert query.token_ids.tolist() == byte_ids("abc")
    assert query.embedding.tolist() == [0, 1, 0]  # id 100 modulo 3
    plain = TellingBackend()
    RSVLM(plain, tokenizer).ask(picture("red"), "abc")
    assert plain.queries == [None]


def test_the_same_question_is_embedded_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TellingBackend(
        telling_config(augmentation=AugmentationConfig(num_heads=2), alignment=AlignmentConfig(embed_size=3))
    )
    model, embedded = RSVLM(backend, tokenizer), []
    embed = backend.embed_text

    def counted(token_ids: Any) -> Any:
        embedded.append(len(token_ids))
        return embed(token_ids)

    monkeypatch.setattr(backend, "embed_text", counted)
    for question in ("abc", "abc", "abd", "abc"):
        model.ask(picture("green"), question)
    assert len(embedded) == 3  # the last one is kept, not all of them
    queries = [query.token_ids.tolist() for query in backend.queries if query is not None]
    assert queries == [byte_ids(question) for question in ("abc", "abc", "abd", "abc")]


def test_a_question_steers_a_query_aware_plan(tokenizer: Tokenizer) -> None:
    """Half red, half green with equal noise: a question whose embedding is red refines the red half first."""
    dris = DrisConfig(
        leaf_grids=(2, 4), leaf_thresholds=(0.2,), max_tiles=12, max_visual_tokens=256, query_aware=True, min_gain=0.02
    )
    config = telling_config(tiling="dris", dris=dris, alignment=AlignmentConfig(embed_size=3))
    image = np.random.default_rng(0).integers(0, 120, (448, 448, 1), dtype=np.uint8).repeat(3, axis=2)
    image[:, :224, 0] += 120
    image[:, 224:, 1] += 120
    model = RSVLM(TellingBackend(config), tokenizer)

    def finest(question: str) -> set[bool]:
        plan = model.ask(image, question, max_new_tokens=1).plan
        assert plan is not None
        deepest = max(tile.depth for tile in plan.tiles)
        return {tile.col_off < 224 for tile in plan.tiles if tile.depth == deepest}

    assert finest("b") == {True}
    assert finest("c") == {False}
    assert model.caption(image, max_new_tokens=1).plan == model.plan(image).plan  # no words of the user, no second plan


def test_plan_needs_no_encoder(model: RSVLM, backend: TellingBackend) -> None:
    assert model.plan(picture("red")).num_tokens == 4
    assert backend.encoded == []


def test_the_default_checkpoint_follows_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RSVLM_HOME", str(tmp_path))
    assert default_checkpoint() == tmp_path / "rsvlm-135m"
    with pytest.raises(CheckpointError, match="run `rsvlm pull`"):
        RSVLM.from_pretrained()
    with pytest.raises(CheckpointError, match=r"pass a folder that holds config\.json"):
        RSVLM.from_pretrained(tmp_path / "nothing")
    monkeypatch.delenv("RSVLM_HOME")
    assert default_checkpoint() == Path.home() / ".cache" / "rsvlm" / "rsvlm-135m"


def test_public_names_are_few_lazy_and_known() -> None:
    assert sorted(rsvlm_infer.__all__) == [
        "Answer",
        "Classification",
        "RSVLM",
        "RsvlmConfig",
        "RsvlmError",
        "__version__",
        "open_scene",
        "plan_scene",
    ]
    assert rsvlm_infer.RSVLM is RSVLM
    assert dir(rsvlm_infer) == sorted(rsvlm_infer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Captioner'; public names are"):
        _ = rsvlm_infer.Captioner


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, rsvlm_infer; rsvlm_infer.RSVLM;"
        "print([name for name in ('torch', 'onnxruntime', 'rasterio', 'tensorrt', 'transformers') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
