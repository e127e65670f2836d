"""The `sr` model's weights in the original CompVis checkpoint layout, in tests/fixtures/compvis.

Writes sr.ckpt (a pickle in a zip, with everything a training checkpoint carries beside the
weights) and sr.safetensors (its state dict), and proves the mapping with a forward pass written
here from the original architecture, over the original key names only.
"""

import shutil
import sys
import types
from collections import OrderedDict

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from oracle_common import FIXTURES, randn, write_tensors

HEAD_DIM, GROUPS = 8, 4  # of the `sr` model; LDM-SR itself has 32 and 32, fixed in code and configuration


# diffusers -> CompVis

def _resnet(state, old, new, out):
    names = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
             "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    _copy(state, old, new, out, names)


def _copy(state, old, new, out, names):
    for a, b in names.items():
        for kind in ("weight", "bias"):
            if f"{old}.{a}.{kind}" in state:
                out[f"{new}.{b}.{kind}"] = state[f"{old}.{a}.{kind}"].clone()


def _unet_attention(state, old, new, out, head_dim):
    """One convolution over [head 0: q, k, v | head 1: q, k, v | ...], the order of the original."""
    _copy(state, old, new, out, {"group_norm": "norm"})
    for kind in ("weight", "bias"):
        q, k, v = (state[f"{old}.to_{n}.{kind}"] for n in "qkv")
        heads = [t.reshape(-1, head_dim, *t.shape[1:]) for t in (q, k, v)]
        qkv = torch.cat(heads, dim=1).reshape(-1, *q.shape[1:])
        out[f"{new}.qkv.{kind}"] = qkv[..., None].clone() if kind == "weight" else qkv.clone()
        proj = state[f"{old}.to_out.0.{kind}"]
        out[f"{new}.proj_out.{kind}"] = proj[..., None].clone() if kind == "weight" else proj.clone()


def unet_to_compvis(unet):
    """State dict of `UNetModel`: input_blocks, middle_block, output_blocks, time_embed, out."""
    state, out = unet.state_dict(), OrderedDict()
    levels, layers = len(unet.config.block_out_channels), unet.config.layers_per_block
    head_dim = unet.config.attention_head_dim
    for old, new in (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2")):
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = state[f"{old}.{kind}"].clone()
    for kind in ("weight", "bias"):
        out[f"input_blocks.0.0.{kind}"] = state[f"conv_in.{kind}"].clone()
    block = 1
    for level in range(levels):
        for layer in range(layers):
            _resnet(state, f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{block}.0", out)
            if f"down_blocks.{level}.attentions.{layer}.to_q.weight" in state:
                _unet_attention(state, f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{block}.1", out, head_dim)
            block += 1
        if level < levels - 1:
            _copy(state, f"down_blocks.{level}.downsamplers.0", f"input_blocks.{block}.0", out, {"conv": "op"})
            block += 1
    _resnet(state, "mid_block.resnets.0", "middle_block.0", out)
    _unet_attention(state, "mid_block.attentions.0", "middle_block.1", out, head_dim)
    _resnet(state, "mid_block.resnets.1", "middle_block.2", out)
    block = 0
    for level in range(levels):
        for layer in range(layers + 1):
            _resnet(state, f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{block}.0", out)
            part = 1
            if f"up_blocks.{level}.attentions.{layer}.to_q.weight" in state:
                _unet_attention(state, f"up_blocks.{level}.attentions.{layer}", f"output_blocks.{block}.1", out, head_dim)
                part = 2
            if layer == layers and level < levels - 1:
                _copy(state, f"up_blocks.{level}.upsamplers.0", f"output_blocks.{block}.{part}", out, {"conv": "conv"})
            block += 1
    for kind in ("weight", "bias"):
        out[f"out.0.{kind}"] = state[f"conv_norm_out.{kind}"].clone()
        out[f"out.2.{kind}"] = state[f"conv_out.{kind}"].clone()
    return out


def first_stage_to_compvis(first_stage):
    """State dict of `VQModelInterface` or `AutoencoderKL`: encoder, decoder, quantize, quant convolutions."""
    state, out = first_stage.state_dict(), OrderedDict()
    levels, layers = len(first_stage.config.block_out_channels), first_stage.config.layers_per_block
    resnet = {n: n for n in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}

    def attention(old, new):
        _copy(state, old, new, out, {"group_norm": "norm"})
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            out[f"{new}.{b}.weight"] = state[f"{old}.{a}.weight"][:, :, None, None].clone()
            out[f"{new}.{b}.bias"] = state[f"{old}.{a}.bias"].clone()

    for half in ("encoder", "decoder"):
        _copy(state, half, half, out, {"conv_in": "conv_in"})
        for level in range(levels):
            # The decoder counts its levels from the picture's end.
            ours, theirs = (f"encoder.down_blocks.{level}", f"encoder.down.{level}") if half == "encoder" else (
                f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}")
            for layer in range(layers + (half == "decoder")):
                _copy(state, f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", out, resnet)
                if f"{ours}.attentions.{layer}.to_q.weight" in state:
                    attention(f"{ours}.attentions.{layer}", f"{theirs}.attn.{layer}")
            _copy(state, f"{ours}.downsamplers.0", f"{theirs}.downsample", out, {"conv": "conv"})
            _copy(state, f"{ours}.upsamplers.0", f"{theirs}.upsample", out, {"conv": "conv"})
        for i in (0, 1):
            _copy(state, f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", out, resnet)
        if f"{half}.mid_block.attentions.0.to_q.weight" in state:
            attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        _copy(state, half, half, out, {"conv_norm_out": "norm_out", "conv_out": "conv_out"})
    if "quantize.embedding.weight" in state:
        out["quantize.embedding.weight"] = state["quantize.embedding.weight"].clone()
    for name in ("quant_conv", "post_quant_conv"):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in state:
                out[f"{name}.{kind}"] = state[f"{name}.{kind}"].clone()
    return out


def to_compvis(unet, first_stage):
    """The model's part of a `LatentDiffusion` state dict."""
    out = OrderedDict()
    for name, tensor in unet_to_compvis(unet).items():
        out[f"model.diffusion_model.{name}"] = tensor
    for name, tensor in first_stage_to_compvis(first_stage).items():
        out[f"first_stage_model.{name}"] = tensor
    return out


def surroundings(state):
    """Keys a LatentDiffusion state dict holds beside the weights; an importer skips them."""
    betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - before) / (1 - alphas)
    schedule = {
        "betas": betas, "alphas_cumprod": alphas, "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(), "sqrt_recip_alphas_cumprod": alphas.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(), "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - alphas),
    }
    out = OrderedDict((name, value.float()) for name, value in schedule.items())
    out.update(state)
    # Averaged weights: the original drops the dots from the names. Two of them are enough here.
    for name in ("input_blocks.0.0.weight", "out.2.bias"):
        out["model_ema.diffusion_model" + name.replace(".", "")] = state[f"model.diffusion_model.{name}"] + 1.0
    out["model_ema.decay"] = torch.tensor(0.9999)
    out["model_ema.num_updates"] = torch.tensor(123, dtype=torch.int32)
    out["lvlb_weights"] = torch.ones(1000)
    out["scale_factor"] = torch.tensor(1.0)
    out["first_stage_model.loss.discriminator.main.0.weight"] = randn((2, 3, 4, 4), 1)
    out["first_stage_model.loss.discriminator.main.3.running_mean"] = torch.zeros(2)
    out["first_stage_model.loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(7)
    out["first_stage_model.loss.perceptual_loss.lin0.model.1.weight"] = randn((1, 4, 1, 1), 2)
    return out


def _foreign_class(module, name):
    """A class that pickles by reference to a package the reader does not have."""
    path = []
    for part in module.split("."):
        path.append(part)
        sys.modules.setdefault(".".join(path), types.ModuleType(".".join(path)))
    cls = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    return cls


def checkpoint(state):
    """What the training framework saves round the state dict, in the order it saves it."""
    callback = _foreign_class("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    return {
        "epoch": 3, "global_step": 1234, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {callback: {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.1234),
                                 "best_model_path": "checkpoints/epoch=000003.ckpt", "current_score": None}},
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}},
                              "param_groups": [{"lr": 1e-6, "betas": (0.9, 0.999), "params": [0]}]}],
        "lr_schedulers": [],
    }


# The original forward pass, over the original names

def _norm(state, name, x, eps, groups):
    return F.group_norm(x, groups, state[f"{name}.weight"], state[f"{name}.bias"], eps)


def _conv(state, name, x, **options):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _unet_block(state, name, x, emb, head_dim, groups):
    """One entry of input_blocks, middle_block or output_blocks: its parts in order."""
    part = 0
    while True:
        base = f"{name}.{part}"
        if f"{base}.in_layers.0.weight" in state:
            h = _conv(state, f"{base}.in_layers.2", F.silu(_norm(state, f"{base}.in_layers.0", x, 1e-5, groups)), padding=1)
            h = h + F.linear(F.silu(emb), state[f"{base}.emb_layers.1.weight"], state[f"{base}.emb_layers.1.bias"])[:, :, None, None]
            h = _conv(state, f"{base}.out_layers.3", F.silu(_norm(state, f"{base}.out_layers.0", h, 1e-5, groups)), padding=1)
            x = (_conv(state, f"{base}.skip_connection", x) if f"{base}.skip_connection.weight" in state else x) + h
        elif f"{base}.qkv.weight" in state:
            _, c, height, width = x.shape
            flat = x.reshape(1, c, -1)
            qkv = F.conv1d(_norm(state, f"{base}.norm", flat, 1e-5, groups), state[f"{base}.qkv.weight"], state[f"{base}.qkv.bias"])
            # Every head holds its own q, k and v, side by side.
            q, k, v = qkv.reshape(c // head_dim, 3 * head_dim, -1).split(head_dim, dim=1)
            weight = torch.softmax(torch.einsum("hct,hcs->hts", q, k) * head_dim**-0.5, dim=-1)
            a = torch.einsum("hts,hcs->hct", weight, v).reshape(1, c, -1)
            x = (flat + F.conv1d(a, state[f"{base}.proj_out.weight"], state[f"{base}.proj_out.bias"])).reshape(1, c, height, width)
        elif f"{base}.op.weight" in state:
            x = _conv(state, f"{base}.op", x, stride=2, padding=1)
        elif f"{base}.conv.weight" in state:
            x = _conv(state, f"{base}.conv", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
        elif f"{base}.weight" in state:
            x = _conv(state, base, x, padding=1)
        else:
            return x
        part += 1


def unet_forward(state, x, timestep, head_dim, groups):
    """`UNetModel.forward` on keys without their "model.diffusion_model." prefix."""
    width = state["time_embed.0.weight"].shape[1]
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(width // 2) / (width // 2))
    angles = torch.tensor([float(timestep)])[:, None] * frequencies[None]
    emb = torch.cat([angles.cos(), angles.sin()], dim=-1)
    emb = F.linear(emb, state["time_embed.0.weight"], state["time_embed.0.bias"])
    emb = F.linear(F.silu(emb), state["time_embed.2.weight"], state["time_embed.2.bias"])
    count = lambda list_name: len({k.split(".")[1] for k in state if k.startswith(f"{list_name}.")})
    skips = []
    for i in range(count("input_blocks")):
        x = _unet_block(state, f"input_blocks.{i}", x, emb, head_dim, groups)
        skips.append(x)
    x = _unet_block(state, "middle_block", x, emb, head_dim, groups)
    for i in range(count("output_blocks")):
        x = _unet_block(state, f"output_blocks.{i}", torch.cat([x, skips.pop()], dim=1), emb, head_dim, groups)
    return _conv(state, "out.2", F.silu(_norm(state, "out.0", x, 1e-5, groups)), padding=1)


def _ae_resnet(state, base, x, groups):
    h = _conv(state, f"{base}.conv1", F.silu(_norm(state, f"{base}.norm1", x, 1e-6, groups)), padding=1)
    h = _conv(state, f"{base}.conv2", F.silu(_norm(state, f"{base}.norm2", h, 1e-6, groups)), padding=1)
    return (_conv(state, f"{base}.nin_shortcut", x) if f"{base}.nin_shortcut.weight" in state else x) + h


def _ae_attention(state, base, x, groups):
    _, c, height, width = x.shape
    h = _norm(state, f"{base}.norm", x, 1e-6, groups)
    q, k, v = (_conv(state, f"{base}.{n}", h).reshape(c, -1) for n in "qkv")
    weight = torch.softmax(q.T @ k * c**-0.5, dim=1)
    return x + _conv(state, f"{base}.proj_out", (v @ weight.T).reshape(1, c, height, width))


def _ae_middle(state, half, x, groups):
    x = _ae_resnet(state, f"{half}.mid.block_1", x, groups)
    if f"{half}.mid.attn_1.q.weight" in state:
        x = _ae_attention(state, f"{half}.mid.attn_1", x, groups)
    return _ae_resnet(state, f"{half}.mid.block_2", x, groups)


def _ae_level(state, base, x, groups):
    block = 0
    while f"{base}.block.{block}.norm1.weight" in state:
        x = _ae_resnet(state, f"{base}.block.{block}", x, groups)
        if f"{base}.attn.{block}.q.weight" in state:
            x = _ae_attention(state, f"{base}.attn.{block}", x, groups)
        block += 1
    return x


def decode(state, z, groups):
    """Decoder of the first stage through its codebook, keys without "first_stage_model."."""
    codes = state["quantize.embedding.weight"]
    flat = z.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
    index = ((flat[:, None, :] - codes[None]) ** 2).sum(-1).argmin(1)
    z = codes[index].reshape(1, z.shape[2], z.shape[3], -1).permute(0, 3, 1, 2)
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", z), padding=1)
    x = _ae_middle(state, "decoder", x, groups)
    for level in reversed(range(len({k.split(".")[2] for k in state if k.startswith("decoder.up.")}))):
        x = _ae_level(state, f"decoder.up.{level}", x, groups)
        if f"decoder.up.{level}.upsample.conv.weight" in state:
            x = _conv(state, f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"), padding=1)
    return _conv(state, "decoder.conv_out", F.silu(_norm(state, "decoder.norm_out", x, 1e-6, groups)), padding=1)


def encode(state, x, groups):
    """Encoder of the first stage up to the latent before quantisation."""
    x = _conv(state, "encoder.conv_in", x, padding=1)
    for level in range(len({k.split(".")[2] for k in state if k.startswith("encoder.down.")})):
        x = _ae_level(state, f"encoder.down.{level}", x, groups)
        if f"encoder.down.{level}.downsample.conv.weight" in state:
            x = _conv(state, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = _ae_middle(state, "encoder", x, groups)
    x = _conv(state, "encoder.conv_out", F.silu(_norm(state, "encoder.norm_out", x, 1e-6, groups)), padding=1)
    return _conv(state, "quant_conv", x)


def verify(state, folder, head_dim, groups):
    """Runs the original forward pass on the diffusers folder's recorded inputs."""
    cut = lambda prefix: {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    unet, first = cut("model.diffusion_model."), cut("first_stage_model.")
    io = [load_file(folder / p) for p in ("unet/io.safetensors", "vqvae/decoder_io.safetensors", "vqvae/encoder_io.safetensors")]
    worst = 0.0
    with torch.no_grad():
        for case in range(3):
            if f"{case}.inputs.sample" not in io[0]:
                break
            pairs = [
                (unet_forward(unet, io[0][f"{case}.inputs.sample"], io[0][f"{case}.inputs.timestep"].item(), head_dim, groups),
                 io[0][f"{case}.outputs.sample"]),
                (decode(first, io[1][f"{case}.inputs.latents"], groups), io[1][f"{case}.outputs.sample"]),
                (encode(first, io[2][f"{case}.inputs.sample"], groups), io[2][f"{case}.outputs.latents"]),
            ]
            for got, expected in pairs:
                worst = max(worst, float((got - expected).abs().max() / (expected.max() - expected.min())))
    return worst


def main():
    from make_fixtures import build

    torch.set_num_threads(1)
    folder = FIXTURES / "compvis"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unet, vqvae, _ = build("sr")
    state = surroundings(to_compvis(unet, vqvae))
    torch.save(checkpoint(state), folder / "sr.ckpt")
    write_tensors(folder / "sr.safetensors", state)
    error = verify(load_file(folder / "sr.safetensors"), FIXTURES / "models" / "sr", HEAD_DIM, GROUPS)
    again = torch.load(folder / "sr.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(again[k], v) for k, v in state.items())
    print(f"{len(state)} tensors; the original forward pass differs from diffusers by {error:.1e} of the range")
    assert error < 1e-5
    # Interleaving q, k and v the other way must not pass: the check would prove nothing.
    wrong = OrderedDict(state)
    key = "model.diffusion_model.middle_block.1.qkv.weight"
    wrong[key] = state[key].reshape(-1, 3, HEAD_DIM, *state[key].shape[1:]).transpose(0, 1).reshape(state[key].shape)
    assert verify(wrong, FIXTURES / "models" / "sr", HEAD_DIM, GROUPS) > 1e-3


if __name__ == "__main__":
    main()
