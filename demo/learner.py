"""What learns: the model, with heads that only training uses, and what is asked of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from demo import model as yivl
from demo import scenes
from demo.batches import Batch

WATCHED = (1, 2)  # blocks of the decoder with heads that are told where to look
# What a patch shows: shape, colour, size, place in reading order, character, its place, word, cell or row of text.
LABEL_CLASSES = (
    len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 3, 5, len(scenes.CHARACTERS) + 1, 3, len(scenes.WORDS) + 1, 13,
)  # fmt: skip


class Learner(nn.Module):
    """The model with the heads that only training uses."""

    def __init__(self, sizes: yivl.Sizes, prefix: list[int]) -> None:
        super().__init__()
        self.model = yivl.YiVL(sizes)
        for i in WATCHED:
            self.model.decoder.blocks[i].watched = True
        self.look = nn.Sequential(
            nn.LayerNorm(sizes.vit_width), nn.Linear(sizes.vit_width, sum(LABEL_CLASSES))
        )
        self.prefix: Tensor
        self.register_buffer("prefix", torch.tensor([prefix]), persistent=False)

    def patch_loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of saying what patches show, and the share right in all of those that show something.

        Patches that show something count as much as all the others, which are many more.
        """
        logits = self.look(features).float().split(LABEL_CLASSES, -1)
        total = torch.zeros((), device=labels.device)
        for i, g in enumerate(logits):
            loss = F.cross_entropy(g.mT, labels[..., i], reduction="none")
            shows = (labels[..., i] > 0).float()
            for part in (shows, 1 - shows):
                total = total + 0.5 * (loss * part).sum() / part.sum().clamp(min=1)
        right = torch.stack([g.argmax(-1) == labels[..., i] for i, g in enumerate(logits)]).all(0)
        return total, right[labels.any(-1)].float().mean()

    def attention_loss(self, seen: list[Tensor], batch: Batch) -> Tensor:
        """How far words are from looking at the patches that show what they speak of.

        One head of the first watched block looks from a thing's name at the thing, one from a place's name at
        what is there, one of the second block from before a printed word or digit at it. Where the
        picture has nothing of the kind they look at the first token. Left alone, they take long to learn it.
        """
        s, p = self.model.sizes, self.prefix.shape[1]
        shape, colour, place, character = (w.unsqueeze(2) for w in batch.words.unbind(-1))  # (B, T, 1)
        labels = batch.labels[: len(batch.ids)].unsqueeze(1)
        shapes, colours, _, _, _, characters, _, cells = labels.unbind(-1)  # (B, 1, N)
        thing = ((shape == 0) | (shapes == shape)) & ((colour == 0) | (colours == colour))
        row = torch.where((place == 2) | (place == 5) | (place == 8), 10 + place // 3, -1)  # text fills a row
        total, count = torch.zeros((), device=shape.device), 0
        for weights, speaks, shown in (
            (seen[0][:, 0], (shape + colour) > 0, thing),
            (seen[0][:, 1], place > 0, (cells == place) | (cells == row)),
            (seen[1][:, 0], character > 0, characters == character),
        ):
            b, t = speaks[..., 0].nonzero(as_tuple=True)
            looks = weights[b, s.patches + t].float()  # (M, S)
            target = shown[b, t]
            there = (looks[:, p : p + s.patches] * target).sum(-1)
            right = torch.where(target.any(-1), there, looks[:, 0])
            total, count = total - (right + 1e-3).log().sum(), count + len(b)
        return total / max(count, 1)

    def forward(self, batch: Batch, tower: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Text loss, patch loss, attention loss, share of right tokens, share of right patches.

        Without `tower` the vision tower learns nothing, and the batch has no pages.
        """
        s = self.model.sizes
        with torch.set_grad_enabled(tower):
            features = self.model.vision(batch.images)
            patch_loss, patch_right = self.patch_loss(features, batch.labels)
        decoder = self.model.decoder
        # All conversations begin with the same system text: its keys and values are made once for the batch.
        p = self.prefix.shape[1]
        _, past = decoder(decoder.embed(self.prefix), torch.arange(p, device=features.device)[None])
        rows = self.model.projector(features[: len(batch.ids)])
        x = torch.cat([rows, decoder.embed(batch.ids)], 1)
        b, t = len(x), x.shape[1]
        image_numbers = batch.numbers.new_full((b, s.patches), -1)
        numbers = torch.cat([image_numbers, batch.numbers], 1)
        image_places = torch.arange(p, p + s.patches, device=x.device).expand(b, -1)
        places = torch.cat([image_places, batch.places + p + s.patches], 1)
        # Everyone sees the picture; a conversation sees itself.
        seen = (numbers[:, None, :] == numbers[:, :, None]) | (numbers == -1)[:, None, :]
        seen &= torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        mask = torch.cat([seen.new_ones(b, t, p), seen], 2).unsqueeze(1)
        seen_by: list[Tensor] = []
        hidden, _ = decoder(x, places, mask, past, seen_by)
        wanted = batch.targets >= 0
        logits = decoder.head(hidden[:, s.patches :][wanted]).float()
        targets = batch.targets[wanted]
        right = (logits.argmax(-1) == targets).float().mean()
        attention_loss = self.attention_loss(seen_by, batch)
        return F.cross_entropy(logits, targets), patch_loss, attention_loss, right, patch_right
