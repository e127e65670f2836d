"""ONNX Runtime: reads ONNX as it is; fuses Q/DQ around an operator into its integer kernel."""

import json
import tempfile
from collections import Counter
from pathlib import Path

PACKAGE = "onnxruntime"
INT8 = "convs"
MASKS = {}
PRODUCTS = ("Conv", "MatMul", "Gemm")


def options(threads):
    import onnxruntime as ort

    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    # Idle threads would otherwise spin into the next engine's turn.
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "1")
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    return chosen


class Engine:
    def __init__(self, model, threads, inputs):
        import onnxruntime as ort

        self.model, self.threads = model, threads
        self.session = ort.InferenceSession(str(model), options(threads), providers=["CPUExecutionProvider"])
        self.feed = {i.name: x for i, x in zip(self.session.get_inputs(), inputs)}

    def run(self):
        return self.session.run(None, self.feed)[0]

    def executed(self):
        """The operators of one profiled run in a session of its own, after all timing."""
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as folder:
            profiled = options(self.threads)
            profiled.enable_profiling = True
            profiled.profile_file_prefix = str(Path(folder) / "profile")
            session = ort.InferenceSession(str(self.model), profiled, providers=["CPUExecutionProvider"])
            session.run(None, self.feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        names = (event["args"].get("op_name", "") for event in events if event.get("name", "").endswith("_kernel_time"))
        return Counter(name for name in names if any(product in name for product in PRODUCTS))
