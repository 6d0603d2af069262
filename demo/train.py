"""Trains the demo model from nothing: python -m demo.train --out FOLDER (goes on from a checkpoint there).

First the vision tower alone learns to say what each patch shows, then the decoder learns to answer from what the
tower sees, then the whole model learns together, and at last the decoder learns to count and to compare. All use
pictures drawn beforehand into FOLDER and questions written as they are needed. At the end the model lies in
FOLDER/export in the layout of a published Yi-VL folder.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from demo import model as yivl
from demo.batches import WITHOUT_TOWER, Batches, ahead
from demo.learner import Learner
from demo.optimisers import arithmetic, make_optimisers, rate
from demo.pictures import make_pool
from demo.tokens import Writer, train_tokenizer


@dataclass
class Team:
    """Processes that learn together: weights and gradients lie in memory that all of them see.

    On a busy machine two processes of one thread get more done than one process of two threads, which wait
    for each other in every operation.
    """

    learner: Learner
    gradients: Tensor  # (processes, parameters)
    barrier: Any
    size: int


def split_parameters(learner: Learner, size: int) -> list[list[str]]:
    """Names of the parameters that each process updates: about equal work, matrices being most of it."""
    shares: list[list[str]] = [[] for _ in range(size)]
    work = [0] * size
    for name, p in sorted(learner.named_parameters(), key=lambda item: -item[1].numel()):
        least = work.index(min(work))
        shares[least].append(name)
        work[least] += p.numel()
    return shares


def exchange(team: Team, rank: int) -> None:
    """Replaces the gradients of this process's own parameters by their mean over all processes."""
    mine = set(split_parameters(team.learner, team.size)[rank])
    at = 0
    slices = []
    for name, p in team.learner.named_parameters():
        if p.grad is not None:
            team.gradients[rank, at : at + p.numel()] = p.grad.flatten()
            if name in mine:
                slices.append((p, at))
        at += p.numel()
    team.barrier.wait()
    for p, at in slices:
        p.grad = team.gradients[:, at : at + p.numel()].mean(0).view_as(p)
    nn.utils.clip_grad_norm_([p for p, _ in slices], 1.0)


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    sizes = yivl.Sizes()
    spm = out / "tokenizer.model"
    if not spm.exists():
        spm.write_bytes(train_tokenizer(sizes.vocab, args.seed))
    make_pool(out, args.pictures, sizes.image, sizes.patches)
    learner = Learner(sizes, Writer(spm.read_bytes()).prefix)
    if (out / "checkpoint.pt").exists():
        learner.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["learner"])
    if torch.cuda.is_available():
        team = Team(learner.to("cuda"), torch.zeros(1, 0), None, 1)
        learn(0, team, args)
    else:
        context = torch.multiprocessing.get_context("spawn")
        count = sum(p.numel() for p in learner.parameters())
        gradients = torch.zeros(args.processes, count).share_memory_()
        team = Team(learner.share_memory(), gradients, context.Barrier(args.processes), args.processes)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it the processes
        torch.multiprocessing.spawn(learn, (team, args), args.processes, daemon=True)
    yivl.export_folder(learner.model, spm.read_bytes(), out / "export")


def learn(rank: int, team: Team, args: argparse.Namespace) -> None:
    """What each process does."""
    out: Path = args.out
    learner, device = team.learner, "cuda" if torch.cuda.is_available() else "cpu"
    if team.size > 1:
        torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    sizes = learner.model.sizes
    writer = Writer((out / "tokenizer.model").read_bytes())
    pool = make_pool(out, args.pictures, sizes.image, sizes.patches)
    for block in [*learner.model.vision.blocks, *learner.model.decoder.blocks]:
        block.compile()  # four times as fast on a CPU: most operations are small and bound by memory
    mine = split_parameters(learner, team.size)[rank]
    optimisers = make_optimisers(learner, mine)
    checkpoint, state_file = out / "checkpoint.pt", out / f"optimiser-{rank}.pt"
    start_phase, start_step, elapsed = 0, 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        start_phase, start_step, elapsed = saved["phase"], saved["step"], saved["elapsed"]
        states = torch.load(state_file, weights_only=True) if state_file.exists() else {}
        if states.get("at") == (start_phase, start_step, team.size):
            for optimiser, state in zip(optimisers, states["optimisers"], strict=True):
                optimiser.load_state_dict(state)
    log = (out / "log.txt").open("a", buffering=1)
    # Name, steps, pictures in a step, rate, and over which share of the steps the rate falls to nothing.
    phases = [
        ("vision", args.vision_steps, args.vision_batch, args.vision_lr, 0.5),
        ("answers", args.answer_steps, args.batch, args.lr, 0.0),
        ("all", args.steps, args.batch, args.lr, 1.0),
        ("last", args.last_steps, args.batch, args.lr / 2, 1.0),
    ]
    dtype = arithmetic(device)

    for phase in range(start_phase, len(phases)):
        name, total, size, lr, decay = phases[phase]
        if phase != start_phase:
            start_step, elapsed = 0, 0.0
            optimisers = make_optimisers(learner, mine)
        batches = Batches(pool, writer, size, args.seed + phase, rank, team.size)
        sums: dict[str, float] = {}
        began, last_save = time.monotonic() - elapsed, start_step
        steps = range(start_step, total)
        bar = tqdm(steps, name, initial=start_step, total=total, mininterval=10, disable=rank > 0)
        for step, batch in zip(bar, ahead(batches, start_step, total, name), strict=True):
            batch = batch.to(device)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = lr * group["share"] * rate(step, total, decay)
            learner.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                if name == "vision":
                    patch_loss, patch_right = learner.patch_loss(
                        learner.model.vision(batch.images), batch.labels
                    )
                    loss, now = patch_loss, {"patch": patch_loss, "patch_right": patch_right}
                else:
                    text_loss, patch_loss, look_loss, right, patch_right = learner(
                        batch, name not in WITHOUT_TOWER
                    )
                    loss = text_loss + args.patch_weight * patch_loss + args.look_weight * look_loss
                    now = {"text": text_loss, "patch": patch_loss, "look": look_loss}
                    now |= {"right": right, "patch_right": patch_right}
            loss.backward()
            if team.size > 1:
                exchange(team, rank)
            else:
                nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            if team.size > 1:
                team.barrier.wait()
            for key, value in now.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach())
            if (step + 1) % args.log_every == 0 and rank == 0:
                line = " ".join(f"{k} {v / args.log_every:.4f}" for k, v in sums.items())
                log.write(f"{name} {step + 1}/{total} {time.monotonic() - began:.0f}s {line}\n")
                sums = {}
            finished = step + 1 == total
            if step + 1 - last_save == args.save_every or finished:
                at = (phase + finished, 0 if finished else step + 1, team.size)
                last_save = step + 1
                _save(state_file, {"at": at, "optimisers": [o.state_dict() for o in optimisers]})
                if rank == 0:
                    state = {"learner": learner.state_dict(), "phase": at[0], "step": at[1]}
                    _save(checkpoint, state | {"elapsed": time.monotonic() - began})
                if team.size > 1:
                    team.barrier.wait()


def _save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, log and export")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="on a CPU")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument("--answer-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--last-steps", type=int, default=430)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vision-lr", type=float, default=0.02, help="while the tower learns alone")
    parser.add_argument("--lr", type=float, default=0.008)
    parser.add_argument("--patch-weight", type=float, default=0.3)
    parser.add_argument("--look-weight", type=float, default=0.2)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
