"""Caption metrics: BLEU-1..4, ROUGE-L and CIDEr by pycocoevalcap's own classes, tokenised without Java. Knows no model.

COCO's tokenizer is a Java program. This one lower-cases and keeps alphanumeric words with their inner hyphens and apostrophes,
which reproduces the published numbers of the golden predictions to 0.03 of a percent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ..errors import InputError, MissingDependencyError

# Named in every output: another tokenizer moves BLEU by up to 0.06 and CIDEr by up to 0.5 of a hundred.
TOKENIZER = "lower-case alphanumeric words with inner hyphens and apostrophes (no Java)"

_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")


def tokenize(text: str) -> str:
    """Lower-case words separated by single spaces, punctuation dropped."""
    return " ".join(_WORD.findall(text.lower()))


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores as fractions (BLEU, ROUGE-L in 0..1, CIDEr in 0..10); papers print them times 100."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def caption_scores(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> CaptionScores:
    """Scores one predicted caption per image against its reference captions.

    CIDEr weighs words by how rare they are among the given references, so it depends on the set: scores of sets with different
    images must not be compared, and of a single image it is 0.

    Raises:
        InputError: no images, an image without a reference, or keys that differ.
        MissingDependencyError: pycocoevalcap is not installed.
    """
    if not predictions:
        raise InputError("predictions must hold at least one caption, got none; pass the captions of the images to score")
    if predictions.keys() != references.keys():
        odd = sorted(predictions.keys() ^ references.keys())
        raise InputError(
            f"predictions and references must have the same keys, {len(odd)} differ ({odd[:3]}); score the images that have both"
        )
    empty = [key for key, captions in references.items() if not captions]
    if empty:
        raise InputError(f"references must hold at least one caption per image, got none for {empty[:3]}; drop these images")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise MissingDependencyError(
            "caption metrics need pycocoevalcap, which is not installed; run: pip install 'rsvlm-infer[eval]'"
        ) from None
    truth = {key: [tokenize(caption) for caption in captions] for key, captions in references.items()}
    guess = {key: [tokenize(predictions[key])] for key in truth}
    bleu, _ = Bleu(4).compute_score(truth, guess, verbose=0)
    rouge_l, _ = Rouge().compute_score(truth, guess)
    cider, _ = Cider().compute_score(truth, guess)
    return CaptionScores(*map(float, (*bleu, rouge_l, cider)))
