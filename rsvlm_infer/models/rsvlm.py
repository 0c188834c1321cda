"""The whole model as one nn.Module: it owns the parts and their order. Knows no file, no text, no raster, no batch policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import RsvlmConfig
from ..layers.alignment import Alignment
from ..layers.augmentation import Augmentation
from ..layers.experts import Experts
from ..layers.language_model import LanguageModel
from ..layers.projector import Projector
from ..layers.text_encoder import TextEncoder
from ..layers.vision_encoder import VisionEncoder


class RsvlmModel(nn.Module):
    """Parts that the config leaves out do not exist here: no weights, no work.

    `implementation` of the ops ("eager", "auto" or a named one) is chosen once, here, through the registry; what "auto" means for
    an op is decided by the device of its tensors, so the model may move afterwards.
    """

    def __init__(self, config: RsvlmConfig, implementation: str = "eager") -> None:
        super().__init__()
        self.config = config
        vision_size = config.vision.hidden_size
        language_size = config.language.hidden_size if config.language is not None else 0
        self.vision_encoder = VisionEncoder(config.vision, implementation)
        self.language_model = LanguageModel(config.language, implementation) if config.language is not None else None
        self.projector = Projector(config.projector, vision_size, language_size) if config.projector is not None else None
        self.image_newline = (
            nn.Parameter(torch.zeros(language_size)) if config.grid_pinpoints and config.projector is not None else None
        )
        self.text_encoder = TextEncoder(config.text_encoder) if config.text_encoder is not None else None
        self.alignment: Alignment | None = None
        if config.alignment is not None:
            from_encoder = config.alignment.text_source == "text_encoder"
            text_size = config.text_encoder.hidden_size if from_encoder and config.text_encoder else language_size
            self.alignment = Alignment(config.alignment, vision_size, text_size, config.vision.layer_norm_eps)
        self.augmentation: Augmentation | None = None
        if config.augmentation is not None and config.alignment is not None:
            self.augmentation = Augmentation(
                config.augmentation, vision_size, config.alignment.embed_size, language_size, implementation
            )
        self.experts = Experts(config.experts, vision_size, implementation) if config.experts is not None else None

    def bridge(self, taps: list[Tensor], augmented: list[Tensor]) -> Tensor:
        """F_l and H_l, three [S, Dv] each -> Y [S, Dv]. Without augmentation H_l is F_l; without experts Y is H_2."""
        return augmented[2] if self.experts is None else self.experts(taps[2], augmented)

    def embed_text(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """Texts [B, N] padded on the right, lengths [B] -> alignment embeddings [B, De], unit length."""
        assert self.alignment is not None  # the backend refuses before it comes here
        if self.alignment.config.text_source == "text_encoder":
            assert self.text_encoder is not None
            return self.alignment.embed_text(self.text_encoder(token_ids))
        return self.alignment.embed_text(self.text_states(token_ids, lengths))

    def text_states(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        """The language model's state after each text's last token, [B, Dl]. Padding is on the right, so causality hides it."""
        assert self.language_model is not None
        positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
        hidden = self.language_model(self.language_model.embed_tokens(token_ids), positions)  # [B, N, Dl]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]  # type: ignore[no-any-return]
