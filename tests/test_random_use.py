"""Random use of a network and of torchvision's, step by step the same: results must not differ.

Each test is one walk through what programs do to a network between forwards. Packed weights, plans
and fused blocks have to notice whatever changes the result of plain modules.
"""

import copy
import io
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import resnet_fused

torchvision = pytest.importorskip("torchvision")

STEPS = 12
WALKS = 3


class Walk:
    """Two networks of one architecture with the same weights: torchvision's, then ours."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        name = self.random.choice(["resnet18", "resnet50", "resnext50_32x4d"])
        theirs = getattr(torchvision.models, name)(num_classes=10)
        for norm in theirs.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
                nn.init.normal_(norm.running_mean, std=0.1)
        if self.random.random() < 0.3:
            ours = copy.deepcopy(theirs).eval()
            resnet_fused.fuse(ours)
        else:
            ours = getattr(resnet_fused, name)(num_classes=10)
            ours.load_state_dict(theirs.state_dict())
        self.pair = [theirs.eval(), ours.eval()]
        self.log = [name]

    def pick(self, *kinds: type[nn.Module]) -> list[nn.Module]:
        """The same module of both networks, one of those kinds."""
        theirs, ours = self.pair
        names = [name for name, module in theirs.named_modules() if name and type(module) in kinds]
        self.log.append(name := self.random.choice(names))
        return [theirs.get_submodule(name), ours.get_submodule(name)]

    def image(self) -> Tensor:
        training = any(m.training for m in self.pair[0].modules() if isinstance(m, nn.BatchNorm2d))
        # Batch norm of one or two numbers a channel turns any rounding into another sign.
        batch, size = (
            (8, 96) if training else (self.random.choice([1, 2, 8]), self.random.choice([33, 64]))
        )
        x = torch.randn(batch, 4, size, size + self.random.choice([0, 5]))
        forms: list[Callable[[], Tensor]] = [
            lambda: x[:, :3].contiguous(),
            lambda: x[:, :3].contiguous(memory_format=torch.channels_last),
            lambda: x[:, 1:],
            lambda: x[:1, :3].expand(batch, -1, -1, -1),
        ]
        return self.random.choice(forms)().to(next(self.pair[0].parameters()).dtype)

    def check(self, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor, times: int = 1) -> None:
        """Ours is about as far from float64's result as torchvision's."""
        with torch.no_grad():  # what was rounded in training is not to add up
            for theirs, ours in zip(self.pair[0].buffers(), self.pair[1].buffers(), strict=True):
                if not torch.equal(theirs, ours):
                    ours.copy_(theirs)
        truth = run(copy.deepcopy(self.pair[0]).double(), x.double())
        for _ in range(times):
            theirs, ours = (run(model, x) for model in self.pair)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), self.log
            allowed = 3 * (theirs.double() - truth).norm()
            allowed += 100 * torch.finfo(theirs.dtype).eps * truth.norm()
            assert (ours.double() - truth).norm() <= allowed, self.log


def forward(walk: Walk) -> None:
    x = walk.image()
    mode = walk.random.choice([torch.no_grad, torch.inference_mode, torch.enable_grad])
    with mode():
        walk.check(lambda model, x: model(x), x, times=3)  # recorded, then replayed


def backward(walk: Walk) -> None:
    def gradient(model: nn.Module, x: Tensor) -> Tensor:
        return torch.autograd.grad(model(x).square().sum(), model.fc.weight)[0]

    walk.check(gradient, walk.image())


def train(walk: Walk) -> None:
    mode = walk.random.random() < 0.4
    for model in walk.pair:
        model.train(mode)


def freeze_some(walk: Walk) -> None:
    for module in walk.pick(nn.Sequential, nn.BatchNorm2d):
        module.eval().requires_grad_(False)


def edit(walk: Walk) -> None:
    how = walk.random.randrange(6)
    for module in walk.pick(nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        weight = module.weight
        with torch.no_grad():
            if how == 0:
                weight.data.mul_(1.5)
            elif how == 1:
                weight.mul_(1.5)
            elif how == 2:
                weight.view(-1)[: weight.numel() // 2].mul_(1.7) if weight.is_contiguous() else None
            elif how == 3 and weight.dtype != torch.bfloat16:
                array = weight.detach().numpy()
                array *= 1.5
            elif how == 4:
                weight.data = weight.data * 1.5
            else:
                module.weight = nn.Parameter(weight * 1.5)


def statistics(walk: Walk) -> None:
    for norm in walk.pick(nn.BatchNorm2d):
        norm.running_var.mul_(1.5)


def attributes(walk: Walk) -> None:
    for norm in walk.pick(nn.BatchNorm2d):
        norm.eps = 0.1
    pair = walk.pick(nn.Conv2d)
    if pair[0].kernel_size == (3, 3):
        for conv in pair:
            conv.padding = conv.dilation = (2, 2)


def bias(walk: Walk) -> None:
    for conv in walk.pick(nn.Conv2d):
        conv.bias = nn.Parameter(conv.weight.new_full((conv.out_channels,), 0.3))


def tie(walk: Walk) -> None:
    first, second = walk.pick(nn.Conv2d), walk.pick(nn.Conv2d)
    if first[0].weight.shape == second[0].weight.shape:
        for one, other in zip(first, second, strict=True):
            other.weight = one.weight


def replace(walk: Walk) -> None:
    walk.pick(nn.ReLU, nn.BatchNorm2d)
    owner, _, leaf = walk.log[-1].rpartition(".")
    for model in walk.pair:
        module = model.get_submodule(owner)
        was = getattr(module, leaf)
        groups = getattr(was, "num_features", 0)
        new = nn.GroupNorm(4, groups) if groups else nn.LeakyReLU(0.2)
        setattr(module, leaf, new.to(next(model.parameters()).dtype))


def hook(walk: Walk) -> None:
    for module in walk.pick(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential):
        module.register_forward_hook(_louder)


def _louder(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 1.2


def pruned(walk: Walk) -> None:
    pair = walk.pick(nn.Conv2d)
    if not prune.is_pruned(pair[0]):
        for conv in pair:
            conv.weight = nn.Parameter(conv.weight.detach().contiguous())
            prune.l1_unstructured(conv, "weight", 0.3)
            prune.remove(conv, "weight")


def duplicate(walk: Walk) -> None:
    if walk.random.random() < 0.5:
        walk.pair = copy.deepcopy(walk.pair)
    else:
        file = io.BytesIO()
        torch.save(walk.pair, file)
        file.seek(0)
        walk.pair = torch.load(file, weights_only=False)


def load(walk: Walk) -> None:
    state = {
        k: v * 1.1 if v.is_floating_point() else v for k, v in walk.pair[0].state_dict().items()
    }
    assign = walk.random.random() < 0.5
    for model in walk.pair:
        model.load_state_dict(copy.deepcopy(state), assign=assign)


def convert(walk: Walk) -> None:
    to = walk.random.choice(
        [torch.float32, torch.float64, torch.bfloat16, torch.channels_last, torch.contiguous_format]
    )
    swap = walk.random.random() < 0.5
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for model in walk.pair:
            model.to(**{"dtype" if isinstance(to, torch.dtype) else "memory_format": to})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def one_buffer(walk: Walk) -> None:
    for model in walk.pair:
        weights = list(model.parameters())
        buffer = torch.cat([weight.detach().reshape(-1) for weight in weights])
        parts = buffer.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part.view(weight.shape)


def functional(walk: Walk) -> None:
    def call(model: nn.Module, x: Tensor) -> Tensor:
        weights = {name: weight * 1.1 for name, weight in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,))

    with torch.no_grad():
        walk.check(call, walk.image())


ACTIONS = [
    backward,
    train,
    freeze_some,
    edit,
    edit,
    statistics,
    attributes,
    bias,
    tie,
    replace,
    hook,
]
ACTIONS += [pruned, duplicate, load, convert, one_buffer, functional]


@pytest.mark.parametrize("seed", range(WALKS))
def test_results_stay_torchvisions(seed: int) -> None:
    walk = Walk(seed)
    forward(walk)
    for _ in range(STEPS):
        action = walk.random.choice(ACTIONS)
        walk.log.append(action.__name__)
        action(walk)
        forward(walk)
