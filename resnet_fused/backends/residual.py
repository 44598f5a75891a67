"""What a block's end adds, as the extension's kernels take it: read where it lies.

They take any strides but between channels, which are neighbours, and add nothing beyond the
residual's last channel, so that shortcut option A's `x[:, :, ::2, ::2]` is never copied.
"""

from __future__ import annotations

from torch import Tensor, channels_last

ResidualArgument = tuple[int, int, tuple[int, int, int]] | None


def readable(residual: Tensor | None) -> Tensor | None:
    """The residual itself, or its channels_last copy where its channels are no neighbours."""
    if residual is None or residual.shape[1] == 1 or residual.stride(1) == 1:
        return residual
    return residual.contiguous(memory_format=channels_last)


def residual_argument(residual: Tensor | None) -> ResidualArgument:
    """Address, channels, and elements from an image, a row and a pixel to the next."""
    if residual is None:
        return None
    _, channels, height, width = residual.shape
    if residual.is_contiguous(memory_format=channels_last):  # strides along sizes of 1 may be any
        return (
            residual.data_ptr(),
            channels,
            (height * width * channels, width * channels, channels),
        )
    image, _, row, pixel = residual.stride()
    return residual.data_ptr(), channels, (image, row, pixel)
