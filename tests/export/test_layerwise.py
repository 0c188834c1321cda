"""int4 of a native package: codes fitted to the rounded layers before, measured on held-out answers, finer where they do damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.export.packages import SPEAKING, random_knowledge, random_model, save_checkpoint, torch, write_tokenizer
from tests.native import needs_native

from rsvlm_export import export as exporting  # isort: skip
from rsvlm_export.export import export_checkpoint
from rsvlm_export.layerwise import CalibrationText, Measure, RoundedLanguage, _finer_kinds, parameters_of, round_language
from rsvlm_export.native import LanguagePlan, lay_out
from rsvlm_export.rounding import block_values, relative_error, round_blocks
from rsvlm_export.text_projection import TextProjection
from rsvlm_infer import RSVLM
from rsvlm_infer.config import RsvlmConfig
from rsvlm_infer.errors import InputError
from rsvlm_infer.layers.language_model import LanguageModel
from rsvlm_infer.models.native_package import NativePackage
from rsvlm_infer.ops.weight_matmul import dequantise, pack_weight

CONFIG = dataclasses.replace(
    SPEAKING,
    language=dataclasses.replace(SPEAKING.language, hidden_size=64, num_layers=3),  # type: ignore[type-var]
)
LOOSE = {"divergence": 1e9, "turn": 1e9}
FIRST = "language_model.layers.0."


def _language(config: RsvlmConfig = CONFIG, seed: int = 0) -> LanguageModel:
    language = random_model(config, seed).language_model
    assert language is not None
    return language


def _texts(count: int = 24, length: int = 40) -> list[CalibrationText]:
    """Rows whose entries go together, as embeddings do; every fourth is held out, the second half of each is an answer."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(8, 64))
    found = []
    for index in range(count):
        rows = rng.normal(size=(length + index % 3, 8)) @ mixing + 0.3 * rng.normal(size=(length + index % 3, 64))
        found.append(CalibrationText(rows.astype(np.float32), length // 2, index % 4 == 3))
    return found


def _nearest(model: LanguageModel, texts: list[CalibrationText]) -> float:
    """The divergence of nearest int4 codes, written out once more."""
    twin = _language()
    for layer in twin.layers:
        for value in layer.parameters():
            if value.ndim == 2:
                codes = round_blocks(value.numpy(), 4, symmetric=True)
                value.copy_(torch.from_numpy(block_values(codes, value.shape[1])))
    table = dequantise(pack_weight(model.embed_tokens.weight, "int8"))
    total, count = 0.0, 0
    for text in texts:
        if text.held_out:
            x = torch.from_numpy(text.embeddings)[None]
            positions = torch.arange(x.shape[1])[None]
            exact = torch.log_softmax(model.logits(model(x, positions))[0, text.answer - 1 :], dim=1)
            own = torch.log_softmax((twin(x, positions) @ table.T)[0, text.answer - 1 :], dim=1)
            total += float((exact.exp() * (exact - own)).sum())
            count += len(exact)
    return total / count


def test_fitted_codes_diverge_less_than_the_nearest_ones() -> None:
    model, texts = _language(), _texts()
    found = round_language(model, texts, LOOSE)
    assert set(found.kinds.values()) == {"int4", "int8"}
    assert found.kinds["language_model.embed_tokens"] == "int8"
    assert 0 < found.measures["divergence"].value < 0.7 * _nearest(model, texts)
    for name, packed in found.packed.items():  # the twin is what the codes stand for
        assert packed.kind == "int4"
        value = found.twin.get_parameter(f"{name.removeprefix('language_model.')}.weight")
        assert torch.equal(value, dequantise(packed))
    assert not any(parameter.requires_grad for parameter in found.twin.parameters())


def test_the_model_itself_stays_as_it_was() -> None:
    model = _language()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    round_language(model, _texts(8), LOOSE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _numel(model: LanguageModel, name: str) -> int:
    return model.get_parameter(f"{name.removeprefix('language_model.')}.weight").numel()


def test_what_does_damage_becomes_int8_until_the_limit_holds() -> None:
    model, texts = _language(), _texts()
    coarse = round_language(model, texts, LOOSE)
    sizes = {name: sum(_numel(model, part) for part in parameters_of(name)) for name in coarse.damages["divergence"]}
    heaviest = max(sizes, key=lambda name: coarse.damages["divergence"][name] / sizes[name])
    lines: list[str] = []
    finer = round_language(model, texts, {"divergence": coarse.measures["divergence"].value * 0.5}, lines.append)
    assert finer.measures["divergence"].value <= coarse.measures["divergence"].value * 0.5
    raised = {name for name, kind in finer.kinds.items() if kind == "int8"} - {"language_model.embed_tokens"}
    assert heaviest in raised
    assert len(raised) < len(sizes)
    assert all(finer.packed[part].kind == "int8" for name in raised for part in parameters_of(name))
    assert sum("divergence" in line for line in lines) >= 2
    exact = round_language(model, texts, {"divergence": 0.0})  # it ends, although nothing reaches zero
    assert set(exact.kinds.values()) == {"int8"}
    assert exact.measures["divergence"].value < 0.1 * coarse.measures["divergence"].value


def _projection() -> TextProjection:
    """Eight wide."""
    return TextProjection(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), None)


def _with_embedded(texts: list[CalibrationText]) -> list[CalibrationText]:
    """The same, and each once more as a text that is embedded: there nothing was chosen."""
    return [*texts, *(dataclasses.replace(text, answer=len(text.embeddings)) for text in texts)]


def _turn(model: LanguageModel, twin: LanguageModel, texts: list[CalibrationText]) -> float:
    """The mean 1 - cosine of held-out embedded texts, text by text, when the twin's projection is fitted to the others."""
    states: dict[bool, list[list[torch.Tensor]]] = {True: [], False: []}
    for text in texts:
        if text.answer == len(text.embeddings):
            x = torch.from_numpy(text.embeddings)[None]
            states[text.held_out].append([one(x, torch.arange(x.shape[1])[None])[0, -1] for one in (model, twin)])
    exact, own = (torch.stack(each) for each in zip(*states[False], strict=True))
    fitted = _projection().refitted(exact, own)
    return sum(1 - float(_projection().embed(a) @ fitted.embed(b)) for a, b in states[True]) / len(states[True])


def test_embedded_texts_have_a_limit_of_their_own() -> None:
    """Answers are well within theirs, so only the turn of embedded texts can raise matrices."""
    model, texts = _language(), _with_embedded(_texts())
    coarse = round_language(model, texts, LOOSE, projection=_projection())
    turn = coarse.measures["turn"]
    assert turn.value == pytest.approx(_turn(model, coarse.twin, texts), rel=1e-3)
    assert (
        0
        < coarse.measures["divergence"].value
        == pytest.approx(round_language(model, texts, LOOSE).measures["divergence"].value)
    )
    assert sum(turn.damages.values()) == pytest.approx(
        turn.value, rel=0.5
    )  # near its minimum: halves of gradients add up to it
    sizes = {name: sum(_numel(model, part) for part in parameters_of(name)) for name in turn.damages}
    finer = round_language(model, texts, LOOSE | {"turn": turn.value * 0.6}, projection=_projection())
    assert finer.measures["turn"].value <= turn.value * 0.6
    assert finer.measures["turn"].value == pytest.approx(_turn(model, finer.twin, texts), rel=1e-3)
    raised = {name for name, kind in finer.kinds.items() if kind == "int8"} - {"language_model.embed_tokens"}
    assert max(sizes, key=lambda name: turn.damages[name] / sizes[name]) in raised
    assert len(raised) < len(sizes)


def test_a_matrix_that_both_measures_want_counts_for_both() -> None:
    model = _language()
    names = [f"language_model.layers.{index}.attention.o" for index in range(3)]
    first = Measure(3.0, 1.0, dict(zip(names, (2.0, 0.5, 0.5), strict=True)))
    second = Measure(2.0, 1.0, dict(zip(names, (0.4, 0.5, 1.1), strict=True)))
    assert _finer_kinds(model, [first], 1).keys() == {names[0]}
    assert _finer_kinds(model, [first, second], 1).keys() == {names[0], names[2]}
    assert _finer_kinds(model, [first, dataclasses.replace(second, value=1.3)], 1).keys() == {names[0]}
    assert _finer_kinds(model, [first, dataclasses.replace(second, value=1.3)], 2).keys() == {names[0], names[1]}
    assert _finer_kinds(model, [dataclasses.replace(first, value=1.0)], 2) == {}


def test_matrices_without_whole_groups_stay_bf16() -> None:
    language = dataclasses.replace(CONFIG.language, intermediate_size=72)  # type: ignore[type-var]
    config = dataclasses.replace(CONFIG, language=language)
    found = round_language(_language(config), _texts(8), LOOSE)
    assert f"{FIRST}mlp.down" not in found.kinds
    assert found.kinds[f"{FIRST}mlp.gate_up"] == "int4"


@needs_native
def test_fitted_codes_reach_the_package() -> None:
    """q, k and v are one matrix there, gates and ups take turns by blocks of 32 rows, and int8 and int4 stand side by side."""
    from rsvlm_infer import _C

    state = random_model(CONFIG).state_dict()
    found = round_language(_language(), _texts(8), LOOSE)
    kinds = found.kinds | {f"{FIRST}mlp.down": "int8"}
    packed = found.packed | {f"{FIRST}mlp.down": found.finer[f"{FIRST}mlp.down"]}
    laid = lay_out(CONFIG, state, "int4", LanguagePlan(kinds, packed))
    assert {name: laid[name][0] for name in kinds} == kinds
    twin = RoundedLanguage(found.twin, kinds).twin
    twin.get_parameter("layers.0.mlp.down.weight").copy_(dequantise(packed[f"{FIRST}mlp.down"]))
    language = CONFIG.language
    assert language is not None
    settings = {name: float(value) for name, value in dataclasses.asdict(language).items() if not isinstance(value, str)}
    weights = {
        name: (kind, rows, columns, np.ascontiguousarray(content).reshape(-1).view(np.uint8))
        for name, (kind, rows, columns, content) in laid.items()
    }
    exponent = np.arange(language.head_dim // 2, dtype=np.float32) * 2 / language.head_dim
    frequencies = (1 / language.rope_theta**exponent).astype(np.float32)
    decoder = _C.NativeDecoder(weights=weights, settings=settings, frequencies=frequencies, cache="bfloat16")
    x = _texts(1)[0].embeddings
    cache = decoder.cache(rows=1, capacity=len(x))
    states = decoder.prefill(
        cache=cache,
        rows=np.zeros(1, np.int64),
        positions=np.zeros(1, np.int64),
        lengths=np.array([len(x)], np.int64),
        embeddings=x,
    )
    positions = torch.arange(len(x))[None]
    with torch.no_grad():
        expected = twin(torch.from_numpy(x)[None], positions)[0, -1].numpy()
        exact = _language()(torch.from_numpy(x)[None], positions)[0, -1].numpy()
    error = relative_error(states[0], expected)
    assert error < 0.03  # products in bfloat16; a row in the wrong place gives 1
    assert error < 0.5 * relative_error(states[0], exact)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(6):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@needs_native
def test_export_calibrates_and_writes_down_what_it_chose(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knowledge = tmp_path / "entries"
    random_knowledge().save(knowledge)
    state, words = random_model(CONFIG).state_dict(), write_tokenizer(tmp_path / "words")
    checkpoint = save_checkpoint(tmp_path / "checkpoint", CONFIG, state, knowledge=knowledge, tokenizer=words)
    options = {"format": "native", "precision": "int4"}
    monkeypatch.setattr(exporting, "LIMITS", {"divergence": 0.0, "turn": 0.0})
    package = NativePackage.open(export_checkpoint(checkpoint, tmp_path / "package", calibrate=images, **options))  # type: ignore[arg-type]
    layers = {layer["name"]: layer for layer in package.manifest["layers"]}
    assert {layer["kept"] for layer in layers.values()} == {"int8"}  # nothing else is within a limit of zero
    assert all(layer["damages"].keys() == {"divergence", "turn"} for layer in layers.values() if layer["asked"] == "int4")
    measures = package.manifest["calibration"]["measures"]
    assert {name: measure["limit"] for name, measure in measures.items()} == {"divergence": 0, "turn": 0}
    assert all(0 < measure["value"] < 0.1 for measure in measures.values())
    assert package.manifest["calibration"]["held_out"] == 4  # one of 6 prompts, three of 6 captions, 4 words and 4 labels
    projection = package.manifest["calibration"]["text_projection"]
    assert (projection["texts"], projection["held_out"]) == (11, 3)
    assert projection["fitted"] is (projection["turn"]["after"] < projection["turn"]["before"])
    for name, layer in layers.items():
        assert package.weights[name][0] == layer["kept"]
    assert len(RSVLM.from_pretrained(package.path).caption(images / "0.png", max_new_tokens=3).token_ids) > 0
    assert json.loads((package.path / "manifest.json").read_text())["precision"] == "int4"
    for arguments, words_of_error in (
        (options, "--calibrate must name images"),
        ({**options, "precision": "bf16", "calibrate": images}, "--calibrate must be left out"),
        ({**options, "calibrate": images, "calibration_images": 2}, "--calibrate needs at least 4 images"),
    ):
        with pytest.raises(InputError, match=words_of_error):
            export_checkpoint(checkpoint, tmp_path / "other", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "other").exists()
