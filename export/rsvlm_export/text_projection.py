"""Fits the text projection to the states that a rounded language model gives. Knows no rounding, no text and no file.

The projection is not rounded with the language model, and it is linear: what rounding does to all texts alike, it can take back, at no
cost when a package runs. See docs/adr/0014-the-text-projection-follows-the-rounding.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rsvlm_infer.layers.alignment import Alignment

NAME = "alignment.text_proj"
# Of the mean of the squares' diagonal. On val sentences 0.01 to 0.1 turned within 7 % of the best, with 300 texts as with 2,500
DAMPING = 0.03


@dataclass(frozen=True)
class TextProjection:
    """States of texts [B, D] -> embeddings [B, De] of unit length. weight [De, D], bias [De]."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, alignment: Alignment) -> TextProjection:
        """That of a checkpoint."""
        linear = alignment.text_proj
        return cls(linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float())

    def embed(self, states: Tensor) -> Tensor:
        """[B, D] -> [B, De]."""
        return F.normalize(F.linear(states, self.weight, self.bias), dim=-1)

    def refitted(self, exact: Tensor, own: Tensor) -> TextProjection:
        """What puts `own` states [n, D] where this projection puts the `exact` ones, as nearly as it can without leaving this one.

        Damped least squares in closed form. Every text is scaled to an embedding of unit length, so that its angle counts and not
        its length.
        """
        parameters, rows = self.weight.double(), own.double()
        column = rows.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)  # the bias's input, as large as others are
        if self.bias is not None:
            parameters = torch.cat([parameters, self.bias.double()[:, None] / column], dim=1)
            rows = torch.cat([rows, column.expand(len(rows), 1)], dim=1)
        targets = F.linear(exact.double(), self.weight.double(), None if self.bias is None else self.bias.double())
        lengths = targets.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        rows, targets = rows / lengths, targets / lengths
        squares = rows.T @ rows
        damped = squares + DAMPING * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
        parameters = parameters + torch.linalg.solve(damped, rows.T @ (targets - rows @ parameters.T)).T
        if self.bias is None:
            return TextProjection(parameters.float(), None)
        return TextProjection(parameters[:, :-1].float(), (parameters[:, -1] * column).float())

    def stored(self) -> TextProjection:
        """As a package of bf16, int8 or int4 keeps it: the weight in bfloat16."""
        return TextProjection(self.weight.to(torch.bfloat16).float(), self.bias)

    def state(self) -> Mapping[str, Tensor]:
        """The parameters by their names in a checkpoint."""
        return {f"{NAME}.weight": self.weight} | ({} if self.bias is None else {f"{NAME}.bias": self.bias})


def turn(exact: Tensor, own: Tensor) -> float:
    """Mean 1 - cosine of embeddings [n, De] of unit length."""
    return float((1 - (exact.double() * own.double()).sum(dim=1)).mean())
