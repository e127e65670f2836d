"""The tables of a quality.json (see quality.py) as Markdown.

  python tables.py quality.json [FILE.md ...]

Prints all of them, or puts each into the files between its marks, `<!-- table: NAME -->` and `<!-- end -->`.
"""

import json
import re
import sys

# Names of result folders, in the tables' order, and how they are called there.
ROWS = [("bicubic", "bicubic"), ("span48", "SPAN (48 channels)"), ("dat", "DAT-light"), ("realesrgan", "Real-ESRGAN x4plus")]
COLUMNS = [("psnr_y", "PSNR-Y", ".2f"), ("ssim_y", "SSIM-Y", ".4f"), ("hed", "HED-VGG", ".4f"), ("eff", "EffNet-Lite0", ".4f"),
           ("sharp", "sharpness", ".2f"), ("colour", "colour off", ".2f"), ("lr_psnr", "input given back, dB", ".1f")]


def title(name, costs):
    for key, text in ROWS:
        if name == key:
            return text
    m = re.fullmatch(r"(.+)-(\d+)(?:-c([\d.]+))?", name)
    if not m:
        return "the model's autoencoder alone (truth in)" if name == "autoencoder" else name
    steps = f"{'photo-x4' if m[1] == 'latile' else m[1]}, {m[2]} step" + ("s" if m[2] != "1" else "")
    return steps + (f", consistency {m[3]}" if m[3] else "")


def order(name):
    fixed = [k for k, _ in ROWS]
    if name in fixed:
        return 0, fixed.index(name), ""
    m = re.fullmatch(r"(.+)-(\d+)(-c.*)?", name)
    return (1 if m[1] == "latile" else 2, int(m[2]), name) if m else (3, 0, name)


def row(cells):
    return "| " + " | ".join(cells) + " |"


def overall(part):
    """Means over all photographs."""
    lines = [row(["", *[c for _, c, _ in COLUMNS], "CPU s / MP", "peak MB"]), "|" + "---|" * (len(COLUMNS) + 3)]
    for name in sorted(part["means"], key=order):
        m, cost = part["means"][name]["all"], part["costs"].get(name, {})
        cells = [format(m[k], f) for k, _, f in COLUMNS]
        cells.append(format(cost["cpu_s_per_mp"], ".2g") if "cpu_s_per_mp" in cost else "")
        cells.append(format(cost["peak_rss_bytes"] / 1e6, ".0f") if cost.get("peak_rss_bytes") else "")
        lines.append(row([title(name, part["costs"]), *cells]))
    return lines


def sources(part):
    """PSNR-Y, HED-VGG and EffNet-Lite0 distances by source package, for the peers and 4 steps."""
    names = [n for n in sorted(part["means"], key=order) if n in [k for k, _ in ROWS] or n == "latile-4"]
    lines = [row(["source", "n", *[title(n, part["costs"]) for n in names]]), "|" + "---|" * (len(names) + 2)]
    for source in part["means"][names[0]]:
        if source == "all":
            continue
        cells = []
        for n in names:
            m = part["means"][n].get(source)
            cells.append(f"{m['psnr_y']:.2f} / {m['hed']:.3f} / {m['eff']:.3f}" if m else "")
        lines.append(row([source, str(part["means"][names[0]][source]["n"]), *cells]))
    return lines


def wins(part):
    """On how many photographs latile at 4 steps is nearer to the truth."""
    lines = [row(["against", "n", "PSNR-Y", "SSIM-Y", "HED-VGG", "EffNet-Lite0"]), "|" + "---|" * 6]
    mine = part["wins"].get("latile-4", {})
    for name in sorted(mine, key=order):
        if order(name)[0] == 0:
            w = mine[name]
            lines.append(row([title(name, {}), *[str(w[k]) for k in ("n", "psnr_y", "ssim_y", "hed", "eff")]]))
    return lines


def make(quality):
    out = {}
    for kind in ("clean", "degraded"):
        if kind in quality:
            for name, table in (("overall", overall), ("sources", sources), ("wins", wins)):
                out[f"{kind} {name}"] = "\n".join(table(quality[kind]))
    return out


def main(arguments):
    if not arguments:
        raise SystemExit(__doc__)
    with open(arguments[0]) as f:
        made = make(json.load(f))
    if not arguments[1:]:
        for name, text in made.items():
            print(f"\n{name}\n\n{text}")
    for path in arguments[1:]:
        with open(path) as f:
            text = f.read()
        found = re.findall(r"<!-- table: (.*?) -->", text)
        unknown = [n for n in found if n not in made]
        if unknown or not found:
            raise SystemExit(f"{path} has marks for {unknown or 'no table'}; there are {', '.join(made)}")
        for name in found:
            mark = f"<!-- table: {name} -->"
            text = re.sub(re.escape(mark) + r".*?<!-- end -->", lambda _: f"{mark}\n\n{made[name]}\n\n<!-- end -->", text, flags=re.S)
        with open(path, "w") as f:
            f.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
