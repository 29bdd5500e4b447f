"""What the kernels share on the device: finding a program's group, FP8 as integer arithmetic, formats and products.

FP8 numbers travel as bytes: Triton has no E4M3 below compute capability 8.9. Encoding and decoding are exact there too:

    E4M3 (bias 7, 3 bits of mantissa) and E5M2 (bias 15, 2 bits) are FP16 shortened, E4M3 with another bias, so a byte
    moved to the top of an FP16 is its value, E4M3's over 2⁸
    a normal FP32 number is rounded to nearest even by adding half of what is cut off, less one unless the last bit kept
    is odd; the carry into the exponent is the one wanted
    a subnormal one by adding the power of two whose last bit is the format's smallest number
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def find_piece(ends_ptr, piece, groups, rows, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The group that `piece` belongs to, its first row, the group's end, and where each group ends in pieces.

    Every group is cut into pieces of SIZE rows from its start. What lies behind the last group, up to `rows`, counts as
    a group of its own, number `groups`. GROUPS: a power of two above `groups`; a piece that there is not gets it.
    """
    index = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + index, mask=index < groups, other=rows)
    starts = tl.load(ends_ptr + index - 1, mask=(index > 0) & (index <= groups), other=0)
    starts = tl.where(index > groups, rows, starts)
    piece_ends = tl.cumsum((ends - starts + SIZE - 1) // SIZE, 0)
    before = piece_ends <= piece
    group = tl.sum(before.to(tl.int32), 0)
    first = tl.max(tl.where(before, piece_ends, 0), 0)
    start = tl.max(tl.where(before, ends, 0), 0) + (piece - first) * SIZE
    end = tl.min(tl.where(before, rows, ends), 0)
    return group, start, end, piece_ends


@triton.jit
def encode(x, E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """FP32 numbers, NaN or within the format's range → bytes, nearest, ties to even."""
    if NATIVE:
        FORMAT: tl.constexpr = tl.float8e4nv if E4M3 else tl.float8e5
        found = x.to(FORMAT).to(tl.uint8, bitcast=True)
    else:
        MANTISSA: tl.constexpr = 3 if E4M3 else 2
        BIAS: tl.constexpr = 7 if E4M3 else 15
        CUT: tl.constexpr = 23 - MANTISSA
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        half = (1 << (CUT - 1)) - 1 + ((magnitude >> CUT) & 1)
        normal = ((magnitude + half) >> CUT) - ((127 - BIAS) << MANTISSA)
        # The smallest number is 2^(1 - BIAS - MANTISSA); it is the last of the 23 bits behind 2^(24 - BIAS - MANTISSA).
        ABOVE: tl.constexpr = 24 - BIAS - MANTISSA
        shifted = tl.abs(x) + 2.0**ABOVE
        subnormal = shifted.to(tl.int32, bitcast=True) - ((127 + ABOVE) << 23)
        rounded = tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal) | ((bits >> 24) & 0x80)
        found = tl.where(magnitude > 0x7F800000, 0x7F, rounded).to(tl.uint8)
    return found


@triton.jit
def decode(byte, E4M3: tl.constexpr):
    """Bytes → FP16, exact."""
    wide = byte.to(tl.int16)
    if E4M3:
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        found = tl.where((wide & 0x7F) == 0x7F, float("nan"), half).to(tl.float16)
    else:
        found = (wide << 8).to(tl.float16, bitcast=True)
    return found


@triton.jit
def scale_of_largest(largest, E4M3: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of numbers up to `largest` (FP32), as moe_train/precision/quantize.py has it."""
    LARGEST: tl.constexpr = 448.0 if E4M3 else 57344.0
    if INTERPRETED:  # whose fma rounds twice
        scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    else:  # as `divide`; of 448 and 57344 one correction does for every number (all 2²³ mantissas were tried)
        INVERSE: tl.constexpr = 1.0 / LARGEST
        scale = largest * INVERSE
        remainder = tl.fma(scale, tl.full(largest.shape, -LARGEST, tl.float32), largest)
        scale = tl.fma(remainder, tl.full(largest.shape, INVERSE, tl.float32), scale)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    SMALLEST: tl.constexpr = 2.0**-126
    return tl.where(scale > 0, tl.maximum(scale, SMALLEST), 1.0)


@triton.jit
def divide(x, scale):
    """x / scale to the bit: two corrections of x · (1 / scale), after which it is rounded as a division is.

    (Markstein, IBM J. Res. Dev. 34(1), 1990: the first makes it right within a unit, of which the remainder is exact.)
    In hardware a division takes some twenty instructions and a branch, and rounding to FP8 has two for every number.
    """
    if INTERPRETED:  # whose fma rounds twice
        found = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    else:
        lift = tl.where(scale < 2.0**-60, 2.0**64, 1.0)  # remainders of tiny numbers would be below the smallest
        scale = scale * lift
        x = x * lift
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        scale, minus = tl.broadcast_to(scale, x.shape), x * -1.0
        found = x * inverse
        # Remainders are negated, or -0 would end as 0. (0.0 - x, which is what -x compiles to, is no negation of 0.)
        inverse = tl.broadcast_to(inverse * -1.0, x.shape)
        found = tl.fma(tl.fma(found, scale, minus), inverse, found)
        found = tl.fma(tl.fma(found, scale, minus), inverse, found)
    return found


@triton.jit
def round_to_fp8(x, scale, E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """FP32 → bytes of the nearest value of x / scale; infinities are NaN."""
    LARGEST: tl.constexpr = 448.0 if E4M3 else 57344.0
    scaled = divide(x, scale)
    if not NATIVE:  # there `divide` makes NaN of infinities, and the conversion stays within the largest
        scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
        scaled = tl.where(tl.abs(x) < float("inf"), scaled, float("nan"))
    return encode(scaled, E4M3, NATIVE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """FP32 → the nearest number of DTYPE, ties to even. Triton's interpreter cuts BF16 off and errs on subnormals."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        found = tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(DTYPE)
    return found


@triton.jit
def dot(left, right, total):
    """total + left · right in FP32."""
    if INTERPRETED:  # Triton's interpreter multiplies the bits of BF16 numbers as integers
        left, right = widen(left), widen(right)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def widen(x):
    """BF16, FP16 or FP32 → FP32."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        found = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        found = x.to(tl.float32)
    return found
