"""PyTorch's convolution, in terms that oneDNN, which computes it on the CPU, computes right.

Found with torch 2.14.1 (oneDNN of its own) on a Zen 5, the last on a Zen 3, each case against
float64, in child processes:

- **Crash.** A window that misses the image on both sides, for every position along the width (x of
  width 1, kernel 1, stride 2, padding 1 or 3, dilation 2: windows at -1 and 1), ends the process
  with a segmentation fault in bfloat16, channels_last. It takes stride and dilation above 1 there;
  in float32 it was seen on other processors with dilation 1 (pytorch #195394). Windows that miss
  the height do no harm, nor does the padding's size, nor a map of one pixel by itself.
- **Wrong result in bfloat16.** A result one pixel wide of a stride above 1 along the width. With
  one input channel a group its values are wrong (off by 5 where 3 is the largest). With any number
  of them the gradient of the weight is uninitialised memory (3×3, stride 2, padding 1 on a single
  pixel). The same of 3-d convolutions is pytorch #169688.
- **Wrong result, every dtype.** Groups, and a channels_last weight whose stride along a dimension
  of size 1 is not that of a dense tensor: (8, 3, 3, 1) with strides (9, 1, 3, 1). Such strides of
  the input did no harm.
- **Wrong gradient in float32, with AVX2.** That of the weight of a 1×1 window that moves by more
  than a pixel, of fewer than 8 channels, channels_last: other memory is read, so that equal calls
  differ (5 channels of 12×12 pixels, stride 2).

Each has an equal convolution that comes out right: padding written out, a stride of 1 where there
is one window, the usual strides, and the pixels that a 1×1 window sees by themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parameters import Convolution


def convolve(x: Tensor, conv: Convolution) -> Tensor:
    """`F.conv2d` of x (N, C, H, W) -> (N, K, P, Q), in the layout that PyTorch gives it."""
    if x.device.type == "cpu":
        x, conv = well_posed(x, conv)
        conv = conv._replace(weight=usual_strides(conv.weight))
    return F.conv2d(x, conv.weight, None, *conv[1:])


def convolution_backward(grad: Tensor, x: Tensor, conv: Convolution, which: int) -> Tensor:
    """The gradient of x (which = 0) or of the weight (1), of the dtype of `grad`, which is
    channels_last."""
    weight = conv.weight.to(grad.dtype).contiguous(memory_format=torch.channels_last)
    found: Tensor = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        *conv[1:4],
        False,
        [0, 0],
        conv.groups,
        [which == 0, which == 1, False],
    )[which]
    return found


def well_posed(x: Tensor, conv: Convolution) -> tuple[Tensor, Convolution]:
    """An input and a convolution with the same result, whose geometry oneDNN computes right.

    They are the given ones but for what the module describes, which no layer of a ResNet is on an
    image of ordinary size. Of the weight only the shape is looked at.
    """
    if (
        x.shape[1] < 8
        and conv.stride != (1, 1)
        and tuple(conv.weight.shape[2:]) == (1, 1)
        and conv.padding == (0, 0)
    ):
        x = x[..., :: conv.stride[0], :: conv.stride[1]]
        return x, conv._replace(stride=(1, 1))
    (_, stride), (padding_h, padding), (_, dilation) = conv[1:4]
    width, kernel = x.shape[3], conv.weight.shape[3]
    one_window = (
        stride > 1 and x.dtype == torch.bfloat16 and conv.output_size(x.shape[2], width)[1] == 1
    )
    if not one_window and not _misses(width, kernel, stride, padding, dilation):
        return x, conv
    x = F.pad(x, (padding, padding))
    conv = conv._replace(padding=(padding_h, 0))
    if one_window:
        x = x[..., : dilation * (kernel - 1) + 1]
        conv = conv._replace(stride=(conv.stride[0], 1))
    return x, conv


def _misses(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether no window along a dimension meets the image."""
    if padding % dilation == 0 and padding // dilation < kernel:
        return False  # the first window has a tap on the first pixel
    first = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return not any(0 <= start + dilation * tap < size for start in first for tap in range(kernel))


def usual_strides(tensor: Tensor) -> Tensor:
    """A view of a dense tensor (4 dimensions) whose strides along sizes of 1 are the usual ones."""
    c, h, w = tensor.shape[1:]
    usual = ((c * h * w, h * w, w, 1), (c * h * w, 1, w * c, c))
    if 1 not in tensor.shape or tensor.stride() in usual:
        return tensor
    if tensor.is_contiguous():
        return tensor.squeeze().view(tensor.shape)
    if tensor.is_contiguous(memory_format=torch.channels_last):
        nhwc = tensor.permute(0, 2, 3, 1)
        return nhwc.squeeze().view(nhwc.shape).permute(0, 3, 1, 2)
    return tensor
