"""ncnn: pnnx makes its files, kept beside the ONNX graph; int8 ones are made from those (ncnn_int8.py)."""

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from engines import Missing

PACKAGE = "ncnn"
INT8 = "int8"
MASKS = {}


def prepare(source, form, int8_folder):
    """The .param file; the .bin lies beside it."""
    base = Path(f"{source}.ncnn")
    if not Path(f"{base}.param").is_file():
        convert(source, base)
    if form == "f32":
        return Path(f"{base}.param")
    if form != "int8":
        raise Missing(f"ncnn has no form {form}: f32 and int8")
    from engines import ncnn_int8

    target = int8_folder / f"{source.stem}.ncnn-int8.param"
    if not target.is_file():
        ncnn_int8.to_int8(Path(f"{base}.param"), target, source.stem)
    return target


def convert(source, base):
    program = shutil.which("pnnx") or str(Path(sys.executable).parent / "pnnx")
    if not Path(program).is_file():
        raise Missing("Python package pnnx, which converts for ncnn, is not installed")
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        # The converter leaves files beside its input: give it a link in a folder that goes away.
        link = Path(scratch) / source.name
        link.symlink_to(source)
        param, weights = Path(scratch) / "net.param", Path(scratch) / "net.bin"
        words = [program, str(link), "fp16=0", f"ncnnparam={param}", f"ncnnbin={weights}"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
        if not (param.is_file() and weights.is_file()):
            raise Missing(f"conversion failed: {(done.stdout + done.stderr).strip()[-300:]}")
        # The cast of the timestep to float has no layer in ncnn, which is handed floats anyway.
        param.write_text("\n".join("Noop" + line[9:] if line.startswith("Tensor.to ") else line
                                   for line in param.read_text().splitlines()) + "\n")
        weights.rename(f"{base}.bin")
        param.rename(f"{base}.param")


def open_net(param, threads):
    """A loaded network in plain f32, but for layers that are int8 in the file."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for switch in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, switch, False)
    if net.load_param(str(param)) or net.load_model(str(Path(param).with_suffix(".bin"))):
        raise RuntimeError(f"ncnn cannot load {param}")
    return net


def feed(net, extractor, inputs):
    import ncnn

    for name, x in zip(net.input_names(), inputs):
        extractor.input(name, ncnn.Mat(x[0] if x.ndim == 4 else x.astype("float32")).clone())


class Engine:
    def __init__(self, model, threads, inputs):
        self.param, self.net, self.inputs = model, open_net(model, threads), inputs
        self.output = self.net.output_names()[0]

    def run(self):
        import numpy as np

        extractor = self.net.create_extractor()
        feed(self.net, extractor, self.inputs)
        return np.array(extractor.extract(self.output)[1])[None]

    def executed(self):
        """The layers with products as the file has them."""
        counts = Counter()
        for line in Path(self.param).read_text().splitlines()[2:]:
            kind, words = line.split()[0], line.split()
            if kind in ("Convolution", "InnerProduct", "MultiHeadAttention"):
                int8 = any(word in ("8=2", "18=2") for word in words)
                counts[f"{kind} {'int8' if int8 else 'f32'}"] += 1
        return counts
