"""MNN: its converter, which its package brings along, makes its file; kept beside the ONNX graph."""

import subprocess
import sys
import tempfile
from pathlib import Path

from engines import Missing

PACKAGE = "MNN"
MASKS = {}


def prepare(source, form, _int8_folder):
    if form != "f32":
        raise Missing("only f32 is timed with MNN")
    target = Path(f"{source}.mnn")
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
            # The package's converter itself, without the wrapper that reports home.
            code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
            made = Path(scratch) / "net.mnn"
            words = [sys.executable, "-c", code, "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(made),
                     "--bizCode", "peers"]
            done = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
            if not made.is_file():
                raise Missing(f"conversion failed: {(done.stdout + done.stderr).strip()[-300:]}")
            made.rename(target)
    return target


class Engine:
    def __init__(self, model, threads, inputs):
        import MNN
        import numpy as np

        self.net = MNN.Interpreter(str(model))
        self.session = self.net.createSession({"backend": "CPU", "numThread": threads, "precision": "high"})
        self.output = self.net.getSessionOutput(self.session)
        self.feed = []
        for name, target in self.net.getSessionInputAll(self.session).items():
            # It may list the inputs in any order.
            x = inputs[1] if "timestep" in name else inputs[0]
            kind = MNN.Halide_Type_Float if x.dtype == np.float32 else MNN.Halide_Type_Int
            self.feed.append((target, x if x.dtype == np.float32 else x.astype(np.int32), kind))

    def run(self):
        import MNN
        import numpy as np

        for target, x, kind in self.feed:
            target.copyFrom(MNN.Tensor(x.shape, kind, x, MNN.Tensor_DimensionType_Caffe))
        self.net.runSession(self.session)
        shape = self.output.getShape()
        host = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), MNN.Tensor_DimensionType_Caffe)
        self.output.copyToHostTensor(host)
        return np.array(host.getData(), np.float32).reshape(shape)

    def executed(self):
        return {}
