"""Everyday and unusual uses of a network, each beside torchvision's: values and gradients.

A use is a function of a model. It gets ours and torchvision's, with the same weights, and what it
returns has to agree: in float64, where our ops compute as exactly as PyTorch's, within rounding.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.tv_tensors
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import resnet_fused
from resnet_fused import backends, use_backend
from resnet_fused.numerics import relative_error
from resnet_fused.ops import BatchNorm, ConvBn, Convolution
from resnet_fused.ops.dispatch import serving
from resnet_fused.testing.cases import generator, randomise_statistics
from resnet_fused.testing.plain import run_modules, training_ops_in_pytorch

Use = Callable[[nn.Module], Any]


def images(batch: int = 2, size: int = 40, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=generator()).to(dtype)


def pair(
    name: str = "resnet18", dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[nn.Module, nn.Module]:
    """Ours and torchvision's with the same random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    arguments.setdefault("num_classes", 7)
    theirs = randomise_statistics(getattr(torchvision.models, name)(**arguments)).eval()
    ours = getattr(resnet_fused, name)(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def close(found: Any, expected: Any, bound: float) -> None:
    """Asserts that two structures agree, tensor by tensor, the rest exactly."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            assert b.abs().max() > 0  # an expected zero would hide a lost derivative
            assert relative_error(a, b) < bound
        elif isinstance(b, Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


def without_in_place(model: nn.Module) -> nn.Module:
    """With ReLUs that PyTorch lets backward hooks precede."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


USES: dict[str, Use] = {}


def use(function: Use) -> Use:
    USES[function.__name__] = function
    return function


# Ways in which a module's call is changed or seen


@use
def replaced_forward_of_an_instance(model: nn.Module) -> Any:
    for module in (model.conv1, model.layer2[0].conv1, model.layer3[1].bn2, model.fc):
        module.forward = lambda x, f=module.forward: f(x) * 0.7
    return model(images())


@use
def replaced_forward_of_activations(model: nn.Module) -> Any:
    for module in (model.relu, model.layer1[1].relu, model.maxpool, model.avgpool):
        module.forward = lambda x, f=module.forward: f(x) + 0.1
    return model(images())


@use
def replaced_conv_forward(model: nn.Module) -> Any:
    conv = model.layer2[0].downsample[0]
    conv._conv_forward = lambda x, w, b, f=conv._conv_forward: f(x, w * 2, b)
    return model(images())


def _with_class_method(model: nn.Module, kind: type, name: str) -> Tensor:
    original = getattr(kind, name)
    own = name in kind.__dict__

    def doubled(self, *arguments, **options):
        return 1.1 * original(self, *arguments, **options)

    setattr(kind, name, doubled)
    try:
        return model(images())
    finally:
        setattr(kind, name, original) if own else delattr(kind, name)


@use
def replaced_methods_of_classes(model: nn.Module) -> Any:
    methods = [(nn.Conv2d, "forward"), (nn.Conv2d, "_conv_forward"), (nn.Conv2d, "__call__")]
    methods += [(nn.BatchNorm2d, "forward"), (nn.ReLU, "forward"), (nn.Linear, "__call__")]
    return [_with_class_method(model, *method) for method in methods]


@use
def global_forward_hook(model: nn.Module) -> Any:
    seen: list[Any] = []

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not list(module.children()):
            seen.append((type(module).__name__, output.detach().clone()))

    hook = nn.modules.module.register_module_forward_hook(record)
    try:
        return model(images()), seen
    finally:
        hook.remove()


@use
def hooks_of_modules(model: nn.Module) -> Any:
    seen: list[Tensor] = []
    model.layer1[0].bn1.register_forward_hook(lambda m, i, out: out * 0.9)
    model.layer2[1].conv2.register_forward_pre_hook(lambda m, i: (i[0] + 0.1,))
    model.layer3[0].downsample.register_forward_hook(lambda m, i, out: seen.append(out.clone()))
    model.layer4[1].conv1.register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    model.bn1.register_full_backward_pre_hook(lambda m, o: (o[0] * 2,))
    without_in_place(model)(images()).square().sum().backward()
    return gradients(model), seen


@use
def replaced_modules(model: nn.Module) -> Any:
    model.maxpool = nn.Identity()
    model.layer2[0].relu = nn.LeakyReLU(0.1)
    model.layer4[0].downsample.insert(0, nn.AvgPool2d(1))
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding="same").double()
    nn.init.constant_(model.layer1[0].conv1.weight, 0.01)
    nn.init.ones_(model.layer1[0].conv1.bias)
    model.fc = nn.Sequential(nn.Dropout(0.5), model.fc).eval()
    return model(images())


@use
def low_rank_adapters(model: nn.Module) -> Any:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Conv2d) -> None:
            super().__init__()
            self.base, self.gain = base.requires_grad_(False), nn.Parameter(torch.ones(1).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) * self.gain + x.mean()

    for block in (model.layer1[0], model.layer4[1]):
        block.conv2 = Adapted(block.conv2)
    model(images()).square().sum().backward()
    return gradients(model)


@use
def frozen_batch_norm_of_torchvision(model: nn.Module) -> Any:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = torchvision.ops.FrozenBatchNorm2d(child.num_features).double()
                frozen.load_state_dict(child.state_dict())
                setattr(module, name, frozen)
    model.train()
    model(images()).square().sum().backward()
    return gradients(model)


@use
def a_batch_norm_that_only_looks_frozen(model: nn.Module) -> Any:
    class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    frozen = FrozenBatchNorm2d(64).double()
    frozen.load_state_dict(model.bn1.state_dict())
    model.bn1 = frozen
    return model(images())


# Transforms and other ways to differentiate


def _loss(model: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    return loss


@use
def jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (images(),), (torch.ones_like(images()),))


@use
def jvp_of_parameters(model: nn.Module) -> Any:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    return torch.func.jvp(_loss(model, images()), (parameters,), (tangents,))


@use
def dual_numbers(model: nn.Module) -> Any:
    with forward_ad.dual_level():
        out = model(forward_ad.make_dual(images(), torch.ones_like(images())))
        return tuple(forward_ad.unpack_dual(out))


@use
def jacfwd(model: nn.Module) -> Any:
    x = images()
    return torch.func.jacfwd(lambda s: model(x * s))(torch.ones((), dtype=torch.float64))


@use
def jacrev(model: nn.Module) -> Any:
    x = images(1)
    return torch.func.jacrev(lambda s: model(x * s))(torch.ones((), dtype=torch.float64))


@use
def functional_gradient_in_eval(model: nn.Module) -> Any:
    return torch.func.grad(_loss(model, images()))(dict(model.named_parameters()))


@use
def functional_gradient_in_training(model: nn.Module) -> Any:
    model.train()

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        out = torch.func.functional_call(model, (parameters, buffers), (x,))
        return out.square().mean(), buffers

    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return torch.func.grad(loss, has_aux=True)(dict(model.named_parameters()), buffers, images())


@use
def gradients_of_every_sample(model: nn.Module) -> Any:
    parameters = {name: p.detach() for name, p in model.named_parameters() if "layer4" in name}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images())


@use
def vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(images(4).unflatten(0, (2, 2)))


@use
def hessian_vector_product(model: nn.Module) -> Any:
    parameters = {name: p.detach() for name, p in model.named_parameters() if "bn" in name}
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    return torch.func.jvp(torch.func.grad(_loss(model, images())), (parameters,), (tangents,))


@use
def gradient_penalty(model: nn.Module) -> Any:
    x = images().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return {name: g for name, g in gradients(model).items() if "conv" in name}


@use
def functional_forward_over_reverse(model: nn.Module) -> Any:
    x = images(1)
    return torch.autograd.functional.jvp(model, x, torch.ones_like(x))


# Modes


@use
def flop_counter(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        model(images()).square().sum().backward()
    return counter.get_total_flops()


@use
def flop_counter_in_training(model: nn.Module) -> Any:
    with FlopCounterMode(display=False) as counter:
        model.train()(images()).square().sum().backward()
    counts = counter.get_flop_counts()
    return counter.get_total_flops(), sum(counts["ResNet.layer1"].values())


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "convolution" in str(func) or "batch_norm" in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@use
def dispatch_mode(model: nn.Module) -> Any:
    with Recorder() as recorder, torch.no_grad():
        model(images())
    return recorder.names


@use
def function_mode(model: nn.Module) -> Any:
    class Functions(TorchFunctionMode):
        names: ClassVar[list[str]] = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (F.conv2d, torch.conv2d, F.batch_norm, F.relu, F.linear):
                self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Functions() as functions, torch.no_grad():
        model(images())
    return functions.names


@use
def tensor_subclass(model: nn.Module) -> Any:
    class Noted(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (F.conv2d, torch.conv2d, F.batch_norm):
                cls.seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    with torch.no_grad():
        return model(images().as_subclass(Noted)).as_subclass(Tensor), Noted.seen


@use
def image_subclass(model: nn.Module) -> Any:
    return model(torchvision.tv_tensors.Image(images()))


@use
def device_context(model: nn.Module) -> Any:
    with torch.device("cpu"):
        return model(images())


@use
def saved_tensor_hooks(model: nn.Module) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        out = model(images())
    out.square().sum().backward()
    return gradients(model)


@use
def inference_mode(model: nn.Module) -> Any:
    with torch.inference_mode():
        return model(images()).clone()


# Graphs


def _extractor(model: nn.Module) -> nn.Module:
    return create_feature_extractor(model, ["layer1.0.relu", "layer3.1.bn2", "layer4.0.add", "fc"])


@use
def feature_extractor(model: nn.Module) -> Any:
    return _extractor(model)(images())


@use
def feature_extractor_in_training(model: nn.Module) -> Any:
    extractor = _extractor(model).train()
    found = extractor(images())
    sum(out.square().mean() for out in found.values()).backward()
    return found, gradients(extractor), dict(extractor.named_buffers())


@use
def node_names(model: nn.Module) -> Any:
    return get_graph_node_names(model), get_graph_node_names(model.train())


@use
def scripted(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)(images())


@use
def scripted_in_training(model: nn.Module) -> Any:
    script = torch.jit.script(model.train())
    script(images()).square().sum().backward()
    return gradients(script), dict(script.named_buffers())


@use
def scripted_feature_extractor(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(_extractor(model)), file)
    file.seek(0)
    return torch.jit.load(file)(images())


@use
def traced_by_jit(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, images()), file)
    file.seek(0)
    return torch.jit.load(file)(images(3))


@use
def symbolic_trace(model: nn.Module) -> Any:
    traced = torch.fx.symbolic_trace(model)
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    return traced(images()), pickle.loads(pickle.dumps(traced))(images()), calls


@use
def fx_passes(model: nn.Module) -> Any:
    from torch.fx.experimental.optimization import fuse

    folded = fuse(model)
    return folded(images()), sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


@use
def fx_quantization(model: nn.Module) -> Any:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    x = images(dtype=torch.float32)
    prepared = prepare_fx(model.float(), get_default_qconfig_mapping(), (x,))
    return prepared(x).double(), sorted(str(node.target) for node in prepared.graph.nodes)


@use
def exported_with_a_dynamic_batch(model: nn.Module) -> Any:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}})
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return program.module()(images(5)), sorted(name for name in names if "conv" in name)


@use
def made_into_aten(model: nn.Module) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        return make_fx(model)(images())(images())


# Copies, parameters and optimisers


@use
def copies(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    return (
        copy.deepcopy(model)(images()),
        pickle.loads(pickle.dumps(model))(images()),
        whole(images()),
    )


@use
def meta_device_and_assign(model: nn.Module) -> Any:
    state = copy.deepcopy(model.state_dict())
    empty = copy.deepcopy(model).to("meta")
    assert empty(images().to("meta")).device.type == "meta"
    empty.load_state_dict(state, assign=True)
    return empty(images())


@use
def layouts_of_parameters(model: nn.Module) -> Any:
    views = [p.view(-1)[:1].clone() for p in model.parameters()]
    return views, model.conv1.weight.view(64, -1).sum(1), [p.stride() for p in model.parameters()]


@use
def channels_last_model(model: nn.Module) -> Any:
    model.to(memory_format=torch.channels_last)
    model(images().contiguous(memory_format=torch.channels_last)).square().sum().backward()
    return gradients(model), [p.stride() for p in model.parameters()]


@use
def vectors_of_parameters(model: nn.Module) -> Any:
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector * 0.9, model.parameters())
    model(images()).square().sum().backward()
    return vector, gradients(model)


@use
def lbfgs(model: nn.Module) -> Any:
    optimizer = torch.optim.LBFGS(model.fc.parameters(), max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return list(model.fc.parameters())


@use
def lbfgs_of_convolutions(model: nn.Module) -> Any:
    optimizer = torch.optim.LBFGS([model.conv1.weight], max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure), model.conv1.weight


@use
def pruning(model: nn.Module) -> Any:
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(
        [(conv, "weight") for conv in convolutions[3:]], prune.L1Unstructured, amount=0.3
    )
    prune.l1_unstructured(convolutions[1], "weight", 0.5)
    prune.ln_structured(convolutions[2], "weight", 0.25, 2, 0)
    pruned = model(images())
    for conv in convolutions[1:]:
        prune.remove(conv, "weight")
    return pruned, model(images()), [int((c.weight == 0).sum()) for c in convolutions]


@use
def weight_and_spectral_norm(model: nn.Module) -> Any:
    torch.manual_seed(1)
    nn.utils.parametrizations.weight_norm(model.layer1[0].conv1)
    nn.utils.parametrizations.spectral_norm(model.layer2[0].conv2)
    nn.utils.parametrizations.orthogonal(model.fc)
    model(images()).square().sum().backward()
    return gradients(model)


@use
def averaged_model_and_update_bn(model: nn.Module) -> Any:
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    averaged.update_parameters(model)
    torch.optim.swa_utils.update_bn([images(), images(3) * 2], averaged)
    return averaged.eval()(images()), dict(averaged.named_buffers())


@use
def tied_weights(model: nn.Module) -> Any:
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    model(images()).square().sum().backward()
    return gradients(model)


@use
def a_step_of_training(model: nn.Module) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    F.cross_entropy(model(images(3)), torch.tensor([1, 2, 3])).backward()
    optimizer.step()
    return dict(model.named_parameters()), dict(model.named_buffers())


@use
def partly_frozen_training(model: nn.Module) -> Any:
    model.train()
    for module in (model.conv1, model.bn1, model.layer1, model.layer2):
        module.requires_grad_(False).eval()
    model.layer3[0].conv1.requires_grad_(False)
    model(images()).square().sum().backward()
    return gradients(model), dict(model.named_buffers())


@use
def deprecated_statistics(model: nn.Module) -> Any:
    """Batch norms in every state that PyTorch allows."""
    model.train()
    model.bn1.momentum = None
    model.layer1[0].bn1.momentum = model.layer1[0].bn1.num_batches_tracked = None
    model.layer1[1].bn1.num_batches_tracked = None
    model.layer2[0].bn1.running_mean = model.layer2[0].bn1.running_var = None
    model.layer2[1].bn1.track_running_stats = False
    for _ in range(2):
        out = model(images())
    return out, dict(model.named_buffers())


# Inputs


@use
def odd_inputs(model: nn.Module) -> Any:
    x = images(3, 48)
    expanded = x[:1].expand(4, -1, -1, -1)
    sliced = x[:, :, ::2, 1::2]
    flipped = x.transpose(2, 3)
    return [model(i) for i in (expanded, sliced, flipped, x[1:2], x[:, :1].expand(-1, 3, -1, -1))]


@use
def empty_batch(model: nn.Module) -> Any:
    return model(images()[:0]).shape


@use
def not_a_number_and_infinity(model: nn.Module) -> Any:
    x = images(3)
    x[1, 0, 5, 5], x[2, 1, 7, 7] = float("nan"), float("inf")
    out = model(x)
    return out[0], torch.isfinite(out)


@use
def zero_variance(model: nn.Module) -> Any:
    nn.init.zeros_(model.layer1[0].bn1.running_var)
    nn.init.zeros_(model.bn1.running_var[:3])
    return model(images())


@use
def class_activation_maps(model: nn.Module) -> Any:
    kept: dict[str, Tensor] = {}
    model.layer4.register_forward_hook(lambda m, i, out: kept.update(out=out))
    model.layer4.register_full_backward_hook(lambda m, i, out: kept.update(grad=out[0]))
    model(images()).max(1).values.sum().backward()
    return kept


@use
def gradient_of_the_input(model: nn.Module) -> Any:
    x = images().requires_grad_()
    model(x).square().sum().backward()
    return x.grad


@use
def threads(model: nn.Module) -> Any:
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            results[i] = model(images() + i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [results[i] for i in range(4)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USES)
def test_use(name: str) -> None:
    ours, theirs = pair()
    torch.manual_seed(0)
    expected = USES[name](theirs)
    torch.manual_seed(0)
    close(USES[name](ours), expected, 1e-4 if "quantization" in name else 1e-9)


# In float32 eval mode on a CPU these run through the compiled kernels, where they are.
_INFERENCE = ["hooks_of_modules", "feature_extractor", "symbolic_trace", "copies", "threads"]
_INFERENCE += ["odd_inputs", "not_a_number_and_infinity", "pruning", "inference_mode"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _INFERENCE)
def test_use_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "images", lambda *a, f=images: f(*a, dtype=torch.float32))
    ours, theirs = pair(dtype=torch.float32)
    expected = USES[name](theirs)
    close(USES[name](ours), expected, 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("resnet50", feature_extractor),
        ("resnet50", scripted),
        ("resnet50", jvp),
        ("resnext50_32x4d", node_names),
        pytest.param("resnext50_32x4d", symbolic_trace, marks=pytest.mark.thorough),
        pytest.param("resnext50_32x4d", scripted, marks=pytest.mark.thorough),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_bottlenecks(name: str, way: Use) -> None:
    ours, theirs = pair(name)
    close(way(ours), way(theirs), 1e-9)


# What torchvision's results cannot show


def test_traced_code_is_fused_but_for_what_was_asked_for() -> None:
    ours, _ = pair()
    code = create_feature_extractor(ours, ["layer1.0.relu", "layer3.1.bn2"]).code
    fused = code[code.index("else:") :]
    assert fused.count("run_block_end(") == 3  # layer3.1 is cut at its bn2, layer4 is gone
    assert fused.count("run_projected_block_end(") == 2
    assert "run_conv_bn(" in fused
    assert "conv1(" not in fused  # no module is called for itself
    with torch.no_grad(), Recorder() as recorder:
        create_feature_extractor(ours, ["layer2"])(images())
    assert recorder.names  # a mode sees modules in traced code too


def run_without_package(code: str, folder: Path) -> None:
    """Runs `code` in a process of its own, where this package cannot be imported."""
    code = f"import sys, torch; sys.modules['resnet_fused'] = None\n{code}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=folder)


def test_a_scripted_and_a_traced_model_need_no_package(tmp_path) -> None:
    ours, _ = pair(dtype=torch.float32)
    x = images(dtype=torch.float32)
    torch.jit.script(ours).save(tmp_path / "scripted.pt")
    torch.jit.trace(ours, x).save(tmp_path / "traced.pt")
    torch.export.save(torch.export.export(ours, (x,)), tmp_path / "exported.pt2")
    torch.save((x, ours(x).detach()), tmp_path / "expected")
    run_without_package(
        "x, y = torch.load('expected')\n"
        "for m in (torch.jit.load('scripted.pt'), torch.jit.load('traced.pt'), "
        "torch.export.load('exported.pt2').module()):\n"
        "    torch.testing.assert_close(m(x), y, rtol=1e-4, atol=1e-4)\n",
        tmp_path,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_with_a_dynamic_batch(dynamo: bool, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    ours, _ = pair(dtype=torch.float32)
    x, path = images(5, dtype=torch.float32), tmp_path / "model.onnx"
    options: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}}}
    if dynamo:
        options = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch", min=1, max=64)}}}
    torch.onnx.export(ours, (x[:2],), path, input_names=["x"], dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert relative_error(torch.from_numpy(found), ours(x)) < 1e-5


@pytest.mark.thorough
def test_ahead_of_time_inductor(tmp_path) -> None:
    """Compiled here and loaded where this package is not, each in a process of its own."""
    ours, _ = pair(dtype=torch.float32)
    x = images(dtype=torch.float32)
    torch.export.save(torch.export.export(ours, (x,)), tmp_path / "exported.pt2")
    torch.save((x, ours(x).detach()), tmp_path / "expected")
    run_without_package(
        "torch._inductor.aoti_compile_and_package(torch.export.load('exported.pt2'), "
        "package_path='compiled.pt2')",
        tmp_path,
    )
    run_without_package(
        "x, y = torch.load('expected')\n"
        "found = torch._inductor.aoti_load_package('compiled.pt2')(x)\n"
        "torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-4)",
        tmp_path,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_inside_compiled_code(transform: str) -> None:
    """Not `jvp`: compiled, it fails inside PyTorch 2.14 for torchvision's networks too."""
    torch._dynamo.reset()
    ours, theirs = pair()

    def run(model: nn.Module) -> Any:
        x = images()
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).square().sum())(x)
        return torch.func.vmap(model)(x[:, None])

    compiled = torch.compile(run, backend="aot_eager")(ours)
    close(compiled, run(theirs), 1e-9)


def test_compiled_model_is_fused_and_keeps_hooks() -> None:
    torch._dynamo.reset()
    ours, theirs = pair()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        close(torch.compile(ours, fullgraph=True, backend=keep)(images()), theirs(images()), 1e-9)
        calls = [str(node.target) for node in graphs[0].graph.nodes]
        assert sum("resnet_fused" in call for call in calls) == 18
        ours.layer2[0].conv1.forward = lambda x, f=ours.layer2[0].conv1.forward: f(x) * 0.7
        theirs.layer2[0].conv1.forward = lambda x, f=theirs.layer2[0].conv1.forward: f(x) * 0.7
        torch._dynamo.reset()
        close(torch.compile(ours, backend=keep)(images()), theirs(images()), 1e-9)


def test_gradient_is_that_of_what_was_computed() -> None:
    """Although a forward in training mode changes the statistics before the backward."""
    ours, _ = pair(dtype=torch.float32)
    x = images(dtype=torch.float32)
    ours(x).square().sum().backward()
    expected = copy.deepcopy(gradients(ours))
    ours.zero_grad()
    out = ours(x)
    ours.train()(x * 3)
    out.square().sum().backward()
    close(gradients(ours), expected, 1e-6)


def test_direct_ops_inside_transforms_and_modes() -> None:
    ours, theirs = pair()
    conv, bn = ours.conv1, ours.bn1

    def fused(x: Tensor) -> Tensor:
        layer = ConvBn(
            Convolution(conv.weight, (2, 2), (3, 3)),
            BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias),
        )
        return resnet_fused.ops.conv_bn(x, layer, relu=True)

    def plain(x: Tensor) -> Tensor:
        return F.relu(theirs.bn1(theirs.conv1(x)))

    x = images()
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (x,)),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.vmap(f)(x[:, None]),
    ):
        close(transform(fused), transform(plain), 1e-9)
    counts = []
    for function in (fused, plain):
        with FlopCounterMode(display=False) as counter:
            function(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with (
        torch.no_grad(),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"conv_bn has no forward-mode derivative"),
    ):
        torch.ops.resnet_fused.conv_bn(
            *(forward_ad.make_dual(x, x), conv.weight, (2, 2), (3, 3), (1, 1), 1),
            *(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps, None, True),
        )


def test_tensors_in_the_place_of_parameters_are_fused_too() -> None:
    """As in the replicas of `nn.DataParallel`."""
    ours, theirs = pair()
    for model in (ours, theirs):
        for module in model.modules():
            for name in ("weight", "bias"):
                if name in module._parameters and module._parameters[name] is not None:
                    tensor = module._parameters.pop(name).detach() * 1.1
                    setattr(module, name, tensor)
    with torch.no_grad(), mock.patch("resnet_fused.fusion.run_unfused", side_effect=AssertionError):
        found = ours(images())
    close(found, theirs(images()), 1e-9)


def test_tensors_without_strides_are_the_modules_matter() -> None:
    ours, theirs = (model.float() for model in pair())
    x = images(dtype=torch.float32)
    with torch.inference_mode():
        if torch.backends.mkldnn.is_available():
            found, expected = (model(x.to_mkldnn()).to_dense() for model in (ours, theirs))
            assert relative_error(found, expected) < 1e-5
        for model in (theirs, ours):
            with pytest.raises(RuntimeError, match="Input type"):
                model(x.to_sparse())


@pytest.mark.parametrize("found", [[1, 2], images(1).numpy(), None, "image"], ids=str)
def test_what_is_no_tensor_is_named(found: Any) -> None:
    ours, _ = pair()
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor"):
        ours(found)
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor"):
        resnet_fused.ops.head(found, ours.fc.weight)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [((), {"pretrained": True}), ((), {"pretrained": False}), ((True,), {})],
)
def test_deprecated_pretrained(
    arguments: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []

    def download(url: str, **_: Any) -> dict[str, Tensor]:
        urls.append(url)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    for constructor in (torchvision.models.resnet18, resnet_fused.resnet18):
        with pytest.warns(UserWarning, match="deprecated"):
            constructor(*arguments, **options)
    assert len(urls) == (2 if arguments or options["pretrained"] else 0)
    assert len(set(urls)) <= 1
    with pytest.raises(TypeError, match="give weights only"):
        resnet_fused.resnet18(weights="DEFAULT", pretrained=True)


def test_initialisation_again_gives_torchvisions_values() -> None:
    models = pair()
    for model in models:
        torch.manual_seed(5)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    assert all(
        torch.equal(a, b)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )


def test_a_backend_holds_for_the_thread_that_chose_it() -> None:
    x = images(dtype=torch.float32)
    default, seen = serving(x), {}

    def work(name: str, chosen: str | None) -> None:
        with use_backend(chosen):
            inside.wait()
            seen[name] = serving(x)
            inside.wait()

    inside = threading.Barrier(3)
    workers = [
        threading.Thread(target=work, args=("reference", "reference")),
        threading.Thread(target=work, args=("none", None)),
    ]
    for worker in workers:
        worker.start()
    inside.wait()
    seen["main"] = serving(x)
    inside.wait()
    for worker in workers:
        worker.join()
    reference = (backends.get("reference"),)
    assert seen == {"reference": reference, "none": default, "main": default}


class Copy(nn.Module):
    """Loads in a worker process and computes there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(1, dtype=torch.float32) + i)[0]


@pytest.mark.filterwarnings("ignore")
def test_in_data_loader_workers() -> None:
    ours, theirs = pair(dtype=torch.float32)
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            Copy(ours), batch_size=2, num_workers=1, multiprocessing_context=context, timeout=120
        )
        found = torch.cat(list(loader))
        with torch.no_grad():
            expected = torch.cat([theirs(images(1, dtype=torch.float32) + i) for i in range(4)])
        assert relative_error(found, expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_detection_backbone() -> None:
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor

    models = [_resnet_fpn_extractor(model, 3) for model in pair("resnet50")]
    models[0].load_state_dict(models[1].state_dict())
    found = [model.double().train()(images(1, 64)) for model in models]
    for features in found:
        sum(f.square().mean() for f in features.values()).backward()
    close(found[0], found[1], 1e-9)
    close(gradients(models[0]), gradients(models[1]), 1e-9)


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fully_sharded_data_parallel() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    results = []
    for model in pair():
        for block in [*model.layer1, *model.layer2, *model.layer3, *model.layer4]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        out = model(images())
        out.square().sum().backward()
        results.append((out.detach(), {k: g.full_tensor() for k, g in gradients(model).items()}))
    close(*results, 1e-9)


@pytest.mark.usefixtures("process_group")
def test_data_parallel_without_a_warning_of_strides() -> None:
    results = []
    for model in pair():
        parallel = nn.parallel.DistributedDataParallel(model.train())
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Grad strides do not match")
            parallel(images()).square().sum().backward()
        results.append(gradients(model))
    close(*results, 1e-9)


def test_safe_tensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="its format is tested")
    ours, theirs = pair()
    safetensors.save_model(ours, tmp_path / "model.safetensors")
    safetensors.load_model(theirs, tmp_path / "model.safetensors")
    close(theirs(images()), ours(images()), 1e-9)


# What is not needed is not computed


class Counting:
    """Training pieces that count their calls, which programs do not make."""

    replays = None

    def __init__(self, pieces: Any) -> None:
        self._pieces, self.calls = pieces, []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            return getattr(self._pieces, name)(*arguments, **options)

        return call


@pytest.fixture
def counted() -> Iterator[list[str]]:
    """The names of the training pieces that ran."""
    with training_ops_in_pytorch():
        (backend,) = serving(torch.empty(0))
        backend.training = pieces = Counting(backend.training)
        yield pieces.calls


def test_backward_in_another_thread_runs_on_the_backend_of_its_forward(counted: list[str]) -> None:
    block = resnet_fused.BasicBlock(4, 4).train()
    out = block(torch.randn(2, 4, 6, 6, generator=generator())).square().sum()
    worker = threading.Thread(target=out.backward)
    worker.start()
    worker.join()
    assert counted.count("wgrad") == 2


def bottleneck() -> tuple[nn.Module, nn.Module]:
    """A projected bottleneck in training mode, ours and torchvision's."""
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    theirs = torchvision.models.resnet.Bottleneck(8, 4, 2, shortcut)
    ours = resnet_fused.Bottleneck(8, 4, 2, copy.deepcopy(shortcut))
    theirs = randomise_statistics(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours.double().train(), theirs.double().train()


def block_input(requires_grad: bool) -> Tensor:
    x = torch.randn(2, 8, 6, 6, generator=generator(), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def step(block: nn.Module, x: Tensor) -> Any:
    out = block(x)
    out.square().sum().backward()
    return out.detach(), gradients(block), x.grad


def test_frozen_without_gradients_runs_as_in_inference(counted: list[str]) -> None:
    ours, _ = bottleneck()
    resnet_fused.freeze_batch_norm(ours).requires_grad_(False).train()
    expected = copy.deepcopy(ours).eval()(block_input(False))
    assert torch.equal(ours(block_input(False)), expected)
    with torch.no_grad():
        assert torch.equal(ours(block_input(True)), expected)
    assert counted == []


@pytest.mark.parametrize(
    ("trainable", "requires_grad", "convolutions"),
    [
        (["conv3", "bn3"], False, {"wgrad": 1}),
        (["bn3"], False, {}),
        (["downsample"], False, {"wgrad": 1}),
        (["bn1"], False, {"dgrad": 2}),
        (["conv2"], False, {"wgrad": 1, "dgrad": 1}),
        ([], True, {"dgrad": 4}),
        (["conv1", "downsample"], True, {"wgrad": 2, "dgrad": 4}),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else None,
)
def test_only_what_is_needed_is_computed(
    trainable: list[str], requires_grad: bool, convolutions: dict[str, int], counted: list[str]
) -> None:
    ours, theirs = bottleneck()
    for block in (ours, theirs):
        block.requires_grad_(False)
        for name in trainable:
            getattr(block, name).requires_grad_(True)
    expected = step(theirs, block_input(requires_grad))
    close(step(ours, block_input(requires_grad)), expected, 1e-9)
    close(dict(ours.named_buffers()), dict(theirs.named_buffers()), 1e-9)
    assert {k: counted.count(k) for k in ("wgrad", "dgrad") if k in counted} == convolutions


def test_frozen_batch_norm_without_trainable_affine_recomputes_nothing(counted: list[str]) -> None:
    ours, _ = bottleneck()
    resnet_fused.freeze_batch_norm(ours).train()
    plain = copy.deepcopy(ours)
    close(step(ours, block_input(True))[1:], _unfused(plain), 1e-9)
    assert counted.count("conv_stats") == 4  # forward alone: no raw result is computed again


def _unfused(block: nn.Module) -> Any:
    x = block_input(True)
    run_modules(block, x).square().sum().backward()
    return gradients(block), x.grad


@pytest.mark.parametrize("frozen", [False, True])
def test_without_affine_parameters_training_is_fused(frozen: bool, counted: list[str]) -> None:
    torch.manual_seed(0)
    block = resnet_fused.BasicBlock(4, 4, norm_layer=lambda c: nn.BatchNorm2d(c, affine=False))
    block = randomise_statistics(block).double().train()
    if frozen:
        resnet_fused.freeze_batch_norm(block).train()
    plain = copy.deepcopy(block)
    x = torch.randn(2, 4, 6, 6, generator=generator(), dtype=torch.float64)
    block(x).square().sum().backward()
    assert counted.count("wgrad") == 2
    block_grads = gradients(block)
    run_modules(plain, x).square().sum().backward()
    close(block_grads, gradients(plain), 1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["deprecated_statistics", "a_step_of_training", "channels_last_model"]
)
@pytest.mark.parametrize("arch", ["resnet18", pytest.param("resnet50", marks=pytest.mark.thorough)])
def test_use_through_the_training_ops(name: str, arch: str) -> None:
    ours, theirs = pair(arch)
    if name == "deprecated_statistics" and arch == "resnet50":
        pytest.skip("it names the blocks of ResNet-18")
    expected = USES[name](theirs.train())
    with training_ops_in_pytorch():
        close(USES[name](ours.train()), expected, 1e-9)
