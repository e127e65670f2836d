"""Times latile beside other engines on the same two networks, in one run.

    peers.py ONNX_FOLDER --latile TARGET/latile --model MODEL.latile [--component unet decoder]
             [--side 64] [--threads 2] [--rounds 5] [--runs 2] [--engines ...] [--rust-peers FOLDER] [--json FILE]

ONNX_FOLDER is what tests/oracle/full_size.py --onnx wrote (its `onnx` folder). Every engine lives in a child process
of its own, all of them at once; each round runs each engine in turn, so that whatever else the machine does falls on
all alike, and what counts is the median of each engine's ratio to ONNX Runtime within a round. Peak memory is the
child's VmHWM. Engines that are not installed are named and left out, never replaced.

The other engines get the decoder without its codebook search, which they would do with a 4096 x 8192 matrix; latile
searches the codebook in its time. Before timing, each engine's output is compared with ONNX Runtime's.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINES = ["onnxruntime", "latile", "openvino", "ncnn", "mnn", "tract", "rten"]
HERE = Path(__file__).resolve().parent


# In the child: one engine

def peak_rss():
    """The peak resident set of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def load_onnxruntime(model, threads, inputs):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads would otherwise spin into the next engine's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(session.get_inputs(), inputs)}
    return lambda: session.run(None, feed)[0]


def load_openvino(model, threads, inputs):
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(str(model), "CPU", {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return lambda: request.infer(list(inputs))[compiled.output(0)]


def load_ncnn(model, threads, inputs):
    import ncnn

    param, weights = Path(f"{model}.ncnn.param"), Path(f"{model}.ncnn.bin")
    net = ncnn.Net()
    net.opt.num_threads = threads
    for switch in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, switch, False)
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise RuntimeError(f"ncnn cannot load {param}")
    names, output = net.input_names(), net.output_names()[0]

    def run():
        extractor = net.create_extractor()
        for name, x in zip(names, inputs):
            extractor.input(name, ncnn.Mat(x[0] if x.ndim == 4 else x.astype("float32")).clone())
        import numpy as np
        return np.array(extractor.extract(output)[1])[None]
    return run


def load_mnn(model, threads, inputs):
    import MNN
    import numpy as np

    net = MNN.Interpreter(f"{model}.mnn")
    session = net.createSession({"backend": "CPU", "numThread": threads, "precision": "high"})
    targets = net.getSessionInputAll(session)
    output = net.getSessionOutput(session)

    def run():
        for name, x in inputs_by_name(list(targets), inputs).items():
            kind = MNN.Halide_Type_Float if x.dtype == np.float32 else MNN.Halide_Type_Int
            x = x if x.dtype == np.float32 else x.astype(np.int32)
            targets[name].copyFrom(MNN.Tensor(x.shape, kind, x, MNN.Tensor_DimensionType_Caffe))
        net.runSession(session)
        shape = output.getShape()
        host = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), MNN.Tensor_DimensionType_Caffe)
        output.copyToHostTensor(host)
        return np.array(host.getData(), np.float32).reshape(shape)
    return run


def inputs_by_name(names, inputs):
    """The graphs' inputs are sample|latent_sample and timestep; an engine may list them in any order."""
    return {name: inputs[1] if "timestep" in name else inputs[0] for name in names}


def child(engine, model, threads, folder):
    """Speaks the line protocol of rust/src/lib.rs for an engine with a Python interface."""
    import numpy as np

    inputs = [np.load(p) for p in sorted(Path(folder).glob("input*.npy"))]
    run = globals()[f"load_{engine}"](model, threads, inputs)
    answer = lambda value: print(json.dumps(value), flush=True)
    answer({"ready": True})
    last = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "run":
            seconds = []
            for _ in range(int(rest)):
                start = time.perf_counter()
                last = run()
                seconds.append(time.perf_counter() - start)
            answer({"seconds": seconds, "peak_rss_bytes": peak_rss()})
        elif word == "dump":
            np.ascontiguousarray(last, dtype=np.float32).tofile(rest)
            answer({"values": int(np.size(last))})
        else:
            break


# In the parent

class Missing(Exception):
    """An engine is not installed, or cannot take the graph; the message says which and why."""


class Peer:
    """An engine in a child process that waits for its turns."""

    def __init__(self, engine, model, threads, folder, rust):
        self.engine, self.log = engine, open(Path(folder) / f"{engine}.log", "w+")
        if engine in ("tract", "rten"):
            program = Path(rust or HERE / "rust/target/release") / f"peer-{engine}"
            if not program.is_file():
                raise Missing(f"{program} is not built: cargo build --release in benches/peers/rust, or --rust-peers")
            words = [str(program), str(model), str(threads), *(Path(folder) / "inputs.txt").read_text().split()]
        else:
            module = {"mnn": "MNN"}.get(engine, engine)
            if importlib.util.find_spec(module) is None:
                raise Missing(f"Python package {module} is not installed")
            convert(engine, model)
            words = [sys.executable, __file__, "--child", engine, str(model), str(threads), str(folder)]
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
                                        text=True, env=environment)
        self.seconds, self.peak = [], 0
        self.answer()
        self.turn(1)
        self.seconds.clear()

    def answer(self):
        # Converters and engines chat on standard output; the protocol's lines are JSON objects.
        while True:
            line = self.process.stdout.readline()
            if not line:
                self.process.wait()
                self.log.seek(0)
                raise Missing(f"exit code {self.process.returncode}: {self.log.read().strip()[-400:]}")
            if line.startswith("{"):
                return json.loads(line)

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def turn(self, runs):
        reply = self.ask(f"run {runs}")
        self.peak = max(self.peak, reply["peak_rss_bytes"])
        median = statistics.median(reply["seconds"])
        self.seconds.append(median)
        return median

    def output(self, folder):
        import numpy as np

        path = Path(folder) / f"{self.engine}.out"
        self.ask(f"dump {path}")
        return np.fromfile(path, np.float32)

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Latile:
    """The command under test: one process a turn, which maps its model each time and does not count that."""

    engine = "latile"

    def __init__(self, program, model, component, side, threads):
        if not program or not model:
            raise Missing("give --latile PROGRAM and --model MODEL.latile")
        if not Path(program).is_file() or not Path(model).is_file():
            raise Missing(f"{program} or {model} does not exist")
        self.words = [program, "bench", model, "--component", component, "--latent", f"{side}x{side}",
                      "--threads", str(threads), "--json"]
        self.seconds, self.peak, self.report = [], 0, {}
        self.turn(1)
        self.seconds.clear()

    def turn(self, runs):
        done = subprocess.run([*self.words, "--runs", str(runs)], capture_output=True, text=True)
        if done.returncode:
            raise Missing(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        self.report = json.loads(done.stdout)
        self.peak = max(self.peak, self.report["peak_rss_bytes"])
        self.seconds.append(self.report["median_s"])
        return self.report["median_s"]

    def output(self, _folder):
        return None

    def close(self):
        pass


def convert(engine, model):
    """Converts the graph where an engine has a format of its own; keeps the result beside the graph."""
    with tempfile.TemporaryDirectory() as scratch:
        # Converters leave files beside their input: give them a link in a folder that goes away.
        link = Path(scratch) / model.name
        link.symlink_to(model)
        if engine == "mnn" and not Path(f"{model}.mnn").is_file():
            # The package's converter itself, without the wrapper that reports home.
            code = "import sys, _tools; _tools.mnnconvert(sys.argv)"
            made = {f"{link}.mnn": f"{model}.mnn"}
            words = [sys.executable, "-c", code, "-f", "ONNX", "--modelFile", str(link), "--MNNModel", f"{link}.mnn",
                     "--bizCode", "peers"]
        elif engine == "ncnn" and not Path(f"{model}.ncnn.param").is_file():
            program = shutil.which("pnnx") or str(Path(sys.executable).parent / "pnnx")
            if not Path(program).is_file():
                raise Missing("Python package pnnx, which converts for ncnn, is not installed")
            made = {f"{link}.ncnn.bin": f"{model}.ncnn.bin", f"{link}.ncnn.param": f"{model}.ncnn.param"}
            words = [program, str(link), "fp16=0", f"ncnnparam={link}.ncnn.param", f"ncnnbin={link}.ncnn.bin"]
        else:
            return
        done = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
        if not all(Path(path).is_file() for path in made):
            raise Missing(f"conversion failed: {(done.stdout + done.stderr).strip()[-300:]}")
        if engine == "ncnn":
            # The cast of the timestep to float has no layer in ncnn, which is handed floats anyway.
            param = Path(f"{link}.ncnn.param")
            param.write_text("\n".join("Noop" + line[9:] if line.startswith("Tensor.to ") else line
                                       for line in param.read_text().splitlines()) + "\n")
        for path, kept in made.items():
            shutil.move(path, kept)


def write_inputs(folder, component, side):
    """The inputs as .npy for Python children and raw for the Rust ones, the same numbers for all."""
    import numpy as np

    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((1, 6 if component == "unet" else 3, side, side)).astype(np.float32)]
    if component == "unet":
        inputs.append(np.array([421], np.int64))
    words = []
    for index, x in enumerate(inputs):
        np.save(Path(folder) / f"input{index}.npy", x)
        raw = Path(folder) / f"input{index}.bin"
        x.tofile(raw)
        words.append(f"{'f32' if x.dtype == np.float32 else 'i64'}:{'x'.join(map(str, x.shape))}:{raw}")
    (Path(folder) / "inputs.txt").write_text("\n".join(words))


def model_file(folder, component, side):
    if component == "unet":
        if side != 64:
            raise SystemExit("the static U-Net graph is 64x64: --side 64")
        return folder / "unet.onnx"
    return folder / f"decoder-plain-{side}.onnx"


def bench(args, component):
    """All engines on one component: rows of results, in the order asked for."""
    import numpy as np

    model = model_file(args.folder, component, args.side)
    rows, peers = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder, component, args.side)
        reference = None
        for engine in args.engines:
            try:
                if engine == "latile":
                    peer = Latile(args.latile, args.model, component, args.side, args.threads)
                else:
                    peer = Peer(engine, model.resolve(), args.threads, folder, args.rust_peers)
                out = peer.output(folder)
            except Missing as why:
                print(f"{component}: {engine} left out: {why}", file=sys.stderr)
                continue
            if engine == "onnxruntime":
                reference = out
            error = None
            if out is not None and reference is not None and engine != "onnxruntime":
                error = float(np.abs(out - reference).max() / np.ptp(reference)) if out.size == reference.size else float("inf")
                if not error < 1e-3:
                    print(f"{component}: {engine} left out: its output is off by {error:.1e} of the range", file=sys.stderr)
                    peer.close()
                    continue
            peers.append((peer, error))
        for done in range(args.rounds):
            for peer, _ in peers:
                peer.turn(args.runs)
            print(f"{component}: round {done + 1} of {args.rounds}", file=sys.stderr)
        base = next((p.seconds for p, _ in peers if p.engine == "onnxruntime"), None)
        for peer, error in peers:
            ratio = statistics.median(a / b for a, b in zip(peer.seconds, base)) if base else None
            rows.append(dict(component=component, side=args.side, engine=peer.engine, threads=args.threads,
                             median_s=statistics.median(peer.seconds), best_s=min(peer.seconds), ratio=ratio,
                             peak_rss_bytes=peer.peak, error=error, seconds=peer.seconds,
                             **({"report": peer.report} if peer.engine == "latile" else {})))
            peer.close()
    return rows


def table(rows):
    print(f"{'component':<16}{'engine':<14}{'median s':>10}{'best s':>10}{'× ORT':>8}{'peak MB':>9}{'error':>10}")
    for r in rows:
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "-"
        error = f"{r['error']:.0e}" if r["error"] is not None else "-"
        name = f"{r['component']} {r['side']}x{r['side']}"
        print(f"{name:<16}{r['engine']:<14}{r['median_s']:>10.3f}{r['best_s']:>10.3f}{ratio:>8}"
              f"{r['peak_rss_bytes'] / 1e6:>9.0f}{error:>10}")


def main():
    if sys.argv[1:2] == ["--child"]:
        engine, model, threads, folder = sys.argv[2:6]
        return child(engine, model, int(threads), folder)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the ONNX graphs")
    parser.add_argument("--latile", help="the latile program")
    parser.add_argument("--model", help="the same network as a .latile file")
    parser.add_argument("--component", nargs="+", choices=["unet", "decoder"], default=["unet", "decoder"])
    parser.add_argument("--side", type=int, default=64, help="latent side; the decoder also has 128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=2, help="runs of an engine in each of its turns")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rust-peers", type=Path, help="folder of peer-tract and peer-rten")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    args = parser.parse_args()
    rows = [row for component in args.component for row in bench(args, component)]
    table(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
