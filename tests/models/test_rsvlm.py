"""The whole model: a part that is off is absent, and an untrained one changes no bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from rsvlm_infer.config import AlignmentConfig, ExpertsConfig  # noqa: E402
from rsvlm_infer.models.rsvlm import RsvlmModel  # noqa: E402
from rsvlm_infer.ops import registry  # noqa: E402
from tests.models.tiny import FULL, PLAIN, random_model  # noqa: E402

TAPS = [torch.randn(9, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_without_experts_and_augmentation_the_last_tap_goes_through_untouched() -> None:
    model = random_model(PLAIN)
    assert (model.experts, model.augmentation, model.alignment, model.text_encoder, model.image_newline) == (None,) * 5
    assert model.bridge(TAPS, TAPS) is TAPS[2]


def test_with_closed_gates_all_modules_on_equal_all_modules_off() -> None:
    model = random_model(FULL)
    assert model.experts is not None
    assert model.augmentation is not None
    for level in (*model.experts.levels, *model.augmentation.levels):
        level.gate.zero_()
    cues = [[torch.randn(2, 6) for _ in range(3)]]
    augmented = model.augmentation(TAPS, cues, [torch.randn(3, 16)], torch.tensor([0, 9]))
    assert torch.equal(model.bridge(TAPS, augmented), TAPS[2])


def test_experts_add_to_the_plain_tap_and_read_the_augmented_ones() -> None:
    model = random_model(FULL)
    augmented = [tap + 1 for tap in TAPS]
    out = model.bridge(TAPS, augmented)
    assert model.experts is not None
    assert torch.equal(out, model.experts(TAPS[2], augmented))
    assert not torch.equal(out, model.experts(augmented[2], augmented))  # F_2 + ..., not H_2 + ...


def test_augmentation_without_experts_gives_the_augmented_last_level() -> None:
    model = random_model(dataclasses.replace(FULL, experts=None))
    augmented = [tap + 1 for tap in TAPS]
    assert model.bridge(TAPS, augmented) is augmented[2]


def test_text_comes_from_the_named_part() -> None:
    ids, lengths = torch.tensor([[3, 4, 39], [5, 39, 0]]), torch.tensor([3, 2])
    from_language = random_model(FULL)
    assert from_language.text_states(ids, lengths).shape == (2, 16)
    alone = from_language.embed_text(ids[1:, :2], torch.tensor([2]))
    torch.testing.assert_close(from_language.embed_text(ids, lengths)[1:], alone, atol=1e-5, rtol=1e-5)
    from_encoder = random_model(dataclasses.replace(FULL, alignment=AlignmentConfig(embed_size=6, text_source="text_encoder")))
    assert isinstance(from_encoder, RsvlmModel)
    assert from_encoder.text_encoder is not None
    assert from_encoder.alignment is not None
    expected = from_encoder.alignment.embed_text(from_encoder.text_encoder(ids))
    assert torch.equal(from_encoder.embed_text(ids, lengths), expected)


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    """What a test chooses with stand-ins is forgotten after it."""
    registry.resolve.cache_clear()
    registry.choose.cache_clear()
    yield
    registry.resolve.cache_clear()
    registry.choose.cache_clear()


@pytest.mark.usefixtures("fresh_choices")
@pytest.mark.parametrize(
    ("experts", "chosen"),
    [(FULL.experts, {"route", "grouped_experts"}), (ExpertsConfig(3, 1, 12), {"level_experts"})],
    ids=["groups of two", "groups of one"],
)
def test_every_op_of_the_model_comes_from_the_registry(
    experts: ExpertsConfig, chosen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = set()
    real_module = registry._module

    class Twin:
        """An implementation of every op that notes its calls and computes like eager."""

        def __init__(self, op: str) -> None:
            def compute(*args: object, **kwargs: object) -> object:
                called.add(op)
                return getattr(real_module(op, "eager"), op)(*args, **kwargs)

            setattr(self, op, compute)

        @staticmethod
        def why_not() -> None:
            return None

    ops = {"varlen_tile_attention", "rms_norm", "rope", "decode_attention", *chosen}
    config = dataclasses.replace(FULL, experts=experts)
    monkeypatch.setattr(registry, "OPS", dict.fromkeys(registry.OPS, ("noting",)))
    monkeypatch.setattr(registry, "_module", lambda op, name: Twin(op) if name == "noting" else real_module(op, name))
    monkeypatch.setattr(registry, "SERVES", {"noting": "cpu"})
    eager, noting = RsvlmModel(config), RsvlmModel(config, "auto")
    noting.load_state_dict(eager.state_dict())
    outputs = []
    for model in (eager, noting):
        augmented = model.augmentation(TAPS, [[torch.ones(1, 6)] * 3], [torch.ones(1, 16)], torch.tensor([0, 9]))  # type: ignore[misc]
        outputs.append((model.bridge(TAPS, augmented), model.text_states(torch.tensor([[3, 4]]), torch.tensor([2]))))
        assert called == (set() if model is eager else ops)
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
