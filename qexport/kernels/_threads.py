"""How many threads numba's loops use."""

import torch
from numba import config, get_num_threads, set_num_threads


def many(work: int, small: int, parts: int | None = None) -> bool:
    """Whether work is dealt out over threads, of which there are then as many as torch may use.

    Args:
        work: how much there is, in whatever it is counted.
        small: so much is done by one thread before others would have started.
        parts: that it falls into, if they are few; each thread gets two or more.
    """
    if work <= small:
        return False
    threads = min(torch.get_num_threads(), config.NUMBA_NUM_THREADS)
    if threads == 1 or (parts is not None and parts < 2 * threads):
        return False
    if get_num_threads() != threads:  # to ask takes less than to set
        set_num_threads(threads)
    return True
