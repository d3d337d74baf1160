"""Numbers that the references and the kernels share; imports nothing.

Those of the optimizer's codecs come first. What they mean is said where they are used: `log_encode` and
`signed_log_encode` in quantize.py, `dither` in adamw.py.
"""

TINY = 2.0**-126  # smallest normal float32: smaller numbers are flushed to zero on many devices
LARGE = 2.0**127  # brings every normal number above 1
K_STEP = 16  # the exponent k is stored in 16ths, as COAT
K_MIN, K_MAX = 4, 255  # in 16ths, so that it fits a byte
LEVELS, SIGNED_LEVELS = 255, 127  # codes of positive values without and with a sign
# The robust minimum lies SPREAD standard deviations of log x below its mean, or NEAR octaves below amax if
# that is further down: NEAR octaves cost little (steps of 3 %), so anything within them is always covered.
SPREAD, NEAR = 5.0, 12.0
NEAR_ZERO = 1e-3  # of amax: magnitudes below this count as this when the shift is chosen
# Steps of the dither sequence from one step to the next and from one column to the next, in 65536ths: the
# golden section, and a fraction that keeps neighbouring columns apart.
DITHER_STEP, DITHER_COLUMN, DITHER_PERIOD = 40503, 25717, 65536

RESIDUAL_STEPS = 120.0  # steps of a 4-bit residual per unit of relative distance: 7.5 / (1/16)
# Of the hash that random numbers come from (`random_bits` in pointwise.py): what the upper half of a position
# and a seed are multiplied by, and the two factors of the mixer.
HASH_HIGH, HASH_SEED, HASH_FIRST, HASH_SECOND = 0x632BE5AB, 0x9E3779B9, 0x7FEB352D, 0x846CA68B

NORM_EPSILON = 1e-6  # of all norms of FLUX
GELU_LINEAR, GELU_CUBIC = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the factor of x^3

# Weights in 4 bits, four_bit.py. NF4: values of a block, scales that share one, the levels of the codes.
NF4_BLOCK, NF4_OUTER = 64, 256
NF4_LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
# FP4: values of a block; the code c has the level u + FP4_CUBIC * u^3, u = c - FP4_ZERO; sizes of a scale,
# how many of them make an octave, and which of them is 1.
FP4_BLOCK, FP4_ZERO, FP4_CUBIC = 16, 8.125, 0.00625
FP4_SIZES, FP4_OCTAVE, FP4_ONE = 126, 6, 120
