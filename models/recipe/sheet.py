"""A contact sheet: the same details of several upscalers' pictures beside each other and the truth.

  python sheet.py --truth DIR --column "LABEL=DIR" [--column ...] --to FILE.jpg
                  [--detail STEM:X,Y ...] [--size 160] [--zoom 1]

A row for each detail, a `size` px square of the pictures at (X, Y) of its corner; by default the centre of every picture of the
truth folder. The last column is the truth. With --zoom each pixel becomes a square of that many, nothing interpolated.
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import evaluate

LABEL = 18
GAP = 3


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--truth", required=True)
    p.add_argument("--column", action="append", required=True, metavar="LABEL=DIR")
    p.add_argument("--detail", action="append", metavar="STEM:X,Y")
    p.add_argument("--size", type=int, default=160)
    p.add_argument("--zoom", type=int, default=1)
    p.add_argument("--quality", type=int, default=90, help="of a JPEG")
    p.add_argument("--to", required=True)
    a = p.parse_args()
    columns = [c.rsplit("=", 1) for c in a.column] + [["truth", a.truth]]
    found = [evaluate.listing(folder) for _, folder in columns]
    details = []
    for d in a.detail or found[-1]:
        stem, _, corner = d.partition(":")
        h, w = evaluate.load(found[-1][stem]).shape[:2]
        x, y = map(int, corner.split(",")) if corner else ((w - a.size) // 2, (h - a.size) // 2)
        if not (0 <= x <= w - a.size and 0 <= y <= h - a.size):
            raise SystemExit(f"{d}: {stem} is {w}x{h}, no {a.size} px square begins there")
        details.append((stem, x, y))
    side = a.size * a.zoom + GAP
    sheet = Image.new("RGB", (side * len(columns) - GAP, LABEL + side * len(details) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, ((label, _), pictures) in enumerate(zip(columns, found)):
        draw.text((i * side + 2, 1), label, fill="black", font=font)
        for k, (stem, x, y) in enumerate(details):
            cut = np.repeat(np.repeat(evaluate.load(pictures[stem])[y:y + a.size, x:x + a.size], a.zoom, 0), a.zoom, 1)
            sheet.paste(Image.fromarray(cut), (i * side, LABEL + k * side))
    sheet.save(a.to, quality=a.quality, subsampling=0, optimize=True) if a.to.endswith((".jpg", ".jpeg")) else sheet.save(a.to, optimize=True)


if __name__ == "__main__":
    main()
