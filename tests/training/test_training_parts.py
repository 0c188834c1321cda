"""The recipe's parts, one by one: the loop resumes, low-rank updates start at nothing and merge, the text projection follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rsvlm_infer.config import AlignmentConfig, ExpertsConfig, LanguageConfig
from rsvlm_infer.evaluation.datasets import CaptionedImage
from rsvlm_infer.layers.alignment import Alignment
from rsvlm_infer.layers.experts import Experts
from rsvlm_infer.layers.language_model import LanguageModel
from rsvlm_infer.ops.varlen_tile_attention import varlen_tile_attention
from training.dataset import tidied, varied
from training.language import Balance, add_low_rank
from training.loop import Group, Loop, ahead, trained_weights
from training.samples import consensus
from training.texts import refit_text_projection
from training.vision import same_length_attention

SETTINGS = {"steps": 6, "minutes": 5, "warmup_steps": 1, "save_every": 3}


def _run(folder: Path, steps: int) -> tuple[nn.Parameter, Loop]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4))
    loop = Loop(folder, "part", [Group({"weight": weight}, 0.1)], {**SETTINGS, "steps": steps})
    for _ in loop:
        (weight**2).sum().backward()
        loop.update(loss=1.0)
    return weight, loop


def test_loop_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _run(tmp_path, 3)
    weight, loop = _run(tmp_path, 6)
    assert loop.step == 6
    lines = [json.loads(line) for line in (tmp_path / "part.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(trained_weights(tmp_path, "part")["weight"], weight.detach())
    assert bool((weight < 1).all())


def test_ahead_keeps_order_and_hands_errors_over() -> None:
    def items():  # type: ignore[no-untyped-def]
        yield from range(5)
        raise ValueError("broken image")

    seen = []
    with pytest.raises(ValueError, match="broken image"):
        seen.extend(ahead(items()))
    stream = ahead(iter(range(5)))
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_low_rank_starts_at_no_change_and_equals_its_merge() -> None:
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig("llama", 50, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, False, True)).eval()
    embeds, positions = torch.randn(1, 5, 32), torch.arange(5)[None]
    before = model(embeds, positions)
    named = add_low_rank(model, 2)
    assert torch.equal(model(embeds, positions), before)
    assert {name.rsplit(".", 1)[1] for name in named} == {"lora_a", "lora_b"}
    assert len(named) == 2 * 2 * 7  # a pair for each of seven Linear layers in two decoder layers
    with torch.no_grad():
        for name, parameter in named.items():
            if name.endswith("lora_b"):
                parameter.normal_()
    changed = model(embeds, positions)
    assert float((changed - before).detach().abs().max()) > 0.01
    plain = LanguageModel(model.config).eval()
    weights = {name.replace(".base.", "."): value for name, value in model.state_dict().items() if "lora" not in name}
    for name, parameter in named.items():
        if name.endswith("lora_a"):
            module = name.removesuffix(".lora_a")
            key = module.removeprefix("language_model.") + ".weight"
            weights[key] = weights[key] + named[f"{module}.lora_b"].detach() @ parameter.detach()
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(embeds, positions), changed, atol=1e-5, rtol=1e-4)


def test_text_projection_follows_a_changed_language_model() -> None:
    torch.manual_seed(0)
    alignment = Alignment(AlignmentConfig(embed_size=16), 24, 32, 1e-5)
    rng = np.random.default_rng(0)
    before = rng.standard_normal((400, 32)).astype(np.float32)
    turned = before @ np.linalg.qr(rng.standard_normal((32, 32)))[0].astype(np.float32)
    wanted = alignment.embed_text(torch.from_numpy(before)).detach()
    lost = float((alignment.embed_text(torch.from_numpy(turned)) * wanted).sum(dim=1).mean())
    found = refit_text_projection(alignment, before, turned, 1e-4)
    assert lost < 0.5
    assert found > 0.95


def test_balance_is_one_when_even_and_grows_when_one_expert_takes_all() -> None:
    torch.manual_seed(0)
    experts = Experts(ExpertsConfig(num_experts=6, top_k=1, intermediate_size=8), 12)
    balance = Balance(experts)
    x = torch.randn(200, 12)
    with torch.no_grad():
        for level in experts.levels:
            level.router.weight.zero_()  # type: ignore[union-attr, operator]
    experts(x, [x, x, x])
    assert balance.loss is not None
    even = float(balance.loss)
    with torch.no_grad():
        for level in experts.levels:
            level.norm.bias.fill_(1.0)  # type: ignore[union-attr, operator]
            level.router.weight[0] = 1.0  # type: ignore[union-attr, index]
    experts(x, [x, x, x])
    assert even == pytest.approx(1.0, abs=1e-5)
    assert float(balance.loss) > 1.9


def test_same_length_attention_equals_the_op() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, 2, 8) for _ in range(3))
    cu_seqlens = torch.arange(4) * 10
    torch.testing.assert_close(same_length_attention(q, k, v, cu_seqlens), varlen_tile_attention(q, k, v, cu_seqlens))


def test_consensus_prefers_what_most_people_say() -> None:
    captions = ("a church near a road .", "a church near a road .", "a church near a river .", "purple elephants dance .")
    records = [
        CaptionedImage(Path("a"), "church", captions),
        CaptionedImage(Path("b"), "beach", ("white waves beat the sand .", "waves beat the sand .") * 2),
        CaptionedImage(Path("c"), "forest", ("many trees .",)),
    ]
    found = [dict(part) for part in consensus(records)]
    first = found[0]
    assert max(first, key=first.__getitem__) == "A church near a road."
    assert min(first, key=first.__getitem__) == "Purple elephants dance."
    assert found[2] == {"Many trees.": 1.0}
    assert tidied("two  planes , parked") == "Two planes, parked."


def test_varied_images_keep_their_content_upright_or_turned() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20] = 200
    for _ in range(20):
        out = varied(image, 28, rng, least=1.0)
        assert out.shape == (28, 28, 3)
        assert out.dtype == np.uint8
        halves = sorted(
            float(part.mean()) for part in np.array_split(out, 2, axis=int(abs(out[0, 0, 0] - out[0, -1, 0] * 1.0) > 60))
        )
        assert halves[0] < 30 < 150 < halves[1]
