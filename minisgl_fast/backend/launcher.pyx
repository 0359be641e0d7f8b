"""Launches a compiled kernel with one driver call: some hundred nanoseconds above the driver's own.

libcuda is opened at run time and the two structures of ``cuLaunchKernelEx`` are declared here, so
building this needs no CUDA at all. A number takes one 8-byte slot: the driver reads as many bytes
of it as the parameter is wide, from the low end (little-endian machines only). A structure is
read from the bytes object that holds it; ``tensor_map`` makes the one kind that our kernels take.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset

cdef extern from "<dlfcn.h>" nogil:
    void* dlopen(const char* name, int flags)
    void* dlsym(void* handle, const char* name)
    int RTLD_NOW

cdef enum:
    MAX_ARGUMENTS = 64
    CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
    PROGRAMMATIC_STREAM_SERIALIZATION = 6
    TENSOR_MAP_BYTES = 128  # CUtensorMap
    TENSOR_MAP_ALIGNMENT = 64  # of where the driver writes it
    TENSOR_MAP_BFLOAT16 = 9  # CUtensorMapDataType
    TENSOR_MAP_NO_INTERLEAVE = 0
    TENSOR_MAP_SWIZZLE_128B = 3
    TENSOR_MAP_L2_256B = 3
    TENSOR_MAP_FILL_ZEROS = 0

# CUlaunchAttribute: an id padded to 8 bytes, then a union of 64.
cdef struct LaunchAttribute:
    int id
    int padding
    int value[16]

# CUlaunchConfig
cdef struct LaunchConfig:
    unsigned int grid[3]
    unsigned int block[3]
    unsigned int shared_bytes
    void* stream
    LaunchAttribute* attributes
    unsigned int num_attributes

ctypedef int (*LaunchFunction)(const LaunchConfig*, void*, void**, void**) noexcept nogil
ctypedef int (*MaxClustersFunction)(int*, void*, const LaunchConfig*) noexcept nogil
ctypedef int (*EncodeTiledFunction)(
    void*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*,
    const uint32_t*, int, int, int, int,
) noexcept nogil
ctypedef int (*ErrorNameFunction)(int, const char**) noexcept nogil

cdef void* _library = NULL
cdef LaunchFunction _launch = NULL


cdef int _open() except -1:
    global _library, _launch
    _library = dlopen(b"libcuda.so.1", RTLD_NOW)
    if _library == NULL:
        raise RuntimeError("libcuda.so.1 was not found")
    _launch = <LaunchFunction>dlsym(_library, b"cuLaunchKernelEx")
    if _launch == NULL:
        raise RuntimeError("the CUDA driver is older than 11.8: it has no cuLaunchKernelEx")
    return 0


cdef str _error_name(int status):
    cdef ErrorNameFunction describe = <ErrorNameFunction>dlsym(_library, b"cuGetErrorName")
    cdef const char* name = NULL
    if describe != NULL and describe(status, &name) == 0 and name != NULL:
        return (<bytes>name).decode()
    return f"error {status}"


def max_active_clusters(
    uintptr_t function, unsigned int cluster, unsigned int block_x, unsigned int shared_bytes
):
    """How many clusters of so many blocks the device can run at once: they do not cross the
    borders of its graphics processing clusters. RuntimeError if the driver refuses."""
    cdef LaunchConfig config
    cdef LaunchAttribute attribute
    cdef int count = 0
    cdef int status
    if _library == NULL:
        _open()
    cdef MaxClustersFunction query = <MaxClustersFunction>dlsym(
        _library, b"cuOccupancyMaxActiveClusters"
    )
    if query == NULL:
        raise RuntimeError("the CUDA driver has no cuOccupancyMaxActiveClusters")
    memset(&config, 0, sizeof(config))
    memset(&attribute, 0, sizeof(attribute))
    config.grid = [cluster, 1, 1]
    config.block = [block_x, 1, 1]
    config.shared_bytes = shared_bytes
    attribute.id = CLUSTER_DIMENSION
    attribute.value[0] = cluster
    attribute.value[1] = 1
    attribute.value[2] = 1
    config.attributes = &attribute
    config.num_attributes = 1
    status = query(&count, <void*>function, &config)
    if status != 0:
        raise RuntimeError(_error_name(status))
    return count


def tensor_map(
    uintptr_t address,
    uint64_t num_rows,
    uint64_t num_columns,
    uint64_t row_stride_bytes,
    uint32_t box_rows,
    uint32_t box_columns,
):
    """A CUtensorMap, 128 bytes: boxes of a bfloat16 matrix for the tensor memory accelerator.

    Coordinates are (column, row). A box lies in shared memory row by row in the 128-byte swizzle;
    what is outside of the matrix arrives as zeros and is never written. The driver wants
    ``address`` and ``row_stride_bytes`` in multiples of 16, boxes of at most 256 rows and of 8,
    16 ... 64 columns; RuntimeError with its name for the error otherwise.
    """
    cdef char room[TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT]
    cdef uintptr_t start = <uintptr_t>&room[0]
    cdef uint64_t[2] sizes = [num_columns, num_rows]
    cdef uint64_t[1] strides = [row_stride_bytes]
    cdef uint32_t[2] box = [box_columns, box_rows]
    cdef uint32_t[2] steps = [1, 1]
    cdef int status
    cdef char* output
    if _library == NULL:
        _open()
    cdef EncodeTiledFunction encode = <EncodeTiledFunction>dlsym(
        _library, b"cuTensorMapEncodeTiled"
    )
    if encode == NULL:
        raise RuntimeError("the CUDA driver is older than 12.0: it has no cuTensorMapEncodeTiled")
    output = <char*>(
        (start + TENSOR_MAP_ALIGNMENT - 1) // TENSOR_MAP_ALIGNMENT * TENSOR_MAP_ALIGNMENT
    )
    status = encode(
        output, TENSOR_MAP_BFLOAT16, 2, <void*>address, sizes, strides, box, steps,
        TENSOR_MAP_NO_INTERLEAVE, TENSOR_MAP_SWIZZLE_128B, TENSOR_MAP_L2_256B,
        TENSOR_MAP_FILL_ZEROS,
    )
    if status != 0:
        raise RuntimeError(_error_name(status))
    return output[:TENSOR_MAP_BYTES]


def launch(
    uintptr_t function,
    uintptr_t stream,
    unsigned int grid_x,
    unsigned int grid_y,
    unsigned int grid_z,
    unsigned int block_x,
    unsigned int shared_bytes,
    bint pdl,
    tuple arguments,
):
    """Launch a CUfunction. An int is passed as int64 (also for pointers and int32), a float as
    float32, bytes as a structure by value: it must be as long as the parameter. RuntimeError with
    the driver's name for the error if the launch is refused.
    """
    cdef int64_t slots[MAX_ARGUMENTS]
    cdef void* pointers[MAX_ARGUMENTS]
    cdef LaunchConfig config
    cdef LaunchAttribute attribute
    cdef Py_ssize_t i, count = len(arguments)
    cdef float single
    cdef int status
    cdef object argument
    if _launch == NULL:
        _open()
    if count > MAX_ARGUMENTS:
        raise ValueError(f"{count} arguments, at most {MAX_ARGUMENTS}")
    for i in range(count):
        argument = arguments[i]
        if type(argument) is float:
            single = argument
            slots[i] = 0
            memcpy(&slots[i], &single, sizeof(float))
        elif type(argument) is bytes:
            pointers[i] = PyBytes_AS_STRING(argument)
            continue
        else:
            slots[i] = argument
        pointers[i] = &slots[i]
    config.grid[0] = grid_x
    config.grid[1] = grid_y
    config.grid[2] = grid_z
    config.block[0] = block_x
    config.block[1] = 1
    config.block[2] = 1
    config.shared_bytes = shared_bytes
    config.stream = <void*>stream
    config.attributes = NULL
    config.num_attributes = 0
    if pdl:
        memset(&attribute, 0, sizeof(attribute))
        attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value[0] = 1
        config.attributes = &attribute
        config.num_attributes = 1
    with nogil:
        status = _launch(&config, <void*>function, pointers, NULL)
    if status != 0:
        raise RuntimeError(_error_name(status))
