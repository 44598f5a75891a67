"""Host side of every launch: what a signature settles once, layouts, offset width, the machine."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary
from triton.compiler import CompiledKernel

from ..._extension import optional_tensor_arg, tensor_arg
from ...parameters import BatchNorm, ConvBn, Convolution
from .. import Candidate, fences_products, recording, tf32_in_convolutions
from ..arguments import dense_convolution
from ..arguments import readable as readable
from ..bounded import Bounded

# Row indices run past the result by at most a tile, which must not overflow 32 bits either.
_NARROW_ELEMENTS = 2**31 - 2**16
_VECTOR_BYTES = 16  # the alignment that the compiler is told of

_plans: Bounded[Hashable, Any] = Bounded()
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()

_Parameters = ParamSpec("_Parameters")
_Plan = TypeVar("_Plan")
_Made = TypeVar("_Made")


class Config(NamedTuple):
    """How a kernel is launched: its tile sizes (their meaning is the kernel's), warps, stages."""

    blocks: tuple[int, ...]
    warps: int
    stages: int

    def tiles(self, rows: int, columns: int) -> int:
        """How many tiles, of its first two sizes, cover a result of so many rows and columns."""
        return triton.cdiv(rows, self.blocks[0]) * triton.cdiv(columns, self.blocks[1])

    def __str__(self) -> str:
        return f"{'×'.join(map(str, self.blocks))} {self.warps} warps {self.stages} stages"


class Machine(NamedTuple):
    """What the heuristics must know of a GPU."""

    num_sms: int
    shared_bytes: int  # that one program may use
    converts_e4m3: bool = False  # in hardware, and rounding once
    tensor_memory: bool = False  # whether products are tcgen05's
    architecture: str | None = None  # what to compile for, if not for the GPU's own
    interpreted: bool = False

    @classmethod
    def of(cls, num_sms: int, shared_bytes: int, capability: int) -> Machine:
        """Of a GPU of that compute capability, times ten. Where products of warp groups would lack
        a fence (`fences_products`) its kernels have sm_89's, which are single warps'. For sm_89
        Triton makes e4m3 of float32 by way of a float16 that is cut off."""
        fenced = fences_products() or capability // 10 not in (9, 10, 11)
        return cls(
            num_sms,
            shared_bytes,
            fenced and capability >= 90,
            fenced and capability // 10 == 10,
            None if fenced else "sm89",
        )


@functools.cache
def machine(device: torch.device) -> Machine:
    """Limits of `device`; of the interpreter, which runs programs one by one, on the CPU."""
    if device.type != "cuda":
        return Machine(1, 227 * 1024, interpreted=True)
    properties: Any = torch.cuda.get_device_properties(device)  # stubs lack some of them
    return Machine.of(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        10 * properties.major + properties.minor,
    )


def candidates(run: Callable[..., Any], configs: Iterable[Config], family: str) -> list[Candidate]:
    """`run(config, *arguments)` in each configuration, the heuristic's choice first."""
    return [
        Candidate(
            f"triton {'x'.join(map(str, config.blocks))} w{config.warps} s{config.stages}",
            functools.partial(run, config),
            family,
        )
        for config in configs
    ]


def filling_first(
    configs: Sequence[Config], device: torch.device, rows: int, columns: int
) -> list[Config]:
    """Of configurations from the largest tile to the smallest: those with a tile for each SM, then
    the others, the smallest first."""
    num_sms = machine(device).num_sms
    filling = [config for config in configs if config.tiles(rows, columns) >= num_sms]
    return [*filling, *(config for config in reversed(configs) if config not in filling)]


class Image(NamedTuple):
    """Sizes of an NHWC tensor, for kernels."""

    h: int
    w: int
    c: int

    @classmethod
    def of(cls, x: Tensor) -> Image:
        """Those of an (N, C, H, W) tensor."""
        return cls(x.shape[2], x.shape[3], x.shape[1])


class Window(NamedTuple):
    """A convolution's window, known when a kernel is compiled.

    is_padded: some tap may fall outside the image. is_pointwise: 1×1, stride 1, no padding, a plain
    matrix product. is_flat: taps and channels make one inner index, for few channels.
    packed_in, packed_out: channels of a group, where tiles pack several groups; else 0.
    """

    r: int
    s: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    is_padded: bool
    is_pointwise: bool
    is_flat: bool = False
    packed_in: int = 0
    packed_out: int = 0

    @classmethod
    def of(cls, conv: Convolution) -> Window:
        """That of `conv`."""
        r, s = conv.weight.shape[2:]
        is_padded = max(conv.padding) > 0
        return cls(
            r, s, *conv.stride, *conv.padding, *conv.dilation, is_padded, conv.is_pointwise()
        )


class Tile(NamedTuple):
    """What a program of a GEMM computes: m rows × n columns, c of the inner dimension a step."""

    m: int
    n: int
    c: int
    is_wide: bool  # whether offsets need 64 bits
    precision: str  # of `tl.dot`'s operands


class Strides(NamedTuple):
    """Elements from a position of an (N, C, H, W) tensor to the next, for kernels."""

    n: int
    c: int
    h: int
    w: int


class Launch:
    """A kernel with all that a signature settles: grid, configuration, sizes and constants.

    Calling it with the kernel's tensors, in order, starts it on the current stream of their device.
    The first call compiles; later ones pass Triton's look-up of what was compiled by.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        config: Config,
        device: torch.device,
        *,
        fuses: bool = True,
        **settled: Any,
    ) -> None:
        """`fuses`: whether the compiler may fuse a multiplication and an addition. `settled`: by
        name, the parameters of the kernel that follow its tensors."""
        names = kernel.arg_names[-len(settled) :]
        if set(names) != settled.keys():
            raise TypeError(f"{kernel.__name__} ends in {names}, and {[*settled]} were settled")
        self.kernel = kernel
        self.grid = grid
        self.options: dict[str, Any] = {  # spelled out, as the last one's default varies
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": fuses,
        }
        if architecture := machine(device).architecture:
            self.options["arch"] = architecture
        self.config = config
        self.settled = [settled[name] for name in names]
        self._index = device.index if device.type == "cuda" else None
        self._compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Any) -> None:
        recorder = recording.recorder.get()
        if recorder is not None:
            self._record(recorder, tensors)
        if self._index is not None and torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self._index):
                self._start(tensors)
        else:
            self._start(tensors)

    def replay(self, *addresses: Any) -> None:
        """Starts it anew, on the device that is current, with addresses in place of tensors."""
        assert self._compiled is not None
        self._compiled(*addresses, *self.settled)

    def _record(self, recorder: Any, arguments: tuple[Any, ...]) -> None:
        if all(a is None or isinstance(a, Tensor) for a in arguments):
            recorder.add_call(self.replay, list(map(optional_tensor_arg, arguments)))
            return
        # Some are groups of tensors and numbers, of which the recorder takes the tensors.
        leaves, structure = tree_flatten(arguments)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [tensor_arg(leaves[place]) for place in places]
        for place in places:  # a program lives for long, and is to hold none of them
            leaves[place] = None

        def replay(*addresses: Any) -> None:
            values = list(leaves)
            for place, address in zip(places, addresses, strict=True):
                values[place] = address
            self.replay(*tree_unflatten(values, structure))

        recorder.add_call(replay, tensors)

    def _start(self, tensors: tuple[Any, ...]) -> None:
        if self._compiled is not None:
            self._compiled(*tensors, *self.settled)
            return
        compiled = self.kernel[self.grid](*tensors, *self.settled, **self.options)
        if isinstance(compiled, CompiledKernel):
            self._compiled = compiled[(*self.grid, 1, 1)[:3]]


def launch_pass(
    kernel: Any, config: Config, rows: int, x: Tensor, *others: Tensor | None, **settled: Any
) -> Launch:
    """Of a kernel that takes a tile of rows × x's channels a program; x and `others` are what it
    goes through."""
    block_m, block_c = config.blocks
    return Launch(
        kernel,
        (config.tiles(rows, x.shape[1]),),
        config,
        x.device,
        rows=rows,
        WIDE=is_wide(x, *others),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        **settled,
    )


def positions(x: Tensor) -> int:
    """Those of an (N, C, H, W) tensor's images together."""
    return x.numel() // x.shape[1]


def planned(make: Callable[_Parameters, _Plan]) -> Callable[_Parameters, _Plan]:
    """`make`, called once for all arguments of one signature, which is all that may enter a plan.

    Of a tensor that is dtype, sizes, strides, device, and whether it is aligned as the compiler was
    told; other values count as they are. Groups of arguments may nest. What a plan's launches are
    compiled for is told by their first tensors, so those whose kind is the caller's choice, or that
    may be None, are arguments too.
    """

    @functools.wraps(make)
    def find(*arguments: _Parameters.args, **none: _Parameters.kwargs) -> _Plan:
        # One loop and no calls of Python functions, because every launch comes by here.
        values: list[Any] = list(arguments)
        key: list[Hashable] = [make]
        for value in values:  # grows by what groups hold
            if isinstance(value, Tensor):
                aligned = value.data_ptr() % _VECTOR_BYTES
                key += (value.dtype, value.shape, value.stride(), aligned, value.device)
            elif isinstance(value, (tuple, list)):
                key.append(type(value))
                values += value
            else:
                key.append(value)
        place = tuple(key)
        plan: _Plan | None = _plans.get(place)
        if plan is None:
            plan = _plans[place] = make(*arguments, **none)
        return plan

    return find


# A tensor in channels_last memory; itself where it already is. No Python function, because every
# operand of every launch comes by here.
nhwc: Callable[[Tensor], Tensor] = operator.methodcaller(
    "contiguous", memory_format=torch.channels_last
)


def for_kernels(x: Tensor) -> Tensor:
    """x; of e4m3, where the GPU converts no such numbers, its bytes (`primitives.from_e4m3`)."""
    if x.dtype == torch.float8_e4m3fn and not machine(x.device).converts_e4m3:
        return x.view(torch.uint8)
    return x


def made_of(weight: Tensor, key: tuple[Hashable, ...], make: Callable[[], _Made]) -> _Made:
    """What `make` made of a frozen weight under that key, as long as the weight stays what it is.
    It may not hold the weight, which would then live for ever."""
    key = (*key, *recording.identity(weight))
    found = _made.get(weight)
    if found is None or found[0] != key:
        found = key, make()
        if recording.may_keep(weight):
            _made[weight] = found
    made: _Made = found[1]
    return made


def strides_beside(tensor: Tensor | None, out: Tensor) -> Strides | None:
    """What to read a `readable` tensor by; None where it is laid out like `out`."""
    if tensor is None or (tensor.shape == out.shape and nhwc(tensor) is tensor):
        return None
    return Strides(*tensor.stride())


def dense(bn: BatchNorm) -> BatchNorm:
    """`bn` with contiguous vectors."""
    mean, var, weight, bias, eps = bn
    return BatchNorm(
        mean.contiguous(),
        var.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        eps,
    )


def dense_layer(layer: ConvBn) -> ConvBn:
    """`layer` with a channels_last weight and contiguous vectors."""
    return ConvBn(dense_convolution(layer.conv, layer.conv.weight.dtype), dense(layer.bn))


def empty_nhwc(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised channels_last result."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into these tensors need 64 bits."""
    return any(_reach(t) > _NARROW_ELEMENTS for t in tensors if t is not None)


def _reach(tensor: Tensor) -> int:
    """The largest offset from the tensor's first element to any of its elements."""
    return sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def convolution_precision(dtype: torch.dtype) -> str:
    """Input precision of `tl.dot` in a convolution."""
    return "tf32" if dtype == torch.float32 and tf32_in_convolutions() else "ieee"


def matmul_precision(dtype: torch.dtype) -> str:
    """The same for matrix products (`torch.backends.cuda.matmul`)."""
    setting = torch.backends.cuda.matmul
    return "tf32" if dtype == torch.float32 and setting.fp32_precision == "tf32" else "ieee"
