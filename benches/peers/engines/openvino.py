"""OpenVINO: reads ONNX, Q/DQ included, and its own IR; ONEDNN_MAX_CPU_ISA limits its instruction set."""

from collections import Counter

PACKAGE = "openvino"
INT8 = "symmetric"
MASKS = {isa: {"ONEDNN_MAX_CPU_ISA": mask} for isa, mask in {
    "avx2": "AVX2", "avxvnni": "AVX2_VNNI", "avx512": "AVX512_CORE", "avx512vnni": "AVX512_CORE_VNNI"}.items()}
PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")


class Engine:
    def __init__(self, model, threads, inputs):
        import openvino as ov

        # Without the hint, what is not int8 would run in bf16 where the machine has it: another network.
        self.compiled = ov.Core().compile_model(str(model), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"})
        self.request, self.inputs = self.compiled.create_infer_request(), list(inputs)

    def run(self):
        return self.request.infer(self.inputs)[self.compiled.output(0)]

    def executed(self):
        """The primitives the plugin compiled, such as `Convolution brgconv_avx512_I8`."""
        counts = Counter()
        for node in self.compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, primitive = (str(getattr(info[key], "value", info[key])) if key in info else ""
                               for key in ("layerType", "primitiveType"))
            if kind in PRODUCTS:
                counts[f"{kind} {primitive}"] += 1
        return counts
