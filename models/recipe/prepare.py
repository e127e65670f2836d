"""Data preparation: folders of photographs become one memory-mapped file of pixels and its index.

  python prepare.py --photos DIR [--textures DIR] --validation validation.txt --to DATA

Writes DATA/pixels.bin (uint8 RGB, pictures one after the other, rows unpadded) and DATA/index.json. A photograph named in
the validation list is left out of pixels.bin and listed under "validation" instead. From every photograph whose shorter
side is at least 700 px a copy reduced by 2 (Lanczos) is stored as well: at full size large JPEGs are soft or noisy at the
pixel, and a model trained on them alone learns to be so too.
"""

import argparse
import hashlib
import json
import os

import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = 100_000_000
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def pictures(folder):
    return sorted(f for f in os.listdir(folder) if f.lower().endswith(EXTENSIONS))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", required=True)
    p.add_argument("--textures")
    p.add_argument("--validation", required=True, help="file with one held-back file name a line")
    p.add_argument("--to", required=True)
    p.add_argument("--half-from", type=int, default=700, help="shorter side from which a copy reduced by 2 is stored too")
    a = p.parse_args()
    with open(a.validation) as f:
        held = [line.strip() for line in f if line.strip() and not line.startswith("#")]
    missing = sorted(set(held) - set(pictures(a.photos)))
    if missing:
        p.error(f"{a.validation} names {len(missing)} photographs that {a.photos} does not have, the first: {missing[0]}")
    os.makedirs(a.to, exist_ok=True)
    index, offset, digest = [], 0, hashlib.sha256()
    with open(os.path.join(a.to, "pixels.bin"), "wb") as out:
        def add(name, kind, im):
            nonlocal offset
            data = np.asarray(im).tobytes()
            out.write(data)
            digest.update(data)
            index.append({"file": name, "kind": kind, "width": im.width, "height": im.height, "offset": offset})
            offset += len(data)

        for name in pictures(a.photos):
            if name in held:
                continue
            im = Image.open(os.path.join(a.photos, name)).convert("RGB")
            add(name, "photo", im)
            if min(im.size) >= a.half_from:
                add(name, "half", im.resize((im.width // 2, im.height // 2), Image.LANCZOS))
        for name in pictures(a.textures) if a.textures else []:
            add(name, "texture", Image.open(os.path.join(a.textures, name)).convert("RGB"))
    with open(os.path.join(a.to, "index.json"), "w") as f:
        json.dump({"sha256": digest.hexdigest(), "validation": [os.path.abspath(os.path.join(a.photos, n)) for n in sorted(held)],
                   "pictures": index}, f, indent=1)
    kinds = {k: sum(i["kind"] == k for i in index) for k in ("photo", "half", "texture")}
    print(f"{kinds}, {len(held)} held back, {offset / 3e6:.0f} megapixels, sha256 {digest.hexdigest()[:16]}")


if __name__ == "__main__":
    main()
