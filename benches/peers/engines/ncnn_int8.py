"""Turns an ncnn network into int8, as ncnn's own ncnn2table and ncnn2int8 do (no package brings those programs).

Convolution and InnerProduct get signed weights with one scale per output channel and one input scale (absolute
maximum over random inputs); MultiHeadAttention gets signed weights and scales its inputs itself at run time. The
format of the files: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure and the layers' load_model.
"""

from pathlib import Path

# What stands before an array of weights: its storage type.
RAW_F32, RAW_INT8 = 0, 0x000D4B38


class Layer:
    """One line of a .param file: type, name, blobs, and parameters `key=value`."""

    def __init__(self, line):
        words = line.split()
        self.kind, self.name = words[:2]
        inputs, outputs = int(words[2]), int(words[3])
        self.bottoms = words[4:4 + inputs]
        self.head = words[:4 + inputs + outputs]
        self.parameters = dict(word.split("=", 1) for word in words[4 + inputs + outputs:])

    def get(self, key, default=0):
        return int(self.parameters.get(str(key), default))

    def line(self):
        return " ".join([*self.head, *(f"{key}={value}" for key, value in self.parameters.items())])


class Reader:
    def __init__(self, path):
        self.data, self.at = Path(path).read_bytes(), 0

    def floats(self, count):
        import numpy as np

        values = np.frombuffer(self.data, "<f4", count, self.at)
        self.at += 4 * count
        return values

    def weights(self, count):
        tag = int.from_bytes(self.data[self.at:self.at + 4], "little")
        if tag != RAW_F32:
            raise ValueError(f"weights at byte {self.at} have storage type {tag:#x}, expected f32: convert with fp16=0")
        self.at += 4
        return self.floats(count)


def rows_to_int8(rows):
    """int8 [n, k] and scales [n] (quantized = real x scale)."""
    import numpy as np

    peak = np.abs(rows).max(1)
    scales = (127 / np.where(peak > 0, peak, 1)).astype("<f4")
    return np.clip(np.rint(rows * scales[:, None]), -127, 127).astype("i1"), scales


def tagged(values):
    """int8 weights with their storage type, padded to four bytes."""
    data = values.tobytes()
    return RAW_INT8.to_bytes(4, "little") + data + bytes(-len(data) % 4)


def input_peaks(param, layers, graph, samples=2):
    """The largest absolute value of each quantized layer's input, by layer name."""
    import numpy as np

    from engines import ncnn as engine
    from quantize import of_graph, random_inputs

    net = engine.open_net(param, 2)
    peaks = {}
    component, side = of_graph(graph)
    for values in random_inputs(component, side, samples):
        extractor = net.create_extractor()
        extractor.set_light_mode(False)
        engine.feed(net, extractor, list(values.values()))
        for layer in layers:
            if layer.kind in ("Convolution", "InnerProduct"):
                blob = np.array(extractor.extract(layer.bottoms[0])[1])
                peaks[layer.name] = max(peaks.get(layer.name, 0.0), float(np.abs(blob).max()))
    return peaks


def to_int8(source, target, graph):
    """Writes TARGET (.param) and its .bin from the float SOURCE (.param) and its .bin."""
    import numpy as np

    lines = Path(source).read_text().splitlines()
    layers = [Layer(line) for line in lines[2:] if line.strip()]
    peaks = input_peaks(source, layers, graph)
    reader, out = Reader(Path(source).with_suffix(".bin")), []
    for layer in layers:
        if layer.kind in ("Convolution", "InnerProduct"):
            outputs = layer.get(0)
            convolution = layer.kind == "Convolution"
            size, bias = layer.get(6 if convolution else 2), layer.get(5 if convolution else 1)
            values, scales = rows_to_int8(reader.weights(size).reshape(outputs, -1))
            out += [tagged(values)] + ([reader.floats(outputs).tobytes()] if bias else [])
            out += [scales.tobytes(), np.float32(127 / peaks[layer.name]).tobytes()]
            layer.parameters["8"] = "2"
        elif layer.kind == "MultiHeadAttention":
            embed = layer.get(0)
            size = layer.get(2)
            widths = [size // embed, layer.get(3, embed), layer.get(4, embed)]
            tail = []
            for width in widths:
                values, scales = rows_to_int8(reader.weights(embed * width).reshape(embed, width))
                out += [tagged(values), reader.floats(embed).tobytes()]
                tail.append(scales.tobytes())
            # The output projection has one scale for all of it.
            values, scales = rows_to_int8(reader.weights(size).reshape(1, -1))
            out += [tagged(values), reader.floats(size // embed).tobytes(), *tail, scales.tobytes()]
            layer.parameters["18"] = "2"
        elif layer.kind == "GroupNorm":
            if layer.get(3, 1):
                out.append(reader.floats(2 * layer.get(1)).tobytes())
        elif layer.kind == "MemoryData":
            count = max(layer.get(0), 1) * max(layer.get(1), 1) * max(layer.get(2), 1)
            out.append(reader.floats(count).tobytes())
        elif layer.kind not in ("Input", "Noop", "BinaryOp", "Concat", "ExpandDims", "Interp", "Permute", "Reshape",
                                "Slice", "Split", "Swish", "UnaryOp"):
            raise ValueError(f"{source}: layer {layer.name} is a {layer.kind}, whose weights are not known here")
    if reader.at != len(reader.data):
        raise ValueError(f"{source}: {len(reader.data) - reader.at} bytes of weights are left over")
    Path(target).with_suffix(".bin").write_bytes(b"".join(out))
    Path(target).write_text("\n".join([*lines[:2], *(layer.line() for layer in layers)]) + "\n")
