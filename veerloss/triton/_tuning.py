"""Every tuning constant of the Triton kernels. None is measured on a GPU: registers and spills were counted by compiling for
GPUs (tests/offline.py).

Constants are read when an operator is called, as `_tuning.X`, so that tests can change them. Kernels whose number of warps is
not here have Triton's 4.
"""

# ---- focal losses

#: Programs of a forward pass, each of which leaves one partial sum. Each takes every MAX_PROGRAMS-th tile, in order: the sums,
#: and so the bits of the loss, do not depend on the GPU. A few waves of the largest GPUs.
MAX_PROGRAMS = 4096
#: Partial sums to a step of the program that adds them up.
PARTIALS_STEP = 1024

#: Elements of a tile, half as many in float64, and warps. Sigmoid: 8 elements to a thread, two vectors of 16 bytes.
SIGMOID_TILE, SIGMOID_WARPS = 1024, 4
#: Classes of a tile, unless the classes of a pixel are contiguous.
SIGMOID_MAX_CLASSES = 8
#: Softmax holds a tile in registers; half as many elements in float64. What belongs to a pixel is done once for each warp, so
#: that few warps take few instructions: for each logit of [8, 19, 512, 1024], on sm_90, 62 forward and 83 backward in float32
#: (67 and 82 in bfloat16), where tiles of 4096 for 8 warps take 114 and 123 (164 and 180).
SOFTMAX_TILE = 2048
#: Elements and pixels of a warp; a quarter as many in float64, and of soft targets. Twice as many would spill.
SOFTMAX_WARP, SOFTMAX_WARP_PIXELS = 2048, 256
#: Up to this many classes, in float32 and in float64, are one block; more are read twice, in blocks of SOFTMAX_BLOCK_CLASSES.
SOFTMAX_MAX_CLASSES, SOFTMAX_MAX_CLASSES_F64, SOFTMAX_BLOCK_CLASSES = 512, 128, 64
#: Pixels of a tile at least, unless the classes of a pixel are contiguous: of float32, half a cache line.
SOFTMAX_MIN_PIXELS = 16

#: Of logits of low resolution, whose four loads and weights take registers too: elements of a run, half as many in float64,
#: and warps, which there are twice as many.
LOW_TILE, LOW_WARPS = 1024, 4

# ---- Lovász losses

#: Values of a tile of pixels and classes, 8 to a thread, and warps.
LOVASZ_TILE, LOVASZ_WARPS = 1024, 4
#: Classes and pixels of a tile.
LOVASZ_MAX_CLASSES, LOVASZ_MIN_PIXELS, LOVASZ_MAX_PIXELS = 32, 16, 512
#: Classes to a step of the program that adds up the losses of a row of segments, one warp.
REDUCE_STEP, REDUCE_WARPS = 1024, 1

# ---- method "exact"

#: Sorted pixels to a program, at least and at most.
MIN_RANKS, MAX_RANKS = 16, 1024
