"""Kernels for GPUs, in Triton: what lies between two products of matrices, in one pass over memory.

On a GPU the products of this network are fast, and what is between them - normalisations,
dropout, masks, changes of type and layout - waits for memory. Each kernel reads its input once and
writes its result once. Attention is here too: series of a few dozen dates are too short for the
kernels that are made for long ones.

All arithmetic is float32, whatever the type of what is read and written. No result depends on
the order in which programs run: sums over rows are kept in one row for each program.

Nothing here checks anything: `fused` does, and calls these. Importing this module needs Triton,
which the CUDA builds of torch bring along.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    qkv, keys, out, seed, share, scale, dates,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Attend among the dates of one sequence, in one head: (S, T, 3, HEADS, WIDTH) -> (S, T, D)."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // HEADS, program % HEADS
    date, channel = tl.arange(0, DATES), tl.arange(0, WIDTH)
    inside = date < dates
    row: tl.constexpr = HEADS * WIDTH
    first = qkv + sequence * dates * (3 * row) + head * WIDTH
    at = date[:, None] * (3 * row) + channel[None, :]
    query = tl.load(first + at, inside[:, None], 0.0)
    key = tl.load(first + row + at, inside[:, None], 0.0)
    value = tl.load(first + 2 * row + at, inside[:, None], 0.0)
    weights = _weights(query, key, keys, sequence, date, dates, scale, MASKED)
    if DROP:
        weights = weights * _kept(seed, program, date, share, DATES)
    mixed = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    place = sequence * dates * row + head * WIDTH + date[:, None] * row + channel[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), inside[:, None])


@triton.jit
def attend_backward(
    qkv, keys, out, gradient, made, seed, share, scale, dates,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Give the gradient of `qkv`, laid out like it, from that of the result."""
    program = tl.program_id(0).to(tl.int64)
    sequence, head = program // HEADS, program % HEADS
    date, channel = tl.arange(0, DATES), tl.arange(0, WIDTH)
    inside = date < dates
    row: tl.constexpr = HEADS * WIDTH
    start = sequence * dates * (3 * row) + head * WIDTH
    at = date[:, None] * (3 * row) + channel[None, :]
    query = tl.load(qkv + start + at, inside[:, None], 0.0)
    key = tl.load(qkv + start + row + at, inside[:, None], 0.0)
    value = tl.load(qkv + start + 2 * row + at, inside[:, None], 0.0)
    place = sequence * dates * row + head * WIDTH + date[:, None] * row + channel[None, :]
    given = tl.load(gradient + place, inside[:, None], 0.0)
    mixed = tl.load(out + place, inside[:, None], 0.0)

    weights = _weights(query, key, keys, sequence, date, dates, scale, MASKED)
    of_weights = tl.dot(given, tl.trans(value), input_precision="ieee")
    dropped = weights
    if DROP:
        kept = _kept(seed, program, date, share, DATES)
        dropped = weights * kept
        of_weights = of_weights * kept
    kind = value.dtype
    of_value = tl.dot(tl.trans(dropped.to(kind)), given, input_precision="ieee")
    mean = tl.sum(given.to(tl.float32) * mixed.to(tl.float32), 1)
    of_logits = (weights * (of_weights - mean[:, None]) * scale).to(kind)
    of_query = tl.dot(of_logits, key, input_precision="ieee")
    of_key = tl.dot(tl.trans(of_logits), query, input_precision="ieee")
    target = made.dtype.element_ty
    tl.store(made + start + at, of_query.to(target), inside[:, None])
    tl.store(made + start + row + at, of_key.to(target), inside[:, None])
    tl.store(made + start + 2 * row + at, of_value.to(target), inside[:, None])


@triton.jit
def _weights(query, key, keys, sequence, date, dates, scale, MASKED: tl.constexpr):
    """Softmax over the dates that may be attended to; rows beyond the dates mean nothing."""
    seen = date < dates
    if MASKED:
        seen = seen & (tl.load(keys + sequence * dates + date, seen, 0) != 0)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    logits = tl.where(seen[None, :], logits, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _kept(seed, program, date, share, DATES: tl.constexpr):
    """1 / (1 - share) where a weight is kept, 0 where it is dropped."""
    # A counter of 32 bits, and the rest in the seed: beyond 2^32 weights nothing repeats.
    cell = date[:, None] * DATES + date[None, :]
    chance = tl.rand(
        tl.load(seed) + (program >> 16), ((program & 65535) * DATES * DATES + cell).to(tl.uint32)
    )
    return tl.where(chance >= share, 1.0 / (1.0 - share), 0.0)


@triton.jit
def add_norm(
    x, change, valid, weight, bias, added, mean, scale, made, low, seed, share, eps, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DROP: tl.constexpr, KEEP: tl.constexpr, LOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Layer normalisation of x + dropout(change), each (R, DIM); `low` is the result once more.

    With MASKED, rows that are not `valid` come out as 0.
    """
    row, inside, at, channel, live = _tile(tl.program_id(0), rows, DIM, BLOCK, ROWS)
    moved = tl.load(change + at, inside, 0.0).to(tl.float32)
    if DROP:
        moved = moved * _kept_values(seed, row, channel, share, BLOCK)
    total = tl.load(x + at, inside, 0.0).to(tl.float32) + moved
    middle = tl.sum(total, 1) / DIM
    centred = tl.where(inside, total - middle[:, None], 0.0)
    spread = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / DIM + eps)
    w = tl.load(weight + channel, live, 0.0).to(tl.float32)
    b = tl.load(bias + channel, live, 0.0).to(tl.float32)
    normalised = centred * spread[:, None] * w[None, :] + b[None, :]
    if MASKED:
        use = tl.load(valid + row, row < rows, 0) != 0
        normalised = tl.where(use[:, None], normalised, 0.0)
    tl.store(made + at, normalised.to(made.dtype.element_ty), inside)
    if LOW:
        tl.store(low + at, normalised.to(low.dtype.element_ty), inside)
    if KEEP:
        tl.store(added + at, total.to(added.dtype.element_ty), inside)
        tl.store(mean + row, middle, row < rows)
        tl.store(scale + row, spread, row < rows)


@triton.jit
def add_norm_backward(
    added, mean, scale, valid, weight, gradient, low_gradient, of_x, of_change,
    of_weight, of_bias, seed, share, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DROP: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Give gradients of x and the change, and of weight and bias as one row for each program."""
    channel = tl.arange(0, BLOCK)
    w = tl.load(weight + channel, channel < DIM, 0.0).to(tl.float32)
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        row, inside, at, channel, live = _tile(tile, rows, DIM, BLOCK, ROWS)
        given = tl.zeros((ROWS, BLOCK), tl.float32)
        if WIDE:
            given += tl.load(gradient + at, inside, 0.0).to(tl.float32)
        if LOW:
            given += tl.load(low_gradient + at, inside, 0.0).to(tl.float32)
        if MASKED:
            use = tl.load(valid + row, row < rows, 0) != 0
            given = tl.where(use[:, None], given, 0.0)
        spread = tl.load(scale + row, row < rows, 0.0)
        middle = tl.load(mean + row, row < rows, 0.0)
        total = tl.load(added + at, inside, 0.0).to(tl.float32)
        normalised = tl.where(inside, (total - middle[:, None]) * spread[:, None], 0.0)
        sum_weight += given * normalised
        sum_bias += given
        scaled = given * w[None, :]
        about = tl.sum(scaled, 1) / DIM
        along = tl.sum(scaled * normalised, 1) / DIM
        made = (scaled - about[:, None] - normalised * along[:, None]) * spread[:, None]
        tl.store(of_x + at, made.to(of_x.dtype.element_ty), inside)
        if DROP:
            made = made * _kept_values(seed, row, channel, share, BLOCK)
        tl.store(of_change + at, made.to(of_change.dtype.element_ty), inside)
    own = tl.program_id(0) * DIM + channel
    tl.store(of_weight + own, tl.sum(sum_weight, 0), channel < DIM)
    tl.store(of_bias + own, tl.sum(sum_bias, 0), channel < DIM)


@triton.jit
def relu_drop(x, seed, share, count, QUARTER: tl.constexpr):
    """Write relu(x) with values dropped over x; what is kept is not scaled."""
    program = tl.program_id(0).to(tl.int64)
    first = program * 4 * QUARTER + tl.arange(0, QUARTER)
    # One draw is four numbers. A counter of 32 bits, and the rest in the seed.
    counter = (program & 0xFFFFF) * QUARTER + tl.arange(0, QUARTER)
    chances = tl.rand4x(tl.load(seed) + (program >> 20), counter.to(tl.uint32))
    for part in tl.static_range(4):
        at = first + part * QUARTER
        values = tl.load(x + at, at < count, 0.0)
        values = tl.where(chances[part] >= share, tl.maximum(values, 0.0), 0.0)
        tl.store(x + at, values.to(x.dtype.element_ty), at < count)


@triton.jit
def _tile(tile, rows, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a tile, which values exist, where they lie; channels, and which of those exist."""
    row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    live = channel < DIM
    inside = (row < rows)[:, None] & live[None, :]
    return row, inside, row[:, None] * DIM + channel[None, :], channel, live


@triton.jit
def _kept_values(seed, row, channel, share, BLOCK: tl.constexpr):
    place = row[:, None] * BLOCK + channel[None, :]
    chance = tl.rand(tl.load(seed) + (place >> 31), (place & 0x7FFFFFFF).to(tl.uint32))
    return tl.where(chance >= share, 1.0 / (1.0 - share), 0.0)


@triton.jit
def group_norm(
    x, valid, positions, sample, weight, bias, made, low, mean, scale, eps, dates,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr, LOW: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Normalise a group of channels over the valid dates of one sequence, and add the positions."""
    program = tl.program_id(0).to(tl.int64)
    sequence, group = program // GROUPS, program % GROUPS
    at, inside, use, channel, live = _series(
        sequence, group, valid, dates, GROUPS, WIDTH, CHANNELS, DATES, MASKED
    )
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    count = tl.maximum(tl.sum(use.to(tl.float32), 0), 1.0) * WIDTH
    used = use[:, None] & live[None, :]
    middle = tl.sum(tl.sum(tl.where(used, values, 0.0), 1), 0) / count
    centred = tl.where(used, values - middle, 0.0)
    spread = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, 1), 0) / count + eps)
    w = tl.load(weight + channel, live, 0.0).to(tl.float32)
    b = tl.load(bias + channel, live, 0.0).to(tl.float32)
    normalised = centred * spread * w[None, :] + b[None, :]
    of = tl.load(sample + sequence).to(tl.int64) * dates * (GROUPS * WIDTH)
    date = tl.arange(0, DATES)
    table = of + date[:, None] * (GROUPS * WIDTH) + channel[None, :]
    normalised += tl.load(positions + table, inside, 0.0).to(tl.float32)
    tl.store(made + at, normalised.to(made.dtype.element_ty), inside)
    if LOW:
        tl.store(low + at, normalised.to(low.dtype.element_ty), inside)
    if KEEP:
        tl.store(mean + program, middle)
        tl.store(scale + program, spread)


@triton.jit
def group_norm_backward(
    x, valid, mean, scale, weight, gradient, low_gradient, of_x, of_weight, of_bias,
    sequences, dates,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Give the gradient of x, and those of weight and bias as one row for each program."""
    group = tl.program_id(1)
    channel = group * WIDTH + tl.arange(0, CHANNELS)
    live = tl.arange(0, CHANNELS) < WIDTH
    w = tl.load(weight + channel, live, 0.0).to(tl.float32)
    sum_weight = tl.zeros((DATES, CHANNELS), tl.float32)
    sum_bias = tl.zeros((DATES, CHANNELS), tl.float32)
    for step in range(STEPS):
        number = tl.program_id(0).to(tl.int64) * STEPS + step
        sequence = tl.minimum(number, sequences - 1)
        at, inside, use, channel, live = _series(
            sequence, group, valid, dates, GROUPS, WIDTH, CHANNELS, DATES, MASKED
        )
        inside = inside & (number < sequences)
        given = tl.zeros((DATES, CHANNELS), tl.float32)
        if WIDE:
            given += tl.load(gradient + at, inside, 0.0).to(tl.float32)
        if LOW:
            given += tl.load(low_gradient + at, inside, 0.0).to(tl.float32)
        middle = tl.load(mean + sequence * GROUPS + group)
        spread = tl.load(scale + sequence * GROUPS + group)
        used = use[:, None] & live[None, :]
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        normalised = tl.where(used, (values - middle) * spread, 0.0)
        sum_weight += given * normalised
        sum_bias += given
        scaled = tl.where(used, given * w[None, :], 0.0)
        count = tl.maximum(tl.sum(use.to(tl.float32), 0), 1.0) * WIDTH
        about = tl.sum(tl.sum(scaled, 1), 0) / count
        along = tl.sum(tl.sum(scaled * normalised, 1), 0) / count
        made = tl.where(used, (scaled - about - normalised * along) * spread, 0.0)
        tl.store(of_x + at, made.to(of_x.dtype.element_ty), inside)
    own = tl.program_id(0) * (GROUPS * WIDTH) + channel
    tl.store(of_weight + own, tl.sum(sum_weight, 0), live)
    tl.store(of_bias + own, tl.sum(sum_bias, 0), live)


@triton.jit
def _series(
    sequence, group, valid, dates,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Where a group's values of a sequence lie, which exist, which dates count; its channels."""
    date = tl.arange(0, DATES)
    live = tl.arange(0, CHANNELS) < WIDTH
    channel = group * WIDTH + tl.arange(0, CHANNELS)
    use = date < dates
    inside = use[:, None] & live[None, :]
    if MASKED:
        use = use & (tl.load(valid + sequence * dates + date, use, 0) != 0)
    at = (sequence * dates + date[:, None]) * (GROUPS * WIDTH) + channel[None, :]
    return at, inside, use, channel, live


@triton.jit
def maximum_over_dates(
    x, valid, made, dates,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, DATES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Take the largest of the valid dates, (S, T, D) to (S, D); 0 without any."""
    sequence = tl.program_id(0).to(tl.int64)
    at, inside, use, channel, live = _series(
        sequence, tl.program_id(1), valid, dates, GROUPS, WIDTH, CHANNELS, DATES, MASKED
    )
    values = tl.load(x + at, inside & use[:, None], -float("inf")).to(tl.float32)
    highest = tl.max(values, 0)
    highest = tl.where(tl.sum(use.to(tl.int32), 0) > 0, highest, 0.0)
    place = sequence * (GROUPS * WIDTH) + channel
    tl.store(made + place, highest.to(made.dtype.element_ty), live)


@triton.jit
def finish_convolution(
    x, bias, valid, made, rows, pixels, frames, dates, first,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, SERIES: tl.constexpr,
):  # fmt: skip
    """Write relu(x + bias), 0 where invalid; x is (B * frames, H, W, DIM), `valid` (B, H, W, T).

    With SERIES the result goes to (B, H, W, T, DIM), at the dates from `first` on.
    """
    row, inside, at, channel, live = _tile(tl.program_id(0), rows, DIM, BLOCK, ROWS)
    place = _place_in_series(row, pixels, frames, dates, first)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    values += tl.load(bias + channel, live, 0.0).to(tl.float32)[None, :]
    values = tl.maximum(values, 0.0)
    if MASKED:
        use = tl.load(valid + place, row < rows, 0) != 0
        values = tl.where(use[:, None], values, 0.0)
    if SERIES:
        at = place[:, None] * DIM + channel[None, :]
    tl.store(made + at, values.to(made.dtype.element_ty), inside)


@triton.jit
def _place_in_series(row, pixels, frames, dates, first):
    """From rows of (B * frames, pixels) to rows of (B, pixels, T)."""
    frame, pixel = row // pixels, row % pixels
    return (frame // frames * pixels + pixel) * dates + first + frame % frames


@triton.jit
def sum_over_pixels(
    x, mean, valid, sums, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, SQUARE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add up valid rows of x (R, DIM), or their squared distances from `mean` (DIM,)."""
    channel = tl.arange(0, BLOCK)
    live = channel < DIM
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    middle = tl.zeros((BLOCK,), tl.float32)
    if SQUARE:
        middle = tl.load(mean + channel, live, 0.0)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        row, inside, at, channel, live = _tile(tile, rows, DIM, BLOCK, ROWS)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        use = row < rows
        if MASKED:
            use = use & (tl.load(valid + row, use, 0) != 0)
        if SQUARE:
            values = (values - middle[None, :]) * (values - middle[None, :])
        total += tl.where(use[:, None] & live[None, :], values, 0.0)
    tl.store(sums + tl.program_id(0) * DIM + channel, tl.sum(total, 0), live)


@triton.jit
def norm_relu(
    x, mean, scale, bias, valid, made, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write relu((x - mean) * scale + bias), 0 where invalid; x is (R, DIM)."""
    row, inside, at, channel, live = _tile(tl.program_id(0), rows, DIM, BLOCK, ROWS)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    values = values - tl.load(mean + channel, live, 0.0)[None, :]
    values = values * tl.load(scale + channel, live, 0.0)[None, :]
    values = tl.maximum(values + tl.load(bias + channel, live, 0.0)[None, :], 0.0)
    if MASKED:
        use = tl.load(valid + row, row < rows, 0) != 0
        values = tl.where(use[:, None], values, 0.0)
    tl.store(made + at, values.to(made.dtype.element_ty), inside)


@triton.jit
def norm_relu_sums(
    x, mean, spread, result, gradient, sums, products, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Add up the gradient where the result is above 0, and its product with normalised x."""
    channel = tl.arange(0, BLOCK)
    live = channel < DIM
    middle = tl.load(mean + channel, live, 0.0)
    width = tl.load(spread + channel, live, 0.0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    along = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0) * STEPS + step
        row, inside, at, channel, live = _tile(tile, rows, DIM, BLOCK, ROWS)
        given = tl.load(gradient + at, inside, 0.0).to(tl.float32)
        given = tl.where(tl.load(result + at, inside, 0.0) > 0, given, 0.0)
        values = tl.load(x + at, inside, 0.0).to(tl.float32)
        total += given
        along += given * (values - middle[None, :]) * width[None, :]
    tl.store(sums + tl.program_id(0) * DIM + channel, tl.sum(total, 0), live)
    tl.store(products + tl.program_id(0) * DIM + channel, tl.sum(along, 0), live)


@triton.jit
def norm_relu_backward(
    x, mean, spread, weight, about, along, result, gradient, valid, made, rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Give the gradient of x; `about` and `along` (DIM,) are the sums over all pixels, divided."""
    row, inside, at, channel, live = _tile(tl.program_id(0), rows, DIM, BLOCK, ROWS)
    given = tl.load(gradient + at, inside, 0.0).to(tl.float32)
    given = tl.where(tl.load(result + at, inside, 0.0) > 0, given, 0.0)
    middle = tl.load(mean + channel, live, 0.0)[None, :]
    width = tl.load(spread + channel, live, 0.0)[None, :]
    normalised = (tl.load(x + at, inside, 0.0).to(tl.float32) - middle) * width
    change = tl.load(about + channel, live, 0.0)[None, :]
    change = given - change - normalised * tl.load(along + channel, live, 0.0)[None, :]
    change = change * width * tl.load(weight + channel, live, 0.0)[None, :]
    if MASKED:
        use = tl.load(valid + row, row < rows, 0) != 0
        change = tl.where(use[:, None], change, 0.0)
    tl.store(made + at, change.to(made.dtype.element_ty), inside)
