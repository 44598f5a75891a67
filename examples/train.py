"""Training on any number of processes with DDP or FSDP2, which goes on where it was stopped.

    torchrun --nproc-per-node 8 examples/train.py --data IMAGENET/train --out runs/resnet50
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 8 --max-restarts 3 \
        examples/train.py ... --parallel fsdp

Every `--save-every` steps all processes write a checkpoint together (torch.distributed.checkpoint),
which loads under either way and any number of processes. A start finds the last whole one; with
`--max-restarts`, torchrun makes that start itself when a process dies; the variable gives each
start a store of its own, without which processes may wait for addresses of those that died.

Which images a step sees and how they are cropped follows from the step alone, so with as many
processes a run that was stopped ends in the same bits as one that was not. Running statistics are
those of rank 0; for statistics of all processes see `nn.SyncBatchNorm.convert_sync_batchnorm`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

import resnet_fused


class Images(Dataset[tuple[Tensor, int]]):
    """Images of a folder; (index, seed) asks for one, and the seed decides its crop."""

    def __init__(self, folder: Path, size: int) -> None:
        augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        norm = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        prepare = transforms.Compose([*augment, transforms.ToTensor(), norm])
        self.folder = ImageFolder(folder, prepare)

    def __getitem__(self, asked: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = asked
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.folder[index]


def draw(images: int, batch: int, steps: range, rank: int, ranks: int) -> Iterator[list[Any]]:
    """What this process reads at each step: (index, seed) for each image of its batch."""
    per_epoch = images // (batch * ranks)
    for step in steps:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).tolist()
        first = (position * ranks + rank) * batch
        mine = range(first, first + batch)
        yield [(order[i], epoch * images + i) for i in mine]


class Checkpoints:
    """Folders `step-N` in `out`, of which `latest` names the last whole one."""

    def __init__(self, out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.latest = out / "latest"

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, step: int) -> None:
        """Called by all processes. Whoever is killed meanwhile leaves the one before."""
        # What all have is written by any of them, but each has running statistics of its own.
        for buffer in self.model.buffers():
            dist.broadcast(buffer, 0)
        state_dict_saver.save(self._state(), checkpoint_id=self.out / f"step-{step}")
        if dist.get_rank() == 0:
            part = self.out / ".latest.part"
            part.write_text(str(step))
            os.replace(part, self.latest)
            for folder in self.out.glob("step-*"):
                if folder.name != f"step-{step}":
                    shutil.rmtree(folder)
        dist.barrier()

    def load(self) -> int:
        """Puts model and optimizer into their last state; the step to go on with, 0 without one."""
        if not self.latest.exists():
            return 0
        step, state = int(self.latest.read_text()), self._state()
        state_dict_loader.load(state, checkpoint_id=self.out / f"step-{step}")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder for each class")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch", type=int, default=32, help="images of each process")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    options.out.mkdir(parents=True, exist_ok=True)

    images = Images(options.data, options.size)
    count = len(images.folder)
    if count < options.batch * ranks:
        parser.error(f"--data holds {count} images, fewer than a step of {options.batch * ranks}")
    torch.manual_seed(0)  # every process begins with the same weights
    classes = len(images.folder.classes)
    network: resnet_fused.ResNet = getattr(resnet_fused, options.arch)(num_classes=classes)
    model: nn.Module = network.to(device).train()
    if options.parallel == "fsdp":
        for block in network.blocks():
            fully_shard(block)
        fully_shard(network)
    else:
        model = DistributedDataParallel(network, device_ids=[device.index] if gpu else None)
    optimizer = torch.optim.SGD(
        model.parameters(), options.learning_rate, momentum=0.9, weight_decay=1e-4
    )
    checkpoints = Checkpoints(options.out, model, optimizer)
    start = checkpoints.load()
    steps = options.epochs * (count // (options.batch * ranks))
    print(f"rank {rank} is process {os.getpid()}, begins at step {start} of {steps}", flush=True)

    asked = draw(count, options.batch, range(start, steps), rank, ranks)
    batches = DataLoader(images, batch_sampler=asked, num_workers=options.workers)
    for step, (x, y) in enumerate(batches, start):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            logits = model(x.to(device))
        loss = F.cross_entropy(logits.float(), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
        if (step + 1) % options.save_every == 0:
            checkpoints.save(step + 1)

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(state, options.out / "model.pth")
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
