"""The engines that are timed: what each is called, which file of a network it takes, how it is made to run.

A module here is one engine with a Python interface. It has `PACKAGE` (what must be installed), `INT8` (the form of
quantized graph it is fastest on), `MASKS` (latile's name of an instruction set to the environment that limits the
engine to it) and a class `Engine(model, threads, inputs)` with `run()`, one inference that returns the output, and
`executed()`, which counts the kernels that did the products. `prepare(source, target, ...)`, where there is one, makes
the engine's own file. What never lives here: timing, rounds, tables; that is peers.py.
"""

import argparse
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

PYTHON = ("onnxruntime", "openvino", "ncnn", "mnn")
# The programs of rust/, with the form of quantized graph each is fastest on; tract miscomputes quantized outputs.
RUST = {"tract": "inputs", "rten": "convs"}
NAMES = ("latile", *PYTHON, *RUST)
ISAS = ("scalar", "avx2", "avxvnni", "avx512", "avx512vnni")


class Missing(Exception):
    """An engine is not installed, or cannot take the graph; the message says which and why."""


@dataclass(frozen=True)
class Spec:
    """One line of the table: an engine, the form of the network, and the instruction set it is limited to."""

    engine: str
    form: str = "f32"
    isa: str | None = None

    @classmethod
    def parse(cls, text):
        """`ENGINE[:FORM][@ISA]`; the form `int8` is the engine's fastest."""
        rest, _, isa = text.partition("@")
        engine, _, form = rest.partition(":")
        if engine not in NAMES:
            raise argparse.ArgumentTypeError(f"{text}: the engines are {', '.join(NAMES)}")
        if isa and isa not in ISAS:
            raise argparse.ArgumentTypeError(f"{text}: the instruction sets are {', '.join(ISAS)}")
        if form == "int8" and engine != "latile":
            form = RUST.get(engine) or getattr(module(engine), "INT8", "int8")
        return cls(engine, form or "f32", isa or None)

    def __str__(self):
        return self.engine + (f":{self.form}" if self.form != "f32" else "") + (f"@{self.isa}" if self.isa else "")

    def environment(self):
        """What limits the engine to its instruction set."""
        if self.isa is None:
            return {}
        masks = {isa: {"LATILE_ISA": isa} for isa in ISAS}
        if self.engine != "latile":
            masks = getattr(module(self.engine), "MASKS", {}) if self.engine in PYTHON else {}
        if self.isa not in masks:
            raise Missing(f"{self.engine} cannot be limited to {self.isa}")
        return masks[self.isa]


def module(engine):
    return importlib.import_module(f"engines.{engine}")


def installed(engine):
    """Raises `Missing` unless the engine's package is there."""
    package = module(engine).PACKAGE
    if importlib.util.find_spec(package) is None:
        raise Missing(f"Python package {package} is not installed")


def model_file(spec, graph, folder, int8_folder):
    """The file that the engine loads for the graph of that name, made if the engine has a format of its own."""
    if spec.form != "f32" and int8_folder is None:
        raise Missing("its int8 graph is in no folder: give --int8 FOLDER")
    if spec.form == "f32" or spec.engine == "ncnn":
        source = folder / f"{graph}.onnx"
    else:
        suffix = "xml" if spec.form == "nncf" else "onnx"
        source = int8_folder / f"{graph}.{spec.form}.{suffix}"
    if not Path(source).is_file():
        raise Missing(f"{source} does not exist: full_size.py --onnx makes f32 graphs, quantize.py the others")
    prepare = getattr(module(spec.engine), "prepare", None) if spec.engine in PYTHON else None
    return prepare(source.resolve(), spec.form, int8_folder) if prepare else source.resolve()
