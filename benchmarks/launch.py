"""Single launches of the CUDA kernels without PyTorch, for profilers and memory checkers.

    python benchmarks/launch.py small                              every kernel, results verified
    compute-sanitizer --tool racecheck python benchmarks/launch.py small --only sm90 stem
    ncu --clock-control none --set full python benchmarks/launch.py large

`small`: each kernel and each tile of a convolution on integers in float16, three tiles for each
SM of a large GPU; results have to equal NumPy's, bit for bit. `large`: seven kernels of a
ResNet-50 on random values, 256 images, one launch each. The process holds nothing but the extension
and the driver's library, and all kernels in it are ours. `--simulate` takes the host simulator.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_PATTERN = 2**20 + 7  # random values in a large tensor before they repeat


def load(name: str) -> ModuleType:
    """resnet_fused's extension of that name, without the package, which imports PyTorch."""
    folders = [str(Path(__file__).resolve().parents[1] / "resnet_fused")]
    if installed := importlib.util.find_spec("resnet_fused"):
        folders += installed.submodule_search_locations or []
    found = importlib.machinery.PathFinder.find_spec(name, folders)
    if found is None or found.loader is None:
        sys.exit(f"{name} is not built: run `pip install -e .` (with RESNET_FUSED_HOST_SIM=on)")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


class Driver:
    """Global memory of GPU 0, by the driver's library, in the context that the kernels use."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            sys.exit(f"there is no NVIDIA driver here ({error}); --simulate does without")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._allocated: list[int] = []

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} failed with CUDA error {status}")

    def put(self, array: Array) -> int:
        """The address of a copy."""
        address = ctypes.c_uint64()
        size = ctypes.c_size_t(array.nbytes)
        self._call("cuMemAlloc_v2", ctypes.byref(address), size)
        self._allocated.append(address.value)
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), size)
        return address.value

    def get(self, address: int, array: Array) -> None:
        """Fills `array` from memory, once all launches have ended."""
        self._call("cuCtxSynchronize")
        size = ctypes.c_size_t(array.nbytes)
        self._call(
            "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), size
        )

    def free(self) -> None:
        """Frees all of it."""
        self._call("cuCtxSynchronize")
        for address in self._allocated:
            self._call("cuMemFree_v2", ctypes.c_uint64(address))
        self._allocated.clear()


class Simulator:
    """The same with the host's memory, of which a simulated kernel may touch its tensors only."""

    def __init__(self, extension: ModuleType) -> None:
        extension.set_capability(90)
        self._arrays: list[Array] = []

    def put(self, array: Array) -> int:
        self._arrays.append(array.copy())
        return int(self._arrays[-1].ctypes.data)

    def get(self, address: int, array: Array) -> None:
        (held,) = (a for a in self._arrays if a.ctypes.data == address)
        array[...] = held

    def free(self) -> None:
        self._arrays.clear()


class Values:
    """Where a launch's tensors come from: integers of few values, or random numbers."""

    def __init__(self, integers: bool) -> None:
        self._integers = integers
        self._rng = np.random.default_rng(0)

    def activation(self, *shape: int) -> Array:
        if self._integers:
            return self._rng.integers(-1, 2, shape).astype(np.float16)
        return np.resize(self._rng.standard_normal(_PATTERN).astype(np.float16), shape)

    def weight(self, filters: int, window: int, channels: int) -> Array:
        shape = (filters, window, window, channels)
        if self._integers:
            kept = self._rng.random(shape) < 0.3
            return (self._rng.integers(-1, 2, shape) * kept).astype(np.float16)
        scale = (2 / (window * window * channels)) ** 0.5
        return (self._rng.standard_normal(shape) * scale).astype(np.float16)


class Layer(NamedTuple):
    """A convolution with batch norm of an input (images, height, width, channels)."""

    channels: int
    filters: int
    window: int = 1
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.window // 2

    def size(self, pixels: int) -> int:
        return (pixels + 2 * self.padding - self.window) // self.stride + 1


def _vectors(filters: int) -> list[Array]:
    """Mean 1, variance 1, weights 1 and -1, bias 1."""
    one = np.ones(filters, np.float32)
    sign = np.where(np.arange(filters) % 3 == 0, -1, 1).astype(np.float32)
    return [one, one, sign, one]


def _normalised(x: Array) -> Array:
    return (x - 1) * _vectors(x.shape[-1])[2] + 1


def _sums(x: Array, weight: Array, layer: Layer, dtype: Any) -> Array:
    """The convolution's products, added in `dtype`, which has to hold them."""
    step, pad = layer.stride, layer.padding
    padded = np.pad(x.astype(dtype), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    height, width = layer.size(x.shape[1]), layer.size(x.shape[2])
    out = np.zeros((len(x), height, width, layer.filters), dtype)
    for r in range(layer.window):
        for s in range(layer.window):
            rows = slice(r, r + step * (height - 1) + 1, step)
            columns = slice(s, s + step * (width - 1) + 1, step)
            out += padded[:, rows, columns] @ weight[:, r, s].astype(dtype).T
    return out


def _convolved(x: Array, weight: Array, layer: Layer) -> Array:
    """The convolution's batch norm, exact in float32 on integers."""
    return _normalised(_sums(x, weight, layer, np.float32))


# As csrc/bindings/tensor_arg.h has it: address, number of the type, sizes of NCHW, strides, owner.
Tensor = tuple[int, int, tuple[int, ...], tuple[int, ...], None]
_TYPES = {
    np.dtype(kind): number
    for kind, number in (
        *((np.float32, 0), (np.float16, 1), (np.uint8, 4), (np.int8, 5), (np.int32, 6)),
    )
}


def _described(address: int, array: Array) -> Tensor:
    """A dense array (N, H, W, C), or one of lower rank, as the bindings take it."""
    sizes = array.shape
    strides = tuple(int(np.prod(sizes[i + 1 :])) for i in range(array.ndim))
    if array.ndim == 4:
        sizes, strides = ((t[0], t[3], t[1], t[2]) for t in (sizes, strides))
    return address, _TYPES[array.dtype], sizes, strides, None


class Launcher:
    """Launches kernels; verifies what they give where values are integers."""

    def __init__(self, extension: ModuleType, memory: Driver | Simulator, verify: bool) -> None:
        self._extension, self._memory, self._verify = extension, memory, verify
        self._values = Values(integers=verify)

    def _put(self, array: Array) -> Tensor:
        return _described(self._memory.put(array), array)

    def _batch_norm(self, filters: int) -> tuple[Any, ...]:
        return (*(self._put(v) for v in _vectors(filters)), 0.0)

    def _finish(
        self,
        shape: Sequence[int],
        launch: Callable[[Tensor], None],
        expected: Callable[[], Array],
        dtype: Any = np.float16,
    ) -> None:
        """`launch(the result)`; then frees everything."""
        out = np.full(shape, np.nan if dtype == np.float16 else 99, dtype)
        described = self._put(out)
        launch(described)
        self._memory.get(described[0], out)
        self._memory.free()
        if not self._verify:
            return
        right = expected().astype(dtype)
        if not np.array_equal(out, right):
            wrong = int((out != right).sum())
            raise AssertionError(f"{wrong} of {out.size} elements differ from NumPy's")

    def _layer(self, x: Array, weight: Array, layer: Layer) -> tuple[Any, ...]:
        window = ((layer.stride,) * 2, (layer.padding,) * 2, (1, 1))
        return self._put(x), self._put(weight), window, self._batch_norm(layer.filters)

    def convolution(
        self,
        tile: str,
        images: int,
        pixels: int,
        layer: Layer,
        residual: bool = False,
        projection: Layer | None = None,
    ) -> None:
        """A tile's kernel; the projection is of an input of so many times the size."""
        x = self._values.activation(images, pixels, pixels, layer.channels)
        weight = self._values.weight(layer.filters, layer.window, layer.channels)
        size = layer.size(pixels)
        shape = (images, size, size, layer.filters)
        added = self._values.activation(*shape) if residual else None
        side: tuple[Array, Array, Layer] | None = None
        if projection:
            wide = projection.stride * size
            shortcut = self._values.activation(images, wide, wide, projection.channels)
            side = (
                shortcut,
                self._values.weight(projection.filters, 1, projection.channels),
                projection,
            )

        def launch(out: Tensor) -> None:
            self._extension.cuda_conv_bn(
                out,
                self._layer(x, weight, layer),
                projection=self._layer(*side) if side else None,
                residual=None if added is None else self._put(added),
                groups=1,
                relu=True,
                tf32=False,
                tile=getattr(self._extension.ConvTile, tile),
                device=0,
                stream=0,
            )

        def expected() -> Array:
            result = _convolved(x, weight, layer) + (0 if added is None else added)
            return np.maximum(result + (_convolved(*side) if side else 0), 0)

        self._finish(shape, launch, expected)

    def int8(self, tile: str, images: int, pixels: int, layer: Layer, signed: bool) -> None:
        """A quantised convolution of uint8 or int8, with a residual of the other of them."""
        rng = np.random.default_rng(0)
        kinds = (np.int8, np.uint8) if signed else (np.uint8, np.int8)

        def draw(kind: Any, *shape: int) -> Array:
            limits = np.iinfo(kind)
            made: Array = rng.integers(limits.min, limits.max + 1, shape, kind)
            return made

        x = draw(kinds[0], images, pixels, pixels, layer.channels)
        weight = draw(np.int8, layer.filters, layer.window, layer.window, layer.channels)
        size = layer.size(pixels)
        shape = (images, size, size, layer.filters)
        added = draw(kinds[1], *shape)
        bias = rng.integers(-9999, 9999, layer.filters, np.int32)
        spread = 9000 * (layer.window**2 * layer.channels) ** 0.5
        multiplier = np.linspace(50 / spread, 100 / spread, layer.filters, dtype=np.float32)
        scale = np.linspace(0, spread / 100, layer.filters, dtype=np.float32)
        # As csrc/kernels/cuda/quantized_conv.h has it: within each 16 output channels.
        packed = weight.reshape(-1, 4, 2, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        window = ((layer.stride,) * 2, (layer.padding,) * 2, (1, 1))

        def launch(out: Tensor) -> None:
            self._extension.cuda_quantized_conv(
                out,
                (self._put(x), self._put(np.ascontiguousarray(packed)), window),
                *(self._put(bias), self._put(multiplier), self._put(scale), self._put(added)),
                projection=None,
                relu=True,
                tile=getattr(self._extension.QuantizedTile, tile),
                device=0,
                stream=0,
            )

        def expected() -> Array:
            acc = _sums(x, weight, layer, np.float64) + bias
            acc += np.rint(added.astype(np.float32) * scale)
            return np.clip(np.rint(acc.astype(np.float32) * multiplier), 0, 255)

        self._finish(shape, launch, expected, np.uint8)

    def bottleneck(
        self, kernel: str, images: int, pixels: int, inner: int, stride: int, project: bool
    ) -> None:
        """A whole block; without a projection its input has as many channels as its result."""
        run = getattr(self._extension, f"cuda_{kernel}")
        channels = out_channels = inner if self._verify else 4 * inner
        layers = [
            Layer(channels, inner),
            Layer(inner, inner, 3, stride),
            Layer(inner, out_channels),
        ]
        if project:
            layers.append(Layer(channels, out_channels, 1, stride))
        x = self._values.activation(images, pixels, pixels, channels)
        weights = [self._values.weight(y.filters, y.window, y.channels) for y in layers]
        size = layers[1].size(pixels)

        def launch(out: Tensor) -> None:
            put = [(self._put(w), self._batch_norm(len(w))) for w in weights]
            run(out, self._put(x), put, stride, device=0, stream=0)

        def expected() -> Array:
            result: Array = x
            for weight, layer in zip(weights[:2], layers, strict=False):
                result = np.maximum(_convolved(result, weight, layer), 0)
            shortcut = _convolved(x, weights[3], layers[3]) if project else x
            return np.maximum(_convolved(result, weights[2], layers[2]) + shortcut, 0)

        self._finish((images, size, size, out_channels), launch, expected)

    def stem(self, images: int, pixels: int, of_bytes: bool = False) -> None:
        layer = Layer(3, 64, 7, 2)
        x = self._values.activation(images, pixels, pixels, 3)
        weight = self._values.weight(64, 7, 3)
        size = (layer.size(pixels) + 1) // 2

        def launch(out: Tensor) -> None:
            weights, bn = self._put(weight), self._batch_norm(64)
            read = self._put((x + 8).astype(np.uint8) if of_bytes else x)
            scale_shift = ([1.0] * 3, [-8.0] * 3) if of_bytes else None
            self._extension.cuda_stem(out, read, weights, bn, scale_shift, device=0, stream=0)

        def expected() -> Array:
            padded = np.pad(
                np.maximum(_convolved(x, weight, layer), 0), ((0, 0), (1, 2), (1, 2), (0, 0))
            )
            taps = [
                padded[:, r : r + 2 * size : 2, s : s + 2 * size : 2]
                for r in range(3)
                for s in range(3)
            ]
            return np.maximum.reduce([tap[:, :size, :size] for tap in taps])

        self._finish((images, size, size, 64), launch, expected)

    def head(self, images: int, channels: int, classes: int) -> None:
        """The pooled means of 8 × 8 positions, then their product: exact, of integers."""
        x = self._values.activation(images, 8, 8, channels)
        weight = self._values.weight(classes, 1, channels)
        means = np.full((images, channels), np.nan, np.float32)

        def launch(out: Tensor) -> None:
            pooled, bias = self._put(means), self._put(np.ones(classes, np.float16))
            product = self._put(np.ascontiguousarray(weight[:, 0, 0]))
            self._extension.cuda_average_pool(pooled, self._put(x), device=0, stream=0)
            self._extension.cuda_linear(out, pooled, product, bias, device=0, stream=0)

        def expected() -> Array:
            mean = x.astype(np.float32).mean((1, 2))
            return np.asarray(mean @ weight[:, 0, 0].astype(np.float32).T + 1)

        self._finish((images, classes), launch, expected)

    def bn_add_relu(self, images: int, channels: int) -> None:
        x, added = (self._values.activation(images, 9, 7, channels) for _ in range(2))

        def launch(out: Tensor) -> None:
            bn, residual = self._batch_norm(channels), self._put(added)
            self._extension.cuda_bn_add_relu(
                out, self._put(x), bn, residual, relu=True, device=0, stream=0
            )

        self._finish(x.shape, launch, lambda: np.maximum(_normalised(x) + added, 0))


Launch = tuple[str, Callable[[], None]]


def small(
    run: Launcher, tiles: Sequence[str], int8_tiles: Sequence[str], images: int
) -> Iterator[Launch]:
    """Every kernel: 21 × 21 positions an image, so that 80 are three tiles for each of 132 SMs."""
    for tile in tiles:
        conv = partial(run.convolution, tile, images)
        if "lines" in tile:  # which is for such windows alone; small images share a tile
            yield f"{tile} 3x3", partial(conv, 14, Layer(72, 136, 3))
            yield f"{tile} 3x3 small", partial(conv, 7, Layer(72, 136, 3))
            continue
        if "resident" in tile:  # weights of up to eight steps
            for channels in (72, 512):
                layer = Layer(channels, 136)
                yield f"{tile} pointwise {channels}", partial(conv, 21, layer, residual=True)
            continue
        # Where blocks share a K loop, each needs a step of 64 channels.
        channels = 520 if "split" in tile else 72
        pointwise = Layer(channels, 136)
        yield f"{tile} pointwise residual", partial(conv, 21, pointwise, residual=True)
        if tile != "m128n128":  # which has no kernel for it
            side = Layer(channels, 136, 1, 2)
            yield f"{tile} projection", partial(conv, 21, pointwise, projection=side)
        yield f"{tile} 3x3", partial(conv, 21, Layer(72, 136, 3))
        yield f"{tile} 3x3 strided", partial(conv, 42, Layer(24, 136, 3, 2))
    for tile in int8_tiles:
        conv = partial(run.int8, tile, images)
        yield f"int8 {tile} pointwise", partial(conv, 21, Layer(80, 144), signed=False)
        yield f"int8 {tile} 3x3 strided", partial(conv, 42, Layer(48, 144, 3, 2), signed=True)
    for inner, stride, project in ((64, 1, False), (64, 1, True), (64, 2, True), (128, 1, False)):
        for kernel in ("bottleneck", "bottleneck_sm90"):
            if kernel == "bottleneck" or (inner, stride) == (64, 1):
                name = f"{kernel} {inner}/{stride}{' projection' * project}"
                yield name, partial(run.bottleneck, kernel, images, 15, inner, stride, project)
    yield "stem", partial(run.stem, images, 40)
    yield "stem bytes", partial(run.stem, images, 40, of_bytes=True)
    yield "head", partial(run.head, min(images, 16), 264, 1000)
    yield "bn_add_relu", partial(run.bn_add_relu, images, 64)


def large(run: Launcher, images: int) -> Iterator[Launch]:
    """Kernels of a ResNet-50, each bound by something else."""
    narrow, wide = "m128n64_sm90", "m128n128_sm90"
    deep = Layer(256, 256, 3)
    yield "3x3 64 on 56", partial(run.convolution, narrow, images, 56, Layer(64, 64, 3))
    yield (
        "1x1 64-256 on 56",
        partial(run.convolution, wide, images, 56, Layer(64, 256), residual=True),
    )
    yield "3x3 256 on 14", partial(run.convolution, wide, images, 14, deep)
    yield "3x3 256 on 14 lines", partial(run.convolution, "m200n128_sm90_lines", images, 14, deep)
    yield (
        "1x1 256-1024 on 14 resident",
        partial(
            run.convolution,
            *("m64n128_sm90_resident", images, 14, Layer(256, 1024)),
            residual=True,
        ),
    )
    yield "3x3 256 on 14 mma.sync", partial(run.convolution, "m128n128", images, 14, deep)
    for kernel in ("bottleneck", "bottleneck_sm90"):
        yield f"{kernel} 64 on 56", partial(run.bottleneck, kernel, images, 56, 64, 1, False)
    yield "stem", partial(run.stem, images, 224)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("small", "large"))
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="launches whose name has the word"
    )
    parser.add_argument("--images", type=int, help="small: 80, simulated 2; large: 256")
    parser.add_argument("--simulate", action="store_true", help="on the host, without a GPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the launches; 1 if a result differs from NumPy's."""
    options = parse(arguments)
    extension = load("_C_sim" if options.simulate else "_C")
    verify = options.what == "small"
    images = options.images or ((2 if options.simulate else 80) if verify else 256)
    launcher = Launcher(extension, Simulator(extension) if options.simulate else Driver(), verify)
    tiles = [name for name in extension.ConvTile.__members__ if name != "automatic"]
    int8_tiles = list(extension.QuantizedTile.__members__)
    launches = small(launcher, tiles, int8_tiles, images) if verify else large(launcher, images)
    failed = ran = 0
    for name, launch in launches:
        if options.only and not any(word in name for word in options.only):
            continue
        ran += 1
        try:
            launch()
            print(f"{name}: done{', as NumPy has it' if verify else ''}", flush=True)
        except (AssertionError, RuntimeError) as error:
            failed += 1
            print(f"{name}: FAILED: {error}", flush=True)
    if not ran:
        print("There is no such launch.", file=sys.stderr)
    return int(failed > 0 or not ran)


if __name__ == "__main__":
    sys.exit(main())
