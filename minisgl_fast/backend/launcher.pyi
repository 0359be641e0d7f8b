def launch(
    function: int,
    stream: int,
    grid_x: int,
    grid_y: int,
    grid_z: int,
    block_x: int,
    shared_bytes: int,
    pdl: bool,
    arguments: tuple[int | float | bytes, ...],
) -> None: ...
def max_active_clusters(function: int, cluster: int, block_x: int, shared_bytes: int) -> int: ...
def tensor_map(
    address: int,
    num_rows: int,
    num_columns: int,
    row_stride_bytes: int,
    box_rows: int,
    box_columns: int,
) -> bytes: ...
