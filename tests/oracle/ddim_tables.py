"""Writes runtime/tests/pipeline/timesteps.tsv: which timesteps diffusers' DDIMScheduler and CompVis'
`make_ddim_timesteps` choose, for every step count.

A row is: training timesteps, spacing, offset, first and last step count, FNV-1a of the timesteps of all these
step counts. Timesteps that do not exist (below 0 by the rounding of `trailing`, or at T by an offset), where
the originals fail, are left out before hashing.
"""

from pathlib import Path

import numpy as np
from diffusers import DDIMScheduler

TARGET = Path(__file__).parents[2] / "runtime/tests/pipeline/timesteps.tsv"
BLOCK = 50


def chosen(train, spacing, offset, steps):
    if spacing == "compvis":
        return (np.arange(0, train, train // steps) + 1)[::-1]
    scheduler = DDIMScheduler(num_train_timesteps=train, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.numpy()


def fnv1a(numbers, state):
    for number in numbers:
        for byte in int(number).to_bytes(4, "little"):
            state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return state


rows = []
for train, spacing, offset in [
    (1000, "leading", 0), (1000, "leading", 1), (1000, "trailing", 0), (1000, "linspace", 0), (1000, "compvis", 0),
    (50, "leading", 0), (50, "trailing", 0), (50, "linspace", 0), (50, "compvis", 0), (77, "trailing", 0), (1, "linspace", 0),
]:
    for first in range(1, train + 1, BLOCK):
        last = min(first + BLOCK - 1, train)
        state = 0xCBF29CE484222325
        for steps in range(first, last + 1):
            list_ = [t for t in chosen(train, spacing, offset, steps) if 0 <= t < train]
            state = fnv1a(list_, state)
        rows.append(f"{train}\t{spacing}\t{offset}\t{first}\t{last}\t{state:016x}")
TARGET.write_text("\n".join(rows) + "\n")
