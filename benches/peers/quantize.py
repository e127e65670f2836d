"""Makes int8 graphs of the full-size networks for the other engines.

    quantize.py ONNX_FOLDER INT8_FOLDER [--component unet decoder] [--side 64] [--form all nncf ...] [--samples 2]

ONNX_FOLDER is what tests/oracle/full_size.py --onnx wrote beside the diffusers folder; its f32 graphs are read and left
alone. Each becomes INT8_FOLDER/GRAPH.FORM.onnx by onnxruntime.quantization: QuantizeLinear and DequantizeLinear
around float operators (QDQ), weights signed, symmetric, one scale per output channel, activations unsigned,
asymmetric, one static scale per tensor, no reduced range. Ranges are the smallest and largest value over random
inputs (unit normal, timesteps over the whole schedule): enough to time by, not to judge pictures by.

Forms, because engines are fast on different ones:

    convs      Conv, Gemm and MatMul with constant weights, their inputs and their outputs
    inputs     the same operators, but only their inputs: the rest of the network stays float
    symmetric  `inputs` with signed, symmetric activations: no zero points to correct for
    all        every operator ONNX Runtime has an integer kernel for: also Add, Mul, Sigmoid, Resize, Concat, Softmax
    nncf       OpenVINO's own quantizer (Python package nncf), written as its IR: GRAPH.nncf.xml and .bin; signed
               weights per channel, activations asymmetric where they have both signs unevenly (its preset `mixed`)
"""

import argparse
import sys
import tempfile
from pathlib import Path

LINEAR = ["Conv", "Gemm", "MatMul"]
FORMS = ["convs", "inputs", "symmetric", "all", "nncf"]


def graph_name(component, side):
    """The file name of the f32 graph, without suffix: the decoder's is the one without codebook search."""
    return "unet" if component == "unet" else f"decoder-plain-{side}"


def of_graph(name):
    """Component and latent side of a graph's name."""
    return ("unet", 64) if name == "unet" else ("decoder", int(name.rpartition("-")[2]))


def random_inputs(component, side, samples):
    """Seeded inputs of one graph: a dictionary per sample. Timesteps go over the whole schedule, 0 and 999 included."""
    import numpy as np

    rng = np.random.default_rng(2)
    for index in range(samples):
        if component == "unet":
            timestep = index * 999 // max(samples - 1, 1)
            yield {"sample": rng.standard_normal((1, 6, side, side), np.float32),
                   "timestep": np.array([timestep], np.int64)}
        else:
            yield {"latent_sample": rng.standard_normal((1, 3, side, side), np.float32)}


def with_onnxruntime(source, target, inputs, form):
    from onnxruntime.quantization import (
        CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static)

    class Samples(CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    symmetric = form == "symmetric"
    options = {"WeightSymmetric": True, "ActivationSymmetric": symmetric, "MatMulConstBOnly": form != "all"}
    if form in ("inputs", "symmetric"):
        options["OpTypesToExcludeOutputQuantization"] = LINEAR
        # A bias quantized with the input's scale is only of use where the output is quantized too.
        options["QuantizeBias"] = False
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folded = Path(scratch) / "folded.onnx"
        # Folds constants and infers shapes, without which the quantizer cannot place its nodes well.
        quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded), str(target), Samples(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=False,
            weight_type=QuantType.QInt8, activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            op_types_to_quantize=None if form == "all" else LINEAR, calibrate_method=CalibrationMethod.MinMax,
            extra_options=options)


def with_nncf(source, target, inputs):
    import nncf
    import openvino as ov

    network = ov.Core().read_model(str(source))
    samples = list(inputs)
    # Bias correction changes no timing and takes minutes.
    options = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    network = nncf.quantize(network, nncf.Dataset(samples), preset=nncf.QuantizationPreset.MIXED,
                            subset_size=len(samples), advanced_parameters=options)
    ov.save_model(network, str(target), compress_to_fp16=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the f32 graphs")
    parser.add_argument("target", type=Path, help="folder for the int8 graphs")
    parser.add_argument("--component", nargs="+", choices=["unet", "decoder"], default=["unet", "decoder"])
    parser.add_argument("--side", type=int, default=64, help="latent side; the decoder also has 128")
    parser.add_argument("--form", nargs="+", choices=FORMS, default=["all", "nncf"])
    parser.add_argument("--samples", type=int, default=2, help="random inputs to take the ranges from")
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    for component in args.component:
        name = graph_name(component, args.side)
        source = args.folder / f"{name}.onnx"
        if not source.is_file():
            sys.exit(f"{source} does not exist: tests/oracle/full_size.py FOLDER --onnx writes it (U-Net at side 64 only)")
        for form in args.form:
            inputs = random_inputs(component, args.side, args.samples)
            target = args.target / f"{name}.{form}.{'xml' if form == 'nncf' else 'onnx'}"
            if form == "nncf":
                with_nncf(source, target, inputs)
            else:
                with_onnxruntime(source, target, inputs, form)
            print(f"{target} written", flush=True)


if __name__ == "__main__":
    main()
