"""What compiled kernels may hold: rules for all, budgets by name, and who breaks a rule.

A name says kernel, tile and window; Triton's have a colon. Budgets are counts of one warp, in a
step of the main loop and outside loops with products, as they stood when they were last looked at:
who exceeds one says in the commit why. KNOWN lists what breaks a rule today, with its value: what
becomes better or worse must be written down here.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

# Those that made the code that these numbers describe.
COMPILERS = {"nvcc": "nvcc 13.0.88", "triton": "triton 3.8.0"}

# How products must begin, by kernel; kernels that are not named have none.
_HOPPER, _INT8, _WARP = "HGMMA.64x", "IGMMA.64x", "HMMA.16816.F32"
_WARP_INT8 = "IMMA.16832."
_TENSOR = {
    "conv_bn_sm90_kernel": _HOPPER,
    "conv_bn_sm90_split_kernel": _HOPPER,
    "conv_bn_sm90_lines_kernel": _HOPPER,
    "quantized_conv_kernel": _WARP_INT8,
    "quantized_conv_sm90_kernel": _INT8,
    "conv_training_sm90_kernel": _HOPPER,
    "conv_training_sm90_lines_kernel": _HOPPER,
    "wgrad_sm90_kernel": _HOPPER,
    "conv_bn_kernel": _WARP,
    "bottleneck_kernel": _WARP,
    "bottleneck_sm90_kernel": _HOPPER,
    "stem_kernel": _WARP,
    "stem_sm90_kernel": _HOPPER,
    "conv_bn_kernel:": _HOPPER,
    "stem_kernel:": _HOPPER,
    "head_kernel:": _WARP,  # 16 images a tile are too few for a warpgroup
    "conv_stats_kernel:": _HOPPER,
    "dgrad_kernel:": _HOPPER,
    "wgrad_kernel:": _HOPPER,
    "gram_kernel:": _HOPPER,
    "end_products_kernel:": _HOPPER,
    "end_matrix_kernel:": _HOPPER,
}

_LONGEST_PASS = 1000  # instructions of a kernel without a main loop


def violations(name: str, kernel: dict[str, Any]) -> dict[str, Any]:
    """The rules that a kernel breaks, each by the fact that does, with its value.

    kernel: facts as `machine_code.facts` gives them, and the bytes that it spills. No spills; no
    loads or copies under 16 bytes a lane, and beside products only copies; copies and a
    warpgroup's products still running where the main loop waits; the right product; instructions
    within the budget.
    """
    base = name.split(" ")[0]
    main, elsewhere = BUDGETS.get(name, (0, 0))
    if kernel["instructions_main_loop"] == 0:
        elsewhere = min(elsewhere, _LONGEST_PASS)
    product = _TENSOR.get(base)
    narrow = {
        fact: {width: count for width, count in kernel[fact].items() if int(width) < 16}
        for fact in ("load_bytes", "copy_bytes", "load_bytes_elsewhere")
    }
    # Batch norm's vectors may be of any type: beside four loads of 4 bytes stand eight of 2. An
    # int8 or a training layer's are of one type.
    vectors = narrow["load_bytes_elsewhere"].pop("4", 0)
    one_type = product in (_INT8, _WARP_INT8) or base.startswith("conv_training_sm90")
    halves = 0 if one_type else 2 * vectors
    halves_loaded = narrow["load_bytes_elsewhere"].get("2", 0)
    narrow["load_bytes_elsewhere"]["2"] = max(0, halves_loaded - halves)
    if narrow["load_bytes_elsewhere"]["2"] == 0:
        narrow["load_bytes_elsewhere"] = {}
    found = {fact: widths for fact, widths in narrow.items() if widths}
    if product is not None and kernel["load_bytes"]:
        found["load_bytes"] = kernel["load_bytes"]
    if kernel["spilled"]:
        found["spilled"] = kernel["spilled"]
    products = kernel["tensor_instructions"]
    right = [i for i in products if product is not None and i.startswith(product)]
    if products != right or (product is not None and not products):
        found["tensor_instructions"] = products
    for fact, budget in (("instructions_main_loop", main), ("instructions_elsewhere", elsewhere)):
        if kernel[fact] > budget:
            found[fact] = kernel[fact]
    if kernel["copy_bytes"] and not kernel["copies_pending"]:
        found["copies_pending"] = kernel["copies_pending"]
    if product in (_HOPPER, _INT8) and not kernel["products_pending"]:
        found["products_pending"] = kernel["products_pending"]
    return found


BUDGETS: dict[str, tuple[int, int]] = {
    "conv_bn_kernel 128×128": (265, 2211),
    "conv_bn_kernel 128×64": (205, 1798),
    "conv_bn_kernel 128×64 projection": (208, 3127),
    "conv_bn_kernel 64×64": (288, 1509),
    "conv_bn_kernel 64×64 projection": (236, 2626),
    "conv_bn_sm90_kernel 128×64": (67, 1302),
    "conv_bn_sm90_kernel 128×64 projection": (69, 1787),
    "conv_bn_sm90_kernel 128×128": (62, 1592),
    "conv_bn_sm90_kernel 128×128 projection": (65, 2120),
    "conv_bn_sm90_kernel 128×128 ping-pong": (78, 2176),
    "conv_bn_sm90_kernel 128×128 ping-pong projection": (76, 2764),
    "conv_bn_sm90_kernel 128×256 cluster": (70, 2161),
    "conv_bn_sm90_kernel 128×256 cluster projection": (72, 2806),
    "conv_bn_sm90_kernel 256×128 cluster": (82, 2086),
    "conv_bn_sm90_kernel 256×128 cluster projection": (84, 2691),
    "conv_bn_sm90_kernel 128×64 signs": (67, 1423),
    "conv_bn_sm90_kernel 128×64 projection signs": (68, 1877),
    "conv_bn_sm90_kernel 128×128 signs": (62, 1747),
    "conv_bn_sm90_kernel 128×128 projection signs": (65, 2278),
    "conv_bn_sm90_kernel 128×128 ping-pong signs": (78, 2469),
    "conv_bn_sm90_kernel 128×128 ping-pong projection signs": (76, 3056),
    "conv_bn_sm90_kernel 128×256 cluster signs": (70, 2470),
    "conv_bn_sm90_kernel 128×256 cluster projection signs": (72, 3115),
    "conv_bn_sm90_kernel 256×128 cluster signs": (82, 2380),
    "conv_bn_sm90_kernel 256×128 cluster projection signs": (84, 2984),
    "conv_bn_sm90_lines_kernel 200": (194, 1106),
    "conv_bn_sm90_lines_kernel 224": (221, 1137),
    "conv_bn_sm90_split_kernel 2 0": (65, 1310),
    "conv_bn_sm90_split_kernel 2 1": (67, 1871),
    "conv_bn_sm90_split_kernel 4 0": (65, 1168),
    "conv_bn_sm90_split_kernel 4 1": (67, 1705),
    "conv_bn_sm90_split_kernel 8 0": (63, 1102),
    "conv_bn_sm90_split_kernel 8 1": (67, 1632),
    "quantized_conv_kernel 128×128 projection": (246, 3729),
    "quantized_conv_kernel 128×128 residual": (259, 3772),
    "quantized_conv_kernel 128×128": (258, 2366),
    "quantized_conv_kernel 64×64 projection": (219, 2111),
    "quantized_conv_kernel 64×64 residual": (214, 1651),
    "quantized_conv_kernel 64×64": (214, 1214),
    "quantized_conv_sm90_kernel 128×128 cluster projection": (80, 2199),
    "quantized_conv_sm90_kernel 128×128 cluster residual": (81, 2169),
    "quantized_conv_sm90_kernel 128×128 cluster": (81, 1561),
    "quantized_conv_sm90_kernel 128×128 projection": (77, 2130),
    "quantized_conv_sm90_kernel 128×128 residual": (78, 2110),
    "quantized_conv_sm90_kernel 128×128": (78, 1505),
    "quantized_conv_sm90_kernel 128×256 cluster projection": (67, 2203),
    "quantized_conv_sm90_kernel 128×256 cluster residual": (70, 2144),
    "quantized_conv_sm90_kernel 128×256 cluster": (65, 1538),
    "quantized_conv_sm90_kernel 128×64 projection": (65, 1370),
    "quantized_conv_sm90_kernel 128×64 residual": (67, 1173),
    "quantized_conv_sm90_kernel 128×64": (63, 1012),
    "conv_training_sm90_kernel 128×128 adds": (85, 1982),
    "conv_training_sm90_kernel 128×128 folded": (83, 3163),
    "conv_training_sm90_kernel 128×128 masks": (85, 3075),
    "conv_training_sm90_kernel 128×128 statistics": (77, 2232),
    "conv_training_sm90_kernel 128×128 sums": (69, 1426),
    "conv_training_sm90_kernel 128×64 adds": (74, 1536),
    "conv_training_sm90_kernel 128×64 folded": (72, 2142),
    "conv_training_sm90_kernel 128×64 masks": (74, 2152),
    "conv_training_sm90_kernel 128×64 statistics": (82, 1615),
    "conv_training_sm90_kernel 128×64 sums": (73, 1232),
    "conv_training_sm90_kernel 256×128 adds": (90, 1843),
    "conv_training_sm90_kernel 256×128 folded": (90, 3085),
    "conv_training_sm90_kernel 256×128 masks": (91, 2979),
    "conv_training_sm90_kernel 256×128 statistics": (76, 2142),
    "conv_training_sm90_kernel 256×128 sums": (90, 1331),
    "conv_training_sm90_lines_kernel 216×64 masks": (185, 3245),
    "conv_training_sm90_lines_kernel 216×64 statistics": (182, 2498),
    "conv_training_sm90_lines_kernel 248×64 masks": (185, 3535),
    "conv_training_sm90_lines_kernel 248×64 statistics": (179, 2691),
    "sum_parts_kernel": (37, 65),
    "wgrad_sm90_kernel 256×128": (83, 2403),
    "wgrad_sm90_kernel 256×64": (89, 1442),
    "bn_add_relu_kernel 8 0": (137, 227),
    "bn_add_relu_kernel 8 1": (223, 231),
    "bottleneck_kernel 64 inner, stride 2 projection": (273, 3808),
    "bottleneck_kernel 64 inner, stride 1": (381, 5077),
    "bottleneck_kernel 64 inner, stride 1 projection": (382, 5124),
    "bottleneck_kernel 128 inner, stride 2 projection": (226, 3629),
    "bottleneck_kernel 128 inner, stride 1": (370, 4958),
    "bottleneck_kernel 128 inner, stride 1 projection": (366, 4919),
    "bottleneck_sm90_kernel 64 inner, stride 1": (787, 2472),
    "bottleneck_sm90_kernel 64 inner, stride 1 projection": (776, 2493),
    "linear_kernel 8 4": (413, 331),
    "linear_kernel 8 1": (193, 269),
    "average_pool_kernel 8": (110, 185),
    "stem_kernel": (56, 1294),
    "stem_kernel bytes": (56, 1301),
    "stem_sm90_kernel 0": (845, 1295),
    "stem_sm90_kernel bytes 0": (846, 1514),
    "stem_kernel: stem (16, 16, 64) 8 warps": (371, 1128),
    "conv_bn_kernel: stage 1 projection (128, 128, 64) 8 warps": (69, 1271),
    "conv_bn_kernel: stage 1 3x3 (256, 64, 64) 8 warps": (163, 1024),
    "conv_bn_kernel: stage 1 expand (128, 128, 64) 8 warps": (69, 919),
    "conv_bn_kernel: stage 2 3x3 strided (256, 128, 64) 8 warps": (167, 1444),
    "conv_bn_kernel: stage 2 projection (128, 128, 64) 8 warps": (76, 1430),
    "conv_bn_kernel: stage 2 reduce (256, 128, 64) 8 warps": (90, 1034),
    "conv_bn_kernel: stage 3 3x3 (128, 256, 64) 8 warps": (123, 1478),
    "conv_bn_kernel: stage 4 3x3 (128, 128, 64) 8 warps": (131, 948),
    "conv_bn_kernel: stage 4 expand (128, 256, 64) 8 warps": (78, 1678),
    "conv_bn_kernel: stage 2 shortcut option A (256, 128, 64) 8 warps": (167, 2059),
    "conv_bn_kernel: stage 1 of ResNeXt 3x3 (256, 32, 32) 8 warps": (126, 639),
    "bn_add_relu_kernel: elementwise (16, 256) 4 warps": (0, 374),
    "gate_add_relu_kernel: squeeze and excitation (8, 512) 4 warps": (0, 386),
    "head_kernel: head (16, 64, 32) 4 warps": (1276, 1102),
    "conv_stats_kernel: 256×64×64 8 warps 3 stages 7×7/2": (1187, 1748),
    "bn_relu_pool_kernel: 32×64 4 warps 1 stages": (0, 1821),
    "conv_stats_kernel: 256×64×64 8 warps 3 stages 1×1": (86, 1350),
    "bn_add_relu_kernel: 64×64 8 warps 1 stages": (0, 161),
    "conv_stats_kernel: 256×64×64 8 warps 3 stages 3×3": (163, 1762),
    "conv_stats_kernel: 128×128×64 8 warps 3 stages 1×1": (69, 1276),
    "bn_add_relu_kernel: 32×128 8 warps 1 stages": (0, 161),
    "conv_stats_kernel: 128×128×64 8 warps 3 stages 3×3/2": (114, 1498),
    "conv_stats_kernel: 128×128×64 8 warps 3 stages 3×3": (114, 1498),
    "relu_gradient_kernel: 32×128 8 warps 1 stages": (112, 214),
    "pre_bn_gradient_kernel: 32×128 8 warps 1 stages": (0, 215),
    "wgrad_kernel: 128×128×64 8 warps 3 stages 1×1": (132, 551),
    "sum_parts_kernel: 1024 4 warps 1 stages": (83, 147),
    "wgrad_kernel: 128×64×64 4 warps 3 stages 3×3": (355, 972),
    "dgrad_kernel: 128×128×64 8 warps 3 stages 3×3, masks": (188, 2130),
    "dgrad_kernel: 128×128×64 8 warps 3 stages 1×1, adds": (100, 1154),
    "wgrad_kernel: 128×128×64 8 warps 3 stages 1×1/2": (308, 889),
    "wgrad_kernel: 128×64×64 4 warps 3 stages 3×3/2": (357, 972),
    "dgrad_kernel: 128×128×64 8 warps 3 stages 3×3/2, masks": (194, 2178),
    "wgrad_kernel: 128×128×64 8 warps 3 stages 3×3": (307, 898),
    "wgrad_kernel: 128×128×64 8 warps 3 stages 3×3/2": (309, 902),
    "wgrad_kernel: 128×64×64 8 warps 3 stages 1×1": (135, 428),
    "pre_bn_gradient_kernel: 64×64 8 warps 1 stages": (0, 215),
    "wgrad_kernel: 64×128×64 8 warps 3 stages 3×3": (311, 784),
    "dgrad_kernel: 128×64×64 8 warps 3 stages 3×3, masks": (162, 1269),
    "wgrad_kernel: 64×128×64 8 warps 3 stages 1×1": (132, 434),
    "wgrad_kernel: 32×32×32 4 warps 3 stages 1×1": (69, 256),
    "dgrad_kernel: 128×64×64 8 warps 3 stages 1×1, adds": (97, 591),
    "pool_gradient_kernel: 16×64 4 warps 1 stages": (0, 1062),
    "wgrad_kernel: 64×128×64 8 warps 3 stages 7×7/2": (1286, 489),
    "gram_kernel: 64×64×64 4 warps 3 stages": (408, 645),
    "conv_bn_kernel: 128×128×64 8 warps 3 stages 1×1, projects": (76, 1303),
    "conv_bn_kernel: 128×128×64 8 warps 3 stages 1×1, adds": (69, 853),
    "gram_kernel: 128×128×64 8 warps 3 stages": (550, 1073),
    "conv_bn_kernel: 128×256×64 8 warps 3 stages 1×1, adds": (78, 1557),
    "end_matrix_kernel: 32×64 4 warps 2 stages": (431, 194),
    "dgrad_kernel: 128×64×64 4 warps 4 stages 1×1, masks, folded": (140, 2228),
    "dgrad_kernel: 128×128×64 8 warps 3 stages 1×1, folded": (100, 1146),
    "dgrad_kernel: 128×64×64 8 warps 3 stages 1×1, masks, folded": (91, 1338),
    "dgrad_kernel: 128×64×64 8 warps 3 stages 1×1, folded": (97, 629),
    "merge_moments_kernel: 256×8 8 warps 1 stages": (117, 578),
    "bn_scale_shift_kernel: 256×8 8 warps 1 stages": (120, 1056),
    "bn_scale_shift_kernel: 16×32 4 warps 1 stages": (60, 907),
    "merge_gram_kernel: 64×32 4 warps 1 stages": (136, 342),
    "end_products_kernel: 64×64 4 warps 2 stages": (334, 382),
    "end_moments_kernel: 32×64 4 warps 1 stages": (110, 127),
    "end_moments_kernel: 16×128 4 warps 1 stages": (112, 158),
    "end_moments_kernel: 8×256 4 warps 1 stages": (115, 162),
    "merge_gram_kernel: 16×128 4 warps 1 stages": (136, 304),
    "merge_gram_kernel: 4×512 4 warps 1 stages": (146, 192),
    "end_sums_kernel: 8×256 4 warps 1 stages": (92, 353),
    "bn_backward_coefficients_kernel: 16×32 4 warps 1 stages": (120, 578),
    "end_gradients_kernel: 8×256 4 warps 1 stages": (209, 254),
    "end_offset_kernel: 16×256 8 warps 1 stages": (156, 370),
    "bn_backward_coefficients_kernel: 256×8 8 warps 1 stages": (66, 574),
    "merge_sums_kernel: 256×8 8 warps 1 stages": (64, 341),
    "end_sums_kernel: 16×128 4 warps 1 stages": (90, 344),
    "end_gradients_kernel: 16×128 4 warps 1 stages": (205, 246),
    "end_sums_kernel: 32×64 4 warps 1 stages": (91, 324),
    "end_gradients_kernel: 32×64 4 warps 1 stages": (208, 229),
}

# The same of Triton's convolutions for B200 (sm_100) and GeForce RTX 50 (sm_120), by capability.
BLACKWELL: dict[int, dict[str, tuple[int, int]]] = {
    100: {
        "stage 1 projection (128, 128, 64) 8 warps": (120, 1267),
        "stage 2 reduce (256, 128, 64) 8 warps": (111, 1329),
        "stage 3 3x3 (128, 256, 64) 8 warps": (145, 1491),
    },
    120: {
        "stage 1 projection (128, 128, 64) 8 warps": (126, 1175),
        "stage 2 reduce (128, 128, 64) 8 warps": (126, 691),
        "stage 3 3x3 (128, 128, 64) 8 warps": (171, 910),
    },
}

# Bytes of a thread's registers that a version of Triton keeps in memory, by GPU and kernel; all
# others keep none. 24 bytes are three loads in a step of some 320
# instructions. On a GPU the tuner measures these tiles beside smaller ones.
_STRIDED = "conv_bn_kernel: stage 2 3x3 strided (256, 128, 64) 8 warps"
_OPTION_A = "conv_bn_kernel: stage 2 shortcut option A (256, 128, 64) 8 warps"
_HEAD = "head_kernel: head (16, 64, 32) 4 warps"
_TRAINED_STEM = "conv_stats_kernel: stem (256, 64, 64) 8 warps"
_SPILLED = {
    "3.5": {
        "float16 80": {_STRIDED: 8, _OPTION_A: 8},
        "tf32 90": {_HEAD: 24},
        "bfloat16 90": {_TRAINED_STEM: 88},
    },
    "3.6": {
        "float16 80": {_STRIDED: 24, _OPTION_A: 24},
        "tf32 90": {_HEAD: 24},
        "bfloat16 90": {_TRAINED_STEM: 88},
    },
    "3.7": {"float16 80": {_STRIDED: 24}},
    "3.8": {
        "float32 90": {
            "wgrad_kernel: stem (64, 64, 16, 64) 4 warps": 8,
            "dgrad_kernel: stage 2 projection (128, 64, 16) 8 warps": 8,
        }
    },
}


def most_spilled(kernel: dict[str, Any], capability: int, dtype: str) -> int:
    """Bytes that the kernel, facts as `compiled_kernels` gives them, may spill as compiled here."""
    known = _SPILLED.get(".".join(metadata.version("triton").split(".")[:2]), {})
    name = f"{kernel['kernel']}: {kernel['name']}"
    return known.get(f"{dtype} {capability}", {}).get(name, 0)


# What is known to be slow, and why it stands:
# - dgrad with a ReLU below waits for each product;
# - a warpgroup of bottleneck_sm90.cu waits for its line's products while the others multiply;
# - the Triton stems read 3 channels one by one, which its training kernels do too; stem.cu copies
#   pixels and weights so as well;
# - stem_sm90.cu waits for the second of two products, under which the first one's line is pooled;
# - the pool and its gradient are unrolled over windows, of whose bytes a lane loads 8;
# - conv_sm80.cu adds a residual one by one where rows are no whole chunks, in a loop of its own;
# - 32 rows are too few for a warpgroup's product; ResNeXt's 4 channels of a group are 8 bytes, and
#   the Triton bn_add_relu loads 8 bytes a lane; its head pools what it multiplies, in registers;
# - deviations of a folded end's operand are formed in registers before they are multiplied, so each
#   product is waited for; what follows are vectors and small matrices in L2, of tiles too small for
#   a warpgroup.
KNOWN: dict[str, dict[str, Any]] = {
    "bottleneck_sm90_kernel 64 inner, stride 1": {"products_pending": 0},
    "bottleneck_sm90_kernel 64 inner, stride 1 projection": {"products_pending": 0},
    "conv_bn_kernel 128×128": {"load_bytes_elsewhere": {"2": 8}},
    "conv_bn_kernel 128×64": {"load_bytes_elsewhere": {"2": 8}},
    "conv_bn_kernel 128×64 projection": {"load_bytes_elsewhere": {"2": 8}},
    "conv_bn_kernel 64×64": {"load_bytes_elsewhere": {"2": 8}},
    "conv_bn_kernel 64×64 projection": {"load_bytes_elsewhere": {"2": 8}},
    "stem_kernel": {"load_bytes_elsewhere": {"2": 6}},
    "stem_kernel bytes": {"load_bytes_elsewhere": {"1": 3, "2": 3}},
    "stem_sm90_kernel 0": {"products_pending": 0},
    "stem_sm90_kernel bytes 0": {"products_pending": 0},
    "stem_kernel: stem (16, 16, 64) 8 warps": {"load_bytes": {"2": 38}, "products_pending": 0},
    "head_kernel: head (16, 64, 32) 4 warps": {"load_bytes": {"16": 2}},
    "conv_bn_kernel: stage 1 of ResNeXt 3x3 (256, 32, 32) 8 warps": {"copy_bytes": {"8": 1}},
    "bn_add_relu_kernel: elementwise (16, 256) 4 warps": {"load_bytes": {"8": 4}},
    "conv_stats_kernel: 256×64×64 8 warps 3 stages 7×7/2": {
        "load_bytes": {"2": 80},
        "products_pending": 0,
    },
    "bn_relu_pool_kernel: 32×64 4 warps 1 stages": {"instructions_elsewhere": 1821},
    "dgrad_kernel: 128×128×64 8 warps 3 stages 3×3, masks": {"products_pending": 0},
    "dgrad_kernel: 128×128×64 8 warps 3 stages 3×3/2, masks": {"products_pending": 0},
    "dgrad_kernel: 128×64×64 8 warps 3 stages 3×3, masks": {"products_pending": 0},
    "wgrad_kernel: 32×32×32 4 warps 3 stages 1×1": {
        "load_bytes": {"16": 1},
        "tensor_instructions": ["HMMA.16816.F32.BF16"],
        "products_pending": None,
    },
    "pool_gradient_kernel: 16×64 4 warps 1 stages": {
        "load_bytes": {"8": 4},
        "instructions_elsewhere": 1062,
    },
    "wgrad_kernel: 64×128×64 8 warps 3 stages 7×7/2": {
        "load_bytes": {"2": 32},
        "products_pending": 0,
    },
    "gram_kernel: 64×64×64 4 warps 3 stages": {"products_pending": 0},
    "gram_kernel: 128×128×64 8 warps 3 stages": {"products_pending": 0},
    "end_matrix_kernel: 32×64 4 warps 2 stages": {
        "copy_bytes": {"4": 1},
        "load_bytes": {"16": 2},
        "tensor_instructions": ["HMMA.1688.F32.TF32"],
        "copies_pending": 0,
        "products_pending": None,
    },
    "bn_scale_shift_kernel: 16×32 4 warps 1 stages": {"load_bytes": {"4": 1}},
    "merge_gram_kernel: 64×32 4 warps 1 stages": {"load_bytes": {"4": 1}},
    "end_products_kernel: 64×64 4 warps 2 stages": {"copies_pending": 0, "products_pending": 0},
    "end_moments_kernel: 16×128 4 warps 1 stages": {"load_bytes": {"4": 1}},
    "end_moments_kernel: 8×256 4 warps 1 stages": {"load_bytes": {"8": 1}},
    "merge_gram_kernel: 16×128 4 warps 1 stages": {"load_bytes": {"4": 1}},
    "merge_gram_kernel: 4×512 4 warps 1 stages": {"load_bytes": {"4": 1}},
    "bn_backward_coefficients_kernel: 16×32 4 warps 1 stages": {"load_bytes": {"4": 2}},
    "end_gradients_kernel: 8×256 4 warps 1 stages": {"load_bytes": {"8": 1}},
    "end_offset_kernel: 16×256 8 warps 1 stages": {"load_bytes": {"4": 3}},
    "end_gradients_kernel: 16×128 4 warps 1 stages": {"load_bytes": {"4": 1}},
}
