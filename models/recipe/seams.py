"""Are tiles' borders to be seen? Gradient energy along them against that beside them.

  python seams.py --latile BINARY [--model FILE.latile] --pictures DIR [--tile 32] [--steps 4] --json OUT [--to DIR]

Each picture (an input, not a truth) is enlarged in tiles of at most `tile` px and as one tile. For each line where a
tile begins or ends inside the picture, E is the mean squared difference of Y across that line; for comparison the same across
the parallel lines 8, 16 and 24 px of the result to either side (multiples of what an input pixel becomes, so that a
pattern of the model's own cancels out), but for those that lie at a border themselves. Printed and written:

  along / beside        1: borders are no different from what is beside them. On single pictures this is the picture's own doing too;
  over the whole's      the same of the picture made as one tile, on the same lines, divided out: what the tiles add
"""

import argparse
import json
import os
import subprocess
import tempfile

import numpy as np

import evaluate

FACTOR = 4
BESIDE = (-24, -16, -8, 8, 16, 24)


def enlarge(a, path, out, tile):
    """The luma of the result, and the report."""
    command = [a.latile, "upscale", path, out, "--steps", str(a.steps), "--tile", str(tile), "--overwrite", "--json"]
    command += ["--model", a.model] if a.model else []
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{' '.join(command)}\n{made.stderr}")
    return evaluate.luma(evaluate.load(out)), json.loads(made.stdout)


def lines(starts, tile, length):
    """Where tiles begin or end inside, in pixels of the result."""
    ends = {s for s in starts if s > 0} | {s + tile for s in starts if s + tile < length}
    return sorted(FACTOR * s for s in ends)


def energies(y, borders):
    """Sums of squared differences across the borders and beside them, and how many differences each holds; y runs down."""
    d = (np.diff(y, axis=0) ** 2).sum(1)
    beside = {b + k for b in borders for k in BESIDE} - set(borders)
    return np.array([[sum(d[b - 1] for b in group), len(group) * y.shape[1]]
                     for group in (borders, [b for b in beside if 0 < b < len(y)])])


def measure(y, report):
    """Rows: along, beside. Columns: energy, count."""
    total = np.zeros((2, 2))
    for picture, starts, tile, length in zip((y, y.T), report["tile_starts"], report["tile"], report["input_size"]):
        total += energies(picture, lines(starts, tile, length))
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--latile", required=True)
    p.add_argument("--model")
    p.add_argument("--pictures", required=True)
    p.add_argument("--tile", type=int, default=32)
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--json", required=True)
    p.add_argument("--to", help="keep the results here")
    a = p.parse_args()
    rows, sums = {}, np.zeros((2, 2, 2))
    with tempfile.TemporaryDirectory() as scratch:
        for stem, path in evaluate.listing(a.pictures).items():
            where = a.to or scratch
            os.makedirs(where, exist_ok=True)
            tiled, report = enlarge(a, path, os.path.join(where, stem + "-tiled.png"), a.tile)
            if report["tiles"] == 1:
                print(f"{stem}: one tile, left out")
                continue
            whole, _ = enlarge(a, path, os.path.join(where, stem + "-whole.png"), max(report["input_size"]) + 64)
            both = np.stack([measure(tiled, report), measure(whole, report)])
            sums += both
            rows[stem] = ratios(both)
            print(f"{stem}: {report['tiles']} tiles, along / beside {rows[stem]['tiled']:.4f}, over the whole's {rows[stem]['added']:.4f}", flush=True)
    out = {"tile": a.tile, "steps": a.steps, "all": ratios(sums), "pictures": rows}
    with open(a.json, "w") as f:
        json.dump(out, f, indent=1)
    print(f"all: along / beside {out['all']['tiled']:.4f}, over the whole's {out['all']['added']:.4f}")


def ratios(both):
    mean = both[..., 0] / both[..., 1]
    tiled, whole = mean[:, 0] / mean[:, 1]
    return {"tiled": tiled, "whole": whole, "added": tiled / whole}


if __name__ == "__main__":
    main()
