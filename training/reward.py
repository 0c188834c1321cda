"""Stage 3: captions sampled from the model itself, made likelier or less likely by what a reader would score them.

Self-critical sequence training (Rennie et al. 2017) with the mean of an image's other samples as its baseline. The reward is the
CIDEr of pycocoevalcap with the word rarities of the whole train split, plus sentence BLEU-4. Each step also has rows of stage 2, so
that questions are still answered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rsvlm_infer.evaluation.captions import tokenize
from rsvlm_infer.layers.language_model import KvCache, LanguageModel

from .language import Student
from .loop import ahead
from .samples import Branch, Row, Sample, SampleMaker, pack_row


class CaptionReward:
    """CIDEr + weight · BLEU-4 of one caption against one image's references.

    A sentence's end is a word here, or half-finished sentences would score well: a reference ends, a sample that was cut short does not.
    """

    end = "</s>"

    def __init__(self, references: Sequence[Sequence[str]], bleu_weight: float) -> None:
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        self.bleu_weight = bleu_weight
        self.references = [[f"{tokenize(text)} {self.end}" for text in part] for part in references]
        self.scorer = CiderScorer()
        for part in self.references:
            self.scorer.cook_append(None, part)
        self.scorer.compute_doc_freq()
        self.cooked = list(self.scorer.crefs)

    def __call__(self, rows: Sequence[int], captions: Sequence[str], ended: Sequence[bool]) -> npt.NDArray[np.float64]:
        """Rewards [N] of `captions` for the images `rows`."""
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import cook_test

        texts = [tokenize(text) + f" {self.end}" * whole for text, whole in zip(captions, ended, strict=True)]
        self.scorer.ctest = [cook_test(text) for text in texts]
        # The scorer takes the size of the corpus from this list, and reads as many of its items as there are captions.
        self.scorer.crefs = [self.cooked[row] for row in rows] + self.cooked[len(rows) :]
        rewards = np.array(self.scorer.compute_cider())
        if self.bleu_weight:
            bleu = BleuScorer(n=4)
            for row, text in zip(rows, texts, strict=True):
                bleu.cook_append(text, self.references[row])
            rewards = rewards + self.bleu_weight * np.array(bleu.compute_score("closest")[1][3])
        return rewards


def advantages(rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rewards [images, samples] minus the mean of the image's other samples."""
    count = rewards.shape[1]
    gains: npt.NDArray[np.float64] = (rewards - rewards.mean(axis=1, keepdims=True)) * count / (count - 1)
    return gains


@torch.no_grad()
def sample_answers(language: LanguageModel, prompts: Tensor, count: int, limit: int, end: int) -> list[list[int]]:
    """`count` answers at temperature 1 to each prompt [B, P, Dl], up to and with token `end`, at most `limit` tokens; B · count lists."""
    batch, length, _ = prompts.shape
    cache = KvCache.empty(language.config, batch, length + limit, prompts)
    places = torch.arange(length, device=prompts.device).expand(batch, length)
    last = language(prompts, places, cache)[:, -1]
    rows = torch.arange(batch, device=prompts.device).repeat_interleave(count)
    cache, last = cache.keep(rows), last[rows]
    answers: list[list[int]] = [[] for _ in range(batch * count)]
    owners = list(range(batch * count))  # the answer that each row of the cache writes
    for step in range(limit):
        tokens = torch.multinomial(language.logits(last).float().softmax(dim=-1), 1)
        for owner, token in zip(owners, tokens[:, 0].tolist(), strict=True):
            answers[owner].append(token)
        alive = tokens[:, 0] != end
        if step == limit - 1 or not bool(alive.any()):
            break
        if not bool(alive.all()):
            kept = alive.nonzero()[:, 0]
            owners, tokens, cache = [owners[row] for row in kept.tolist()], tokens[kept], cache.keep(kept)
        place = torch.full_like(tokens, length + step)
        last = language(language.embed_tokens(tokens), place, cache)[:, -1]
    return answers


def train_reward(pupil: Student, maker: SampleMaker) -> None:
    """Trains in place until the steps or the minutes are used up."""
    loop, settings = pupil.loop, pupil.loop.settings
    rng = np.random.default_rng(settings["seed"] + loop.step)
    maker.rng = np.random.default_rng(settings["seed"] + 7 + loop.step)  # a resumed run does not repeat what was seen
    reward = CaptionReward([record.captions for record in maker.records], settings["bleu_weight"])
    knowledge = pupil.backend.knowledge
    batches = ahead(_batches(maker, settings))
    waiting: list[Row] = []
    for _ in loop:
        drawn, more = next(batches)
        waiting += more
        pupil.backend.knowledge = knowledge if rng.random() >= settings["knowledge_dropout"] else None
        visual = pupil.visual_tokens([sample for _, sample in drawn])
        answered, mean, tokens = _answered(pupil, drawn, visual.detach(), reward)
        rows = _scaled(packed(answered, settings["row_tokens"]), settings["reward_weight"] / tokens)
        # Always the same number of rows, or the compiled layers would be compiled again; rows of stage 2 fill them up.
        count = max(1, settings["rows"] - len(rows))
        plain, waiting = waiting[:count], waiting[count:]
        samples = [sample for row in plain for sample in row.samples]
        rows += _scaled(plain, 1 / sum(float(row.weights.sum()) for row in plain))
        loss = pupil.weighted_loss(rows, torch.cat((visual, pupil.visual_tokens(samples))))
        pupil.step(
            loss, False, reward=mean, tokens=tokens / len(answered) / settings["rollouts"], images=len(samples) + len(drawn)
        )


def _scaled(rows: Sequence[Row], factor: float) -> list[Row]:
    return [dataclasses.replace(row, weights=row.weights * factor) for row in rows]


def _answered(
    pupil: Student, drawn: Sequence[tuple[int, Sample]], visual: Tensor, reward: CaptionReward
) -> tuple[list[Sample], float, int]:
    """The prompts with sampled answers as branches weighted by their advantage, the mean reward, and the number of answer tokens."""
    settings, end = pupil.loop.settings, pupil.backend.config.eos_token_ids[0]
    ids = torch.tensor([[*sample.prefix, *sample.stem] for _, sample in drawn], device=pupil.device)
    count = settings["rollouts"]
    with torch.compiler.set_stance("force_eager"):  # a cache that grows would compile anew at each token
        answers = sample_answers(pupil.language, pupil.embed(ids, visual), count, settings["answer_tokens"], end)
    ended = [answer[-1] == end for answer in answers]
    texts = [pupil.tokenizer.decode(answer[:-1] if whole else answer) for answer, whole in zip(answers, ended, strict=True)]
    rewards = reward([row for row, _ in drawn for _ in range(count)], texts, ended).reshape(len(drawn), count)
    gains = advantages(rewards)
    answered = []
    for place, (_, sample) in enumerate(drawn):
        own = answers[place * count : (place + 1) * count]
        branches = [
            Branch(sample.stem[-1:] + answer, len(answer), float(gain), after_stem=True)
            for answer, gain in zip(own, gains[place], strict=True)
        ]
        answered.append(dataclasses.replace(sample, stem=sample.stem[:-1], branches=branches))
    return answered, float(rewards.mean()), sum(map(len, answers))


def packed(samples: Sequence[Sample], row_tokens: int) -> list[Row]:
    """All samples, in order, in as few rows as that takes."""
    rows: list[list[Sample]] = [[]]
    for sample in samples:
        if sum(item.length for item in rows[-1]) + sample.length > row_tokens:
            rows.append([])
        rows[-1].append(sample)
    return [pack_row(row, row_tokens) for row in rows]


def _batches(maker: SampleMaker, settings: dict[str, Any]) -> Iterator[tuple[list[tuple[int, Sample]], list[Row]]]:
    """Images to caption, and rows of stage 2."""
    plain = maker.rows(settings["row_tokens"], settings["budgets"])
    prompts = maker.caption_prompts()
    while True:
        yield [next(prompts) for _ in range(settings["images"])], [next(plain) for _ in range(3)]
