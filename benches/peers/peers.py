"""Times latile beside other engines on the same two networks, in one run.

    peers.py ONNX_FOLDER --latile TARGET/latile --model MODEL.latile [--component unet decoder]
             [--side 64] [--threads 2] [--rounds 5] [--runs 2] [--engines ...] [--rust-peers FOLDER] [--json FILE]
    peers.py ONNX_FOLDER --int8 INT8_FOLDER --latile TARGET/latile --model f32=A.latile int8=B.latile
             --engines onnxruntime:int8 openvino:int8 openvino:int8@avxvnni latile:int8 latile:int8@avxvnni latile ...

ONNX_FOLDER is what tests/oracle/full_size.py --onnx wrote (its `onnx` folder), INT8_FOLDER what quantize.py made of it.
An engine is named ENGINE[:FORM][@ISA]: the form is f32 unless given (`int8`: the form quantize.py makes that this
engine is fastest on; for latile, the name given to a file in --model), ISA one of latile's names of instruction sets
that the engine is limited to. Every engine lives in a child process of its own, all of them at once; each round runs
each engine in turn, so that whatever else the machine does falls on all alike, and what counts is the median over
rounds of the ratio between two engines within a round. Peak memory is the child's VmHWM. Engines that are not installed
are named and left out, never replaced.

The other engines get the decoder without its codebook search, which they would do with a 4096 x 8192 matrix; latile
searches the codebook in its time. Before timing, each engine's output is compared with ONNX Runtime's in f32: float
ones to 1e-3 of the range, int8 ones to a signal-to-noise ratio, so that a broken network cannot look fast.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import engines
import quantize
from engines import Missing, Spec

HERE = Path(__file__).resolve().parent
DEFAULT = [Spec(name) for name in ("onnxruntime", "latile", "openvino", "ncnn", "mnn", "tract", "rten")]
FLOAT_LIMIT = 1e-3
# Random weights and ranges from two random inputs give 8 to 25 dB; a wrong zero point or scale gives less than 3.
INT8_LIMIT_DB = 6


# In the child: one engine

def peak_rss():
    """The peak resident set of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def child(engine, model, threads, folder):
    """Speaks the line protocol of rust/src/lib.rs for an engine with a Python interface, and `executed` beside it."""
    import numpy as np

    inputs = [np.load(p) for p in sorted(Path(folder).glob("input*.npy"))]
    loaded = engines.module(engine).Engine(Path(model), threads, inputs)
    answer = lambda value: print(json.dumps(value), flush=True)
    answer({"ready": True})
    last = None
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "run":
            seconds = []
            for _ in range(int(rest)):
                start = time.perf_counter()
                last = loaded.run()
                seconds.append(time.perf_counter() - start)
            answer({"seconds": seconds, "peak_rss_bytes": peak_rss()})
        elif word == "dump":
            np.ascontiguousarray(last, dtype=np.float32).tofile(rest)
            answer({"values": int(np.size(last))})
        elif word == "executed":
            answer({"executed": dict(loaded.executed())})
        else:
            break


# In the parent

class Peer:
    """An engine in a child process that waits for its turns. Loading and one untimed run are done when it is made."""

    def __init__(self, spec, model, threads, folder, rust, clock):
        self.clock, self.spec, self.log = clock, spec, open(Path(folder) / f"{str(spec).replace(':', '-')}.log", "w+")
        if spec.engine in engines.RUST:
            program = Path(rust or HERE / "rust/target/release") / f"peer-{spec.engine}"
            if not program.is_file():
                raise Missing(f"{program} is not built: cargo build --release in benches/peers/rust, or --rust-peers")
            words = [str(program), str(model), str(threads), *(Path(folder) / "inputs.txt").read_text().split()]
        else:
            words = [sys.executable, __file__, "--child", spec.engine, str(model), str(threads), str(folder)]
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), **spec.environment())
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

    def processor_time(self):
        """Seconds that all threads of the process have used: the clock of another process, as clock_getcpuclockid(3)."""
        return time.clock_gettime(~self.process.pid << 3 | 2)

    def turn(self, runs):
        start = self.processor_time()
        reply = self.ask(f"run {runs}")
        used = (self.processor_time() - start) / runs
        self.peak = max(self.peak, reply["peak_rss_bytes"])
        self.seconds.append(used if self.clock == "cpu" else statistics.median(reply["seconds"]))

    def output(self, folder):
        import numpy as np

        path = Path(folder) / f"{str(self.spec).replace(':', '-')}.out"
        self.ask(f"dump {path}")
        return np.fromfile(path, np.float32)

    def details(self):
        """What it ran: after all timing, since some engines need a second session to tell."""
        if self.spec.engine in engines.RUST:
            return {}
        package = engines.module(self.spec.engine).PACKAGE
        return {"version": metadata.version(package), **self.ask("executed")}

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Latile:
    """The command under test: one process a turn, which maps its model and runs once before it times."""

    def __init__(self, spec, program, model, component, side, threads, clock):
        if not program or not model:
            raise Missing(f"give --latile PROGRAM and --model {spec.form}=FILE")
        if not Path(program).is_file() or not Path(model).is_file():
            raise Missing(f"{program} or {model} does not exist")
        self.clock, self.spec, self.environment = clock, spec, dict(os.environ, **spec.environment())
        self.words = [program, "bench", model, "--component", component, "--latent", f"{side}x{side}",
                      "--threads", str(threads), "--json"]
        self.seconds, self.peak, self.report = [], 0, {}
        self.turn(1)
        self.seconds.clear()

    def process(self, runs):
        """One process; the processor time it used, opening the model and the untimed run included."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*self.words, "--runs", str(runs)], capture_output=True, text=True, env=self.environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise Missing(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
        self.report = json.loads(done.stdout)
        self.peak = max(self.peak, self.report["peak_rss_bytes"])
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def turn(self, runs):
        if self.clock == "cpu":
            # What two processes with different numbers of runs have in common falls out of their difference.
            once = self.process(1)
            self.seconds.append((self.process(runs + 1) - once) / runs)
        else:
            self.process(runs)
            self.seconds.append(self.report["median_s"])

    def output(self, _folder):
        return None

    def details(self):
        return {"report": self.report}

    def close(self):
        pass


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


def start(spec, args, component, folder):
    """The engine, loaded and run once."""
    if spec.engine == "latile":
        return Latile(spec, args.latile, args.model.get(spec.form), component, args.side, args.threads,
                      args.clock)
    if spec.engine in engines.PYTHON:
        engines.installed(spec.engine)
    graph = quantize.graph_name(component, args.side)
    model = engines.model_file(spec, graph, args.folder, args.int8)
    return Peer(spec, model, args.threads, folder, args.rust_peers, args.clock)


def check(spec, out, reference):
    """How far an output is from the reference: the figures for the table, and why it is not good enough, if so."""
    import numpy as np

    if out.size != reference.size or not np.isfinite(out).all():
        return {}, f"{out.size} values, {int((~np.isfinite(out)).sum())} of them not finite; expected {reference.size}"
    noise = out - reference
    error = float(np.abs(noise).max() / np.ptp(reference))
    if spec.form == "f32":
        return {"error": error}, None if error < FLOAT_LIMIT else f"its output is off by {error:.1e} of the range"
    power = float(np.square(noise, dtype=np.float64).sum())
    sqnr = 10 * np.log10(float(np.square(reference, dtype=np.float64).sum()) / max(power, 1e-30))
    why = None if sqnr >= INT8_LIMIT_DB else f"its output has a signal-to-noise ratio of {sqnr:.1f} dB"
    return {"error": error, "sqnr_db": sqnr}, why


def bench(args, component):
    """All engines on one component: rows of results, in the order asked for."""
    peers = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder, component, args.side)
        reference = None
        if any(spec.engine != "latile" for spec in args.engines):
            once = start(Spec("onnxruntime"), args, component, folder)
            reference = once.output(folder)
            once.close()
        for spec in args.engines:
            try:
                peer = start(spec, args, component, folder)
            except Missing as why:
                print(f"{component}: {spec} left out: {why}", file=sys.stderr)
                continue
            figures, why = {}, None
            if (out := peer.output(folder)) is not None:
                figures, why = check(spec, out, reference)
            if why:
                print(f"{component}: {spec} left out: {why}", file=sys.stderr)
                peer.close()
                continue
            peers.append((peer, figures))
        for done in range(args.rounds):
            for peer, _ in peers:
                peer.turn(args.runs)
            print(f"{component}: round {done + 1} of {args.rounds}", file=sys.stderr)
        rows = [dict(component=component, side=args.side, engine=str(peer.spec), threads=args.threads,
                     clock=args.clock,
                     median_s=statistics.median(peer.seconds), best_s=min(peer.seconds),
                     peak_rss_bytes=peer.peak, seconds=peer.seconds, **figures, **peer.details())
                for peer, figures in peers]
        for row in rows:
            row["ratios"] = {other["engine"]: ratio(row, other) for other in rows}
        for peer, _ in peers:
            peer.close()
    return rows


def ratio(row, other):
    """How many times as long as `other` this engine took: the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(row["seconds"], other["seconds"]))


def table(rows):
    """Times, then every engine's time over each of latile's in the same round."""
    if not rows:
        return
    base = rows[0]["engine"]
    print(f"\n{rows[0]['component']} {rows[0]['side']}x{rows[0]['side']}, {rows[0]['threads']} threads, {rows[0]['clock']} time")
    print(f"{'engine':<28}{'median s':>10}{'best s':>10}{'× first':>9}{'peak MB':>9}{'against f32':>13}  executed")
    for r in rows:
        off = f"{r['sqnr_db']:.1f} dB" if "sqnr_db" in r else f"{r['error']:.0e}" if "error" in r else "-"
        ran = ", ".join(f"{n} {name}" for name, n in r.get("executed", {}).items()) or r.get("report", {}).get("isa", "")
        print(f"{r['engine']:<28}{r['median_s']:>10.4f}{r['best_s']:>10.4f}{r['ratios'][base]:>9.2f}"
              f"{r['peak_rss_bytes'] / 1e6:>9.0f}{off:>13}  {ran}")
    ours = [r["engine"] for r in rows if Spec.parse(r["engine"]).engine == "latile"]
    if ours and len(rows) > 1:
        print(f"\n{'time over that of':<28}" + "".join(f"{name:>26}" for name in ours))
        for r in rows:
            print(f"{r['engine']:<28}" + "".join(f"{r['ratios'][name]:>26.2f}" for name in ours))


def models(words):
    """`--model` as a dictionary from form to file; a file without a form is f32."""
    return dict(word.split("=", 1) if "=" in word else ("f32", word) for word in words)


def main():
    if sys.argv[1:2] == ["--child"]:
        engine, model, threads, folder = sys.argv[2:6]
        return child(engine, model, int(threads), folder)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the f32 ONNX graphs")
    parser.add_argument("--int8", type=Path, help="folder of the int8 graphs, from quantize.py")
    parser.add_argument("--latile", help="the latile program")
    parser.add_argument("--model", nargs="+", default=[], metavar="[FORM=]FILE", help="the network as .latile files")
    parser.add_argument("--component", nargs="+", choices=["unet", "decoder"], default=["unet", "decoder"])
    parser.add_argument("--side", type=int, default=64, help="latent side; the decoder also has 128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=2, help="runs of an engine in each of its turns")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: processor time, which other programs disturb less; for --threads 1")
    parser.add_argument("--engines", nargs="+", type=Spec.parse, default=DEFAULT, metavar="ENGINE[:FORM][@ISA]")
    parser.add_argument("--rust-peers", type=Path, help="folder of peer-tract and peer-rten")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    args = parser.parse_args()
    args.model = models(args.model)
    if "unet" in args.component and args.side != 64:
        parser.error("the U-Net's graph is for 64x64 latents: --side 64, or --component decoder")
    every = []
    for component in args.component:
        rows = bench(args, component)
        table(rows)
        every += rows
        if args.json:
            args.json.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
