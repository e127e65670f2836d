"""ONNX graphs of a diffusers U-Net and decoder, with the names diffusers' own exports use.

As a script it writes tests/fixtures/onnx from two of the tiny models: opset 17 by tracing, and
the exporter's current default (dynamo), and checks each with onnxruntime against torch.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import VQModel

from oracle_common import FIXTURES, randn, write_json


class UNetGraph(torch.nn.Module):
    """sample [1, C, H, W], timestep [1] -> out_sample."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep):
        return self.unet(sample, timestep, return_dict=False)[0]


class DecoderGraph(torch.nn.Module):
    """latent_sample -> sample. `quantize` decodes a VQ latent through its codebook."""

    def __init__(self, first_stage, quantize):
        super().__init__()
        self.first_stage = first_stage
        self.options = {"force_not_quantize": not quantize} if isinstance(first_stage, VQModel) else {}

    def forward(self, latent_sample):
        return self.first_stage.decode(latent_sample, return_dict=False, **self.options)[0]


class EncoderGraph(torch.nn.Module):
    """sample -> latent_sample: the latent before quantisation, or the moments of a KL model."""

    def __init__(self, first_stage):
        super().__init__()
        self.first_stage = first_stage

    def forward(self, sample):
        encoded = self.first_stage.encode(sample)
        return encoded.latents if isinstance(self.first_stage, VQModel) else encoded.latent_dist.parameters


def export(module, inputs, path, input_names, output_name, dynamic, dynamo=False, opset=17, external=False):
    """Writes one graph, its weights inside or (`external`, the dynamo default) in `path`.data beside it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(input_names=input_names, output_names=[output_name])
    if dynamo:
        options["dynamo"] = True
        options["external_data"] = external
        if opset:
            options["opset_version"] = opset
        if dynamic:
            h, w = torch.export.Dim("height", min=2, max=512), torch.export.Dim("width", min=2, max=512)
            options["dynamic_shapes"] = tuple({2: h, 3: w} if x.ndim == 4 else None for x in inputs)
    else:
        options.update(dynamo=False, opset_version=opset, do_constant_folding=True)
        if dynamic:
            options["dynamic_axes"] = {name: {2: "height", 3: "width"}
                                       for name, x in zip(input_names, inputs) if x.ndim == 4}
            options["dynamic_axes"][output_name] = {2: "out_height", 3: "out_width"}
    with torch.no_grad():
        torch.onnx.export(module.eval(), tuple(inputs), str(path), **options)
    if dynamo:
        strip(path)


def strip(path):
    """Removes the source paths and stack traces the dynamo exporter leaves at every node."""
    model = onnx.load(str(path), load_external_data=False)
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for item in [graph, *graph.node, *graph.value_info]:
            del item.metadata_props[:]
            item.doc_string = ""
    for item in [model, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    path.write_bytes(model.SerializeToString())


def export_unet(unet, path, latent, dynamic, **options):
    inputs = [randn((1, unet.config.in_channels, *latent), 1), torch.tensor([421], dtype=torch.int64)]
    export(UNetGraph(unet), inputs, path, ["sample", "timestep"], "out_sample", dynamic, **options)


def export_decoder(first_stage, path, latent, dynamic, quantize=True, **options):
    inputs = [randn((1, first_stage.config.latent_channels, *latent), 2)]
    export(DecoderGraph(first_stage, quantize), inputs, path, ["latent_sample"], "sample", dynamic, **options)


def export_encoder(first_stage, path, picture, dynamic, **options):
    inputs = [randn((1, first_stage.config.in_channels, *picture), 3).clamp(-1, 1)]
    export(EncoderGraph(first_stage), inputs, path, ["sample"], "latent_sample", dynamic, **options)


def check(path, inputs, expected):
    """Largest error of onnxruntime against torch, relative to the output's range."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs)}
    got = session.run(None, feed)[0]
    return float(np.abs(got - expected.numpy()).max() / np.ptp(expected.numpy()))


# file: (model, part, dynamic shapes, exporter options)
GRAPHS = {
    "unet-opset17.onnx": ("old-bin", "unet", False, {}),
    "unet-opset17-dynamic.onnx": ("old-bin", "unet", True, {}),
    "unet-dynamo-dynamic.onnx": ("old-bin", "unet", True, {"dynamo": True, "opset": None, "external": True}),
    "decoder-opset17.onnx": ("old-bin", "decoder", False, {}),
    "decoder-opset17-dynamic.onnx": ("old-bin", "decoder", True, {}),
    "decoder-dynamo-dynamic.onnx": ("old-bin", "decoder", True, {"dynamo": True, "opset": None, "external": True}),
    "decoder-not-quantized-opset17.onnx": ("old-bin", "decoder-not-quantized", False, {}),
    "encoder-opset17.onnx": ("old-bin", "encoder", False, {}),
    "scale-shift-unet-opset17.onnx": ("scale-shift-attention", "unet", False, {}),
    "scale-shift-unet-dynamo.onnx": ("scale-shift-attention", "unet", False, {"dynamo": True, "opset": None}),
    "kl-decoder-opset17-dynamic.onnx": ("scale-shift-attention", "decoder", True, {}),
    "kl-decoder-dynamo.onnx": ("scale-shift-attention", "decoder", False, {"dynamo": True, "opset": None}),
}
SIZE, OTHER = (8, 12), (12, 8)  # latent sizes: the one exported at, and another for dynamic graphs


def write_graph(folder, name, models):
    """Exports one graph and checks it; returns its description and the inputs and outputs used."""
    model, part, dynamic, options = GRAPHS[name]
    unet, first_stage, _ = models[model]
    path, channels = folder / name, first_stage.config.latent_channels
    down = 2 ** (len(first_stage.config.block_out_channels) - 1)
    if part == "unet":
        export_unet(unet, path, SIZE, dynamic, **options)
        call = lambda shape: [randn((1, unet.config.in_channels, *shape), 5), torch.tensor([37])]
        graph = UNetGraph(unet)
    elif part == "encoder":
        export_encoder(first_stage, path, [down * e for e in SIZE], dynamic, **options)
        call = lambda shape: [randn((1, 3, *(down * e for e in shape)), 7).clamp(-1, 1)]
        graph = EncoderGraph(first_stage)
    else:
        export_decoder(first_stage, path, SIZE, dynamic, quantize=part == "decoder", **options)
        call = lambda shape: [randn((1, channels, *shape), 6)]
        graph = DecoderGraph(first_stage, part == "decoder")
    errors = []
    for shape in (SIZE, OTHER) if dynamic else (SIZE,):
        with torch.no_grad():
            errors.append(check(path, call(shape), graph(*call(shape))))
    loaded = onnx.load(str(path))
    assert max(errors) < 1e-5, f"{name}: onnxruntime is off by {max(errors)}"
    shape_of = lambda value: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
    print(f"{name}: {len(loaded.graph.node)} nodes, relative error {max(errors):.1e}, {path.stat().st_size // 1024} KiB")
    return {
        "file": name, "model": model, "part": part, "dynamic": dynamic, "latent": list(SIZE),
        "opset": max(o.version for o in loaded.opset_import if o.domain in ("", "ai.onnx")),
        "external_data": options.get("external", False),
        "inputs": {i.name: shape_of(i) for i in loaded.graph.input},
        "outputs": {o.name: shape_of(o) for o in loaded.graph.output},
        "operators": sorted({n.op_type for n in loaded.graph.node}),
    }


def main():
    from make_fixtures import build

    folder = FIXTURES / "onnx"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    models = {name: build(name) for name in ("old-bin", "scale-shift-attention")}
    write_json(folder / "index.json", [write_graph(folder, name, models) for name in GRAPHS])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
