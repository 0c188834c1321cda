"""How a question about an image is put to a language model. Knows prompt formats, no model and no image.

The formats are those of the public models, to the byte: LLaVA-1.5 (`vicuna_v1`), LLaVA-1.6-Mistral (`mistral_inst`),
ChatML (`chatml`: SmolLM2, Qwen2), and none (`plain`: the image, then the text).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .tokenizer import Tokenizer

Template = Literal["plain", "vicuna_v1", "mistral_inst", "chatml"]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# template -> (before the system text, after it, before the user's turn, after it, the system text when none is given).
# A template without an own system text leaves the whole system turn out.
_TURNS: dict[str, tuple[str, str, str, str, str]] = {
    "plain": ("", "", "", "", ""),
    "vicuna_v1": ("", " ", "USER: ", " ASSISTANT:", VICUNA_SYSTEM),
    "mistral_inst": ("<<SYS>>\n", "\n<</SYS>>\n\n", "[INST] ", " [/INST]", ""),
    "chatml": ("<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", ""),
}


def build_prompt(template: Template, question: str, with_image: bool, system: str | None = None) -> list[str | None]:
    """The prompt as pieces of text; None stands where the image goes.

    Args:
        system: replaces the template's own system text; "" leaves it out.

    Raises:
        InputError: unknown template, or a system text for `plain`, which has no place for one.
    """
    if template not in _TURNS:
        raise InputError(f"template must be one of {sorted(_TURNS)}, got {template!r}; choose one of them")
    if template == "plain":
        if system:
            raise InputError('system must be empty with the template "plain", which has no place for it; leave it out')
        return [None, question] if with_image else [question]
    system_open, system_close, user_open, user_close, own_system = _TURNS[template]
    text = own_system if system is None else system
    preamble = f"{system_open}{text}{system_close}" if text else ""
    # Llama's convention has the system text inside the user's turn, the others before it
    opening = user_open + preamble if template == "mistral_inst" else preamble + user_open
    question = question.strip()
    return [opening, None, f"\n{question}{user_close}"] if with_image else [f"{opening}{question}{user_close}"]


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    question: str,
    num_image_tokens: int,
    image_token_id: int,
    bos_token_id: int | None,
    *,
    system: str | None = None,
) -> NDArray[np.int32]:
    """Token ids int32 [n] of a prompt; `image_token_id` stands `num_image_tokens` times where the image goes (0 = no image).

    Text before and after the image is tokenized apart, as LLaVA does. A begin token is set in front unless the text has it.

    Raises:
        InputError: unknown template, a negative count, or a question that holds a control token and so could end its own turn.
    """
    if num_image_tokens < 0:
        raise InputError(f"num_image_tokens must be at least 0, got {num_image_tokens}; take it from count_tokens(plan)")
    for name, text in (("question", question), ("system", system or "")):
        control = sorted(token for token in tokenizer.special_tokens if token in text)
        if control:
            raise InputError(f"{name} must not hold control tokens of the model, got {control}; remove them")
    ids: list[int] = []
    for piece in build_prompt(template, question, num_image_tokens > 0, system):
        ids += [image_token_id] * num_image_tokens if piece is None else tokenizer.encode(piece)
    if bos_token_id is not None and ids[:1] != [bos_token_id]:
        ids.insert(0, bos_token_id)
    return np.asarray(ids, dtype=np.int32)
