"""Mixes the averaged weights of two runs of the last stage, of which one began with the other's: W = (1 - share) A + share B.

  python mix.py A/finetune-final.pt B/finetune-final.pt --share 0.81 --to RUN/finetune-final.pt

Between a run that keeps to the truth and one that a critic made sharper, every share gives a network in between ("network
interpolation", Wang et al. 2018, ESRGAN, section 3.4), so sharpness is chosen without training again. RUN needs a copy of
autoencoder-final.pt too before export.py reads it. Writes nothing else.
"""

import argparse
import os

import common


def mixed(a, b, share):
    if a.keys() != b.keys():
        raise SystemExit(f"the checkpoints are of different networks: {sorted(a.keys() ^ b.keys())[:3]} …")
    return {k: a[k].lerp(b[k], share) if b[k].is_floating_point() else b[k] for k in b}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("first")
    p.add_argument("second")
    p.add_argument("--share", type=float, required=True, help="of the second, 0 to 1")
    p.add_argument("--to", required=True)
    a = p.parse_args()
    if not 0 <= a.share <= 1:
        raise SystemExit(f"--share is {a.share}; it lies between 0 and 1")
    first, second = (common.load_checkpoint(f) for f in (a.first, a.second))
    for path, state in ((a.first, first), (a.second, second)):
        if state is None or "both" not in state:
            raise SystemExit(f"{path} is no finetune-final.pt or finetune-latest.pt")
    os.makedirs(os.path.dirname(a.to) or ".", exist_ok=True)
    common.save_checkpoint(a.to, {**second, "both": mixed(first["both"], second["both"], a.share)})
    print(f"{a.to}: {1 - a.share:.2f} of {a.first} and {a.share:.2f} of {a.second}")


if __name__ == "__main__":
    main()
