"""What the engine asks of any backend. Numpy at the boundary; what a backend keeps on a device stays behind an opaque handle.

Knows no text, no raster and no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..config import RsvlmConfig
from ..imagery.pack import PackedScene


@dataclass(frozen=True)
class ImageFeatures:
    """One encoded scene. `handle` belongs to the backend that made it; the rest is for the answer.

    `num_tokens` visual tokens take the place of as many image placeholders in the prompt.
    """

    handle: Any
    num_tokens: int
    cues: tuple[str, ...] = ()
    encode_ms: float = 0.0
    augment_ms: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids [n] with every placeholder already expanded, and the scenes in order of appearance."""

    token_ids: npt.NDArray[np.int32]
    images: tuple[ImageFeatures, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Query:
    """The question as the augmentation reads it: token ids [Q] and its alignment embedding [De]."""

    token_ids: npt.NDArray[np.int32]
    embedding: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Embeddings:
    """L2-normalised alignment embeddings of one scene; an absent level is an empty array.

    object [T, k, De] · region [T, De] · scene [De]
    """

    object: npt.NDArray[np.float32]
    region: npt.NDArray[np.float32]
    scene: npt.NDArray[np.float32]


class Backend(Protocol):
    """One model at one precision, ready to run."""

    name: str
    precision: str
    config: RsvlmConfig

    def encode(self, scenes: Sequence[PackedScene], queries: Sequence[Query | None] | None = None) -> list[ImageFeatures]:
        """Scenes -> visual tokens. `queries`, one per scene, matter only to a model with augmentation."""

    def prefill(self, sequences: Sequence[Prompt], capacity: int) -> tuple[npt.NDArray[np.float32], Any]:
        """Logits [B, V] after each prompt's last token, and a KV cache with room for `capacity` tokens a row."""

    def decode(self, cache: Any, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Feeds one token to every row; logits [B, V]. The cache grows in place."""

    def keep(self, cache: Any, rows: Sequence[int]) -> Any:
        """A cache of only these rows, in this order, copied where a row repeats; the old one must not be used again."""

    def embed_image(self, features: ImageFeatures) -> Embeddings:
        """Alignment embeddings of an encoded scene."""

    def embed_text(self, token_ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """Texts -> L2-normalised [B, De]."""


@runtime_checkable
class DraftingBackend(Protocol):
    """What a backend may have besides: several tokens of a row in one step, with the bits that single steps would give."""

    def decode_drafts(self, cache: Any, token_ids: Sequence[Sequence[int]]) -> list[npt.NDArray[np.float32]]:
        """Feeds each row its next tokens; logits [tokens, V] of each row. The cache's length stays as it was until `accept`."""

    def accept(self, cache: Any, counts: Sequence[int]) -> None:
        """Of the tokens of the last `decode_drafts`, the first `counts` of each row stay."""


@runtime_checkable
class StagedBackend(Backend, Protocol):
    """A backend whose `encode` can be taken step by step: what does not depend on the question is kept, the rest runs for each one.

    The steps give the bits of `encode`: tiles -> taps -> embeddings -> cues of the question -> visual tokens.
    """

    def encode_tiles(self, scenes: Sequence[PackedScene]) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Each scene's taps [S, Dv] by `contract.tap_names`, and class tokens [T, Dv] where the family has them."""

    def align(self, taps: dict[str, npt.NDArray[np.float32]], scene: PackedScene) -> Embeddings | None:
        """Taps of one scene -> its embeddings; None without alignment."""

    def find_cues(self, embeddings: Embeddings | None, query: Query | None) -> tuple[Any, tuple[str, ...]]:
        """What `bridge` takes, and the cues' texts."""

    def bridge(self, taps: dict[str, npt.NDArray[np.float32]], scene: PackedScene, cues: Any) -> npt.NDArray[np.float32] | None:
        """Visual tokens [Nv, Dl]; None without a projector. Of the scene it reads the plan, not the patches."""

    def features_of(self, tokens: npt.NDArray[np.float32]) -> ImageFeatures:
        """Visual tokens [Nv, Dl] for a prompt."""


@runtime_checkable
class GreedyBackend(Backend, Protocol):
    """A backend that can also choose the most likely token where its logits are, so that only token ids cross to the host."""

    def decode_greedy(self, cache: Any, token_ids: npt.NDArray[np.int32], steps: int) -> npt.NDArray[np.int32]:
        """Feeds one token to every row, then each row's own choice `steps` - 1 times; ids int32 [B, steps]. The cache grows in place.

        A choice is the highest logit's id, ties to the lowest: what the host would take from `decode`. No row stops by itself.

        Raises:
            BackendError: a best logit that is not a finite number.
        """
