"""What loops over packed keys or values are given. Arrays are flat: a view of one costs as much as a row."""

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Sizes, all in elements of their arrays.

    Attributes:
        bits: width of a code.
        span: codes that an entry of the table stands for: 8 / bits, 2 for 3 bits, 1 where no more will do; 16: one,
            and 16 codes are looked up together.
        unit: codes of a byte where rows come in planes; 0: by the table.
        flip: bits of codes in planes that are turned over first.
        row: bytes of codes of a token.
        room: tokens of a sequence that `codes` has room for.
        first: the first token to read.
        stop: where to stop.
        split: tokens of a part.
        total: columns of the scores.
        lead: column of the first token.
        by_channel: whether scales are of channels over groups of tokens, or of tokens over groups of channels.
        group: tokens or channels of such a group.
        flag: bits of a flag; 0: none.
        flag_row: bytes of flags of a token.
        rows: rows of scales of a sequence; 0: all have those of the first.
        pitch: scales of a row.
        per_head: scales of a head in a row; 0: all heads have the same one.
        slots: outliers of a token.
        rope: half the rotated channels of a head; 0: none.
        neighbours: whether channels 2 i and 2 i + 1 are rotated together, or i and i + rope.
    """

    bits: int
    span: int
    unit: int
    flip: int
    row: int
    room: int
    first: int
    stop: int
    split: int
    total: int
    lead: int
    by_channel: bool
    group: int
    flag: int
    flag_row: int
    rows: int
    pitch: int
    per_head: int
    slots: int
    rope: int
    neighbours: bool


class Arrays(NamedTuple):
    """What is stored, flat.

    Attributes:
        codes: uint8 [b, room, row].
        table: float32, for each value of `span` codes what they stand for.
        scales: float32, or float16 as uint16, [b, rows, pitch].
        offsets: like scales.
        flags: uint8 [b, room, flag_row], powers of 2 of groups; then scales are of heads, and the one number of
            offsets, float32, says how many scales of a group its offset is.
        slot_values: float16 as uint16 [b, room, slots].
        slot_channels: uint16 [b, room, slots], counted through all heads.
        cos: float32 [stop, rope].
        sin: like cos.
        order: int64 [dim], the channel at each place of a row.
    """

    codes: Any
    table: Any
    scales: Any
    offsets: Any
    flags: Any
    slot_values: Any
    slot_channels: Any
    cos: Any
    sin: Any
    order: Any
