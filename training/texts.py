"""Sentences as the alignment sees them: caption tables, label prompts, and the language model's states of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track

from rsvlm_infer.evaluation.datasets import RSICD_THEMES, CaptionedImage
from rsvlm_infer.evaluation.retrieval import retrieval_texts
from rsvlm_infer.layers.alignment import Alignment
from rsvlm_infer.models.rsvlm import RsvlmModel
from rsvlm_infer.tasks.classify import LABEL_TEMPLATE
from rsvlm_infer.text.tokenizer import Tokenizer


def caption_table(records: Sequence[CaptionedImage], vary: bool) -> tuple[list[str], list[list[int]]]:
    """All distinct sentences, and for each image the indices of its sentences.

    RSICD ends sentences with " ."; people do not. With `vary` every other sentence is given as a person would type it.
    """
    texts, positives = retrieval_texts({str(record.path): record.captions for record in records})
    index: dict[str, int] = {}
    column = [index.setdefault(text, len(index)) for text in texts]
    owners = [sorted({column[place] for place in np.flatnonzero(row)}) for row in positives]
    shown = [text.replace(" .", "").rstrip() if vary and place % 2 else text for place, text in enumerate(index)]
    return shown, owners


def themes_of(records: Sequence[CaptionedImage]) -> list[str]:
    """The themes in sorted order."""
    return sorted({record.theme for record in records})


def label_texts(words: Sequence[str]) -> list[str]:
    """The label prompts that `classify` uses."""
    return [LABEL_TEMPLATE.replace("{label}", word) for word in words]


def theme_words(records: Sequence[CaptionedImage]) -> list[str]:
    """The themes as words, in sorted order of the themes."""
    return [RSICD_THEMES[theme] for theme in themes_of(records)]


@torch.inference_mode()
def text_states(model: RsvlmModel, tokenizer: Tokenizer, texts: Sequence[str], batch: int = 64) -> npt.NDArray[np.float32]:
    """The language model's last-token state of each text inside the alignment's template, [N, Dl], shortest texts first."""
    assert model.language_model is not None and model.alignment is not None
    template = model.alignment.config.text_template
    device = model.language_model.embed_tokens.weight.device
    encoded = [tokenizer.encode(template.replace("{}", text)) for text in texts]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    states = np.zeros((len(texts), model.language_model.config.hidden_size), np.float32)
    for start in track(range(0, len(order), batch), description="text states"):
        rows = order[start : start + batch]
        lengths = torch.tensor([len(encoded[row]) for row in rows])
        padded = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
        for place, row in enumerate(rows):
            padded[place, : len(encoded[row])] = torch.tensor(encoded[row])
        states[rows] = model.text_states(padded.to(device), lengths.to(device)).float().cpu().numpy()
    return states


def kept_states(path: Path, model: RsvlmModel, tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """`text_states`, kept in a file: they take minutes and do not change while the language model does not."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, text_states(model, tokenizer, texts).astype(np.float16))
        temporary.replace(path)
    states: npt.NDArray[np.float32] = np.load(path).astype(np.float32)
    return states


@torch.inference_mode()
def text_embeddings(
    model: RsvlmModel, tokenizer: Tokenizer, alignment: Alignment, texts: Sequence[str]
) -> npt.NDArray[np.float32]:
    """Alignment embeddings [N, De] of texts, in float32 whatever the language model computes in."""
    states = torch.as_tensor(text_states(model, tokenizer, texts)).to(alignment.text_proj.weight)
    return alignment.embed_text(states).cpu().numpy()


def refit_text_projection(
    alignment: Alignment, before: npt.NDArray[np.float32], after: npt.NDArray[np.float32], ridge: float
) -> float:
    """Solves text_proj anew, so that states of the changed language model land where the old ones did.

    Args:
        before, after: states [N, Dl] of the same sentences in the language model that the heads were trained with, and in this one.
        ridge: weight of the penalty on the change, relative to the mean eigenvalue of the states.

    Returns:
        Mean cosine between the old embeddings and the new ones.
    """
    with torch.no_grad():
        wanted = alignment.embed_text(torch.as_tensor(before).to(alignment.text_proj.weight)).double()
        inputs = torch.cat((torch.as_tensor(after).double(), torch.ones(len(after), 1, dtype=torch.float64)), dim=1)
        old = torch.cat((alignment.text_proj.weight.double(), alignment.text_proj.bias.double()[:, None]), dim=1).T
        # the old projection's own scale, so that the penalty pulls towards it and not towards 0
        scale = (inputs @ old).norm(dim=1).mean()
        gram = inputs.T @ inputs
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        solved = torch.linalg.solve(gram + penalty, inputs.T @ (wanted * scale) + penalty @ old).T
        alignment.text_proj.weight.copy_(solved[:, :-1])
        alignment.text_proj.bias.copy_(solved[:, -1])
        found = alignment.embed_text(torch.as_tensor(after).to(alignment.text_proj.weight)).double()
    return float((found * wanted).sum(dim=1).mean())
