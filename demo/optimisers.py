"""How weights are updated: Muon, which parameters it is for, and the rate of each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from demo import model as yivl
from demo.learner import Learner


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal (Jordan et al., 2024), for matrices inside blocks.

    `pieces` gives for each parameter the rows of the matrices that it is made of.
    """

    def __init__(self, matrices: list[nn.Parameter], pieces: list[list[int]], weight_decay: float) -> None:
        super().__init__(matrices, {"lr": 0.0, "share": 1.0, "weight_decay": weight_decay})
        self.pieces = pieces

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        group = self.param_groups[0]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, rows in zip(group["params"], self.pieces, strict=True):
            if p.grad is None:  # the decoder, while the tower learns alone
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 0.05)
            update = p.grad.lerp(state["momentum"], 0.95)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            for part, new in zip(p.split(rows), update.split(rows), strict=True):
                wide = new.shape[0] <= new.shape[1]
                shape = (new.shape[0], new.shape[1]) if wide else (new.shape[1], new.shape[0])
                by_shape.setdefault(shape, []).append((part if wide else part.T, new if wide else new.T))
        for items in by_shape.values():
            steps = _orthogonal(torch.stack([new for _, new in items]))
            for (part, _), new in zip(items, steps, strict=True):
                # An entry's size is about 1 / sqrt(longer side): scale to 0.2 times Adam's at the same rate.
                part.add_(new, alpha=-group["lr"] * max(part.shape) ** 0.5 / 16)


def arithmetic(device: str) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32."""
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz iteration: (n, rows, columns), rows <= columns."""
    x = x.to(arithmetic(x.device.type))
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


def make_optimisers(learner: Learner, names: Sequence[str]) -> list[torch.optim.Optimizer]:
    """For the named parameters: Muon for the matrices of blocks and projector, AdamW for the rest.

    `share` is what a group takes of the rate of its step.
    """
    rows = {ours: r for ours, (_, _, r) in yivl.published_names(learner.model.sizes).items()}
    matrices: list[nn.Parameter] = []
    pieces: list[list[int]] = []
    others: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    for name in names:
        p = learner.get_parameter(name)
        ours = name.removeprefix("model.")
        if p.ndim == 2 and (".blocks." in name or "projector." in name):
            matrices.append(p)
            pieces.append(rows.get(ours) or [p.shape[0]])
        else:
            (embeddings if "embed.weight" in name else others).append(p)
    adam = [
        {"params": others, "share": 0.2},
        # Few of the rows of the embedding have a gradient at any step.
        {"params": embeddings, "share": 0.6},
    ]
    return [
        Muon(matrices, pieces, weight_decay=0.02),
        torch.optim.AdamW([g for g in adam if g["params"]], betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, total: int, decay: float) -> float:
    """Warm up over 60 steps, stay, and fall to nothing over the last `decay` share."""
    left = (total - step) / (decay * total) if decay else 1.0
    return min(1.0, (step + 1) / 60, left)
