"""Writes the tiny diffusers folders under tests/fixtures/models and their expected numbers.

Each folder pairs one U-Net variant with one autoencoder variant, so that every folder is
a whole checkpoint an importer accepts. Usage: make_fixtures.py [NAME ...] (default: all)
"""

import copy
import json
import shutil
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from oracle_common import FIXTURES, codebook_margin, randn, randomise, write_json, write_tensors

DOWN, ATTN_DOWN, RES_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTN_UP, RES_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
ENC, ATTN_ENC = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
DEC, ATTN_DEC = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"

SR_SCHEDULER = dict(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=False)


def unet(channels, down, up, **options):
    """U-Net configuration with the fields every variant states."""
    config = dict(
        sample_size=16, in_channels=6, out_channels=3, block_out_channels=channels, down_block_types=down,
        up_block_types=up, layers_per_block=1, norm_num_groups=4, attention_head_dim=8, norm_eps=1e-5,
    )
    config.update(options)
    return config


def autoencoder(channels, down=None, up=None, **options):
    """Autoencoder configuration; `down` and `up` default to blocks without attention."""
    config = dict(
        block_out_channels=channels, down_block_types=down or [ENC] * len(channels),
        up_block_types=up or [DEC] * len(channels), layers_per_block=1, latent_channels=3, norm_num_groups=4,
        sample_size=32,
    )
    config.update(options)
    return config


def vq(channels, **options):
    return ("vq", autoencoder(channels, **{"num_vq_embeddings": 64, **options}))


def kl(channels, **options):
    return ("kl", autoencoder(channels, **{"latent_channels": 4, **options}))


# name: (what it covers, U-Net, autoencoder, scheduler, seed)
VARIANTS = {
    "sr": (
        "the published LDM-SR in small: three levels, two blocks each, attention last and in the middle; VQ-f4",
        unet([8, 8, 16], [DOWN, DOWN, ATTN_DOWN], [ATTN_UP, UP, UP], layers_per_block=2),
        vq([8, 8, 16], layers_per_block=2),
        SR_SCHEDULER, 34100,
    ),
    "photo": (
        "the bundled photo-x4 in small: 8 latent channels, no attention anywhere, v-prediction with zero terminal "
        "SNR and trailing steps; an AutoencoderKL registered as `vqvae`, as in a super-resolution pipeline",
        unet([4, 6, 8], [DOWN] * 3, [UP] * 3, in_channels=11, out_channels=8, layers_per_block=2, norm_num_groups=2,
             add_attention=False),
        kl([4, 4, 8], latent_channels=8, norm_num_groups=2, mid_block_add_attention=False, scaling_factor=1.0),
        dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
             prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True), 2150,
    ),
    "sr-odd": (
        "6 and 10 channels, no multiple of 4, norms in 2 groups; head dim 5; VQ-f2 with 6 and 10 channels, norms in 2 groups",
        unet([6, 10], [DOWN, ATTN_DOWN], [ATTN_UP, UP], norm_num_groups=2, attention_head_dim=5),
        vq([6, 10], norm_num_groups=2),
        SR_SCHEDULER, 4200,
    ),
    "attention-all": (
        "unconditional, attention at every level; autoencoder with attention blocks at a down and an up level",
        unet([8, 16], [ATTN_DOWN, ATTN_DOWN], [ATTN_UP, ATTN_UP], in_channels=3, attention_head_dim=4),
        vq([4, 8, 12], down=[ENC, ENC, ATTN_ENC], up=[ATTN_DEC, DEC, DEC]),
        dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"), 14400,
    ),
    "scale-shift": (
        "scale_shift time embedding with resnet down- and upsampling (the churches layout; its middle attention "
        "has no norm in diffusers), 4 to 4 channels; KL-f8 with scaling factor",
        unet([8, 16], [RES_DOWN, RES_DOWN], [RES_UP, RES_UP], in_channels=4, out_channels=4,
             resnet_time_scale_shift="scale_shift"),
        kl([4, 4, 8, 8], norm_num_groups=2, scaling_factor=0.18215),
        dict(beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", set_alpha_to_one=False,
             steps_offset=1, clip_sample=False), 500,
    ),
    "scale-shift-attention": (
        "scale_shift with attention blocks that down- and upsample through a resnet, norm of the middle attention "
        "in its own group count; KL-f4 without quant convolutions, with scaling and shift factor",
        unet([4, 8], [ATTN_DOWN, ATTN_DOWN], [ATTN_UP, ATTN_UP], in_channels=4, out_channels=4, norm_num_groups=2,
             attention_head_dim=4, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, downsample_type="resnet",
             upsample_type="resnet"),
        kl([4, 8, 8], use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
             timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False), 4600,
    ),
    "inpaint": (
        "7 to 3 channels (latent, encoded picture, mask), resnet down- and upsampling with plain time embedding; "
        "VQ-f4 without middle attention",
        unet([4, 12], [RES_DOWN, ATTN_DOWN], [ATTN_UP, RES_UP], in_channels=7, attention_head_dim=6),
        vq([4, 8, 8], mid_block_add_attention=False),
        dict(beta_start=0.0015, beta_end=0.0205, beta_schedule="scaled_linear", clip_sample=False), 30700,
    ),
    "semantic": (
        "multipliers 1, 4, 8 of two channels, norms in two groups, attention at two levels; VQ-f8 with attention at its deepest level, embedding "
        "width other than the latent's",
        unet([2, 8, 16], [DOWN, ATTN_DOWN, ATTN_DOWN], [ATTN_UP, ATTN_UP, UP], in_channels=8, out_channels=4,
             norm_num_groups=2, attention_head_dim=4),
        vq([4, 4, 4, 8], norm_num_groups=2, down=[ENC, ENC, ENC, ATTN_ENC], up=[ATTN_DEC, DEC, DEC, DEC], latent_channels=5,
           vq_embed_dim=4),
        dict(beta_start=0.0015, beta_end=0.0205, beta_schedule="scaled_linear", clip_sample=True), 12800,
    ),
    "options": (
        "downsample_padding 0, cosines last, freq_shift 1, mid_block_scale_factor sqrt 2, center_input_sample, "
        "time_embedding_dim, one head over all channels, norm_eps 1e-6, act_fn swish, linear betas, "
        "clip_sample_range 2; KL-f4 without middle attention",
        unet([4, 8], [DOWN, ATTN_DOWN], [ATTN_UP, UP], in_channels=4, out_channels=4, norm_num_groups=2, downsample_padding=0,
             flip_sin_to_cos=False, freq_shift=1, mid_block_scale_factor=1.4142135, center_input_sample=True,
             time_embedding_dim=24, attention_head_dim=None, norm_eps=1e-6, act_fn="swish"),
        kl([4, 8, 8], mid_block_add_attention=False, scaling_factor=1.0, layers_per_block=2),
        dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=True, clip_sample_range=2.0), 4900,
    ),
    "no-attention": (
        "add_attention false in the middle, three blocks a level, padding 0; autoencoder without attention at all, "
        "only its post_quant_conv present",
        unet([4, 12], [DOWN, DOWN], [UP, UP], in_channels=4, out_channels=4, add_attention=False, layers_per_block=3,
             downsample_padding=0),
        kl([4, 8], mid_block_add_attention=False, use_quant_conv=False, layers_per_block=3),
        dict(beta_start=0.0015, beta_end=0.0155, beta_schedule="linear", clip_sample=False,
             prediction_type="sample"), 1000,
    ),
    "no-middle": (
        "no middle block, one level only (no down- or upsampling) of 20 channels in two heads of 10, "
        "trained_betas given; a one-level autoencoder, 7 codes",
        unet([20], [ATTN_DOWN], [ATTN_UP], in_channels=3, mid_block_type=None, attention_head_dim=10,
             time_embedding_dim=24),
        vq([8], num_vq_embeddings=7),
        dict(trained_betas=[float(f"{b:.6g}") for b in np.linspace(0.001, 0.02, 1000)], clip_sample=False), 7100,
    ),
    "old-bin": (
        "as folders of 2022: pytorch .bin, attention tensors under their former names (query, key, value, "
        "proj_attn), configurations with only the fields of that time",
        unet([4, 8], [DOWN, ATTN_DOWN], [ATTN_UP, UP], norm_num_groups=2, attention_head_dim=4),
        vq([4, 8], norm_num_groups=2),
        SR_SCHEDULER, 19200,
    ),
}

# Latent sizes as multiples of the U-Net's downsampling: square, oblong, one row at the deepest level.
# A single pixel there would leave two or four values to a norm group: ill-conditioned in half precision.
CASES = [((4, 4), 999), ((3, 5), 421), ((1, 2), 0)]

OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
# What configurations of the first releases did not have; loaders fill in the defaults.
LATER_UNET = ["add_attention", "attn_norm_num_groups", "class_embed_type", "downsample_type", "dropout",
              "num_class_embeds", "num_train_timesteps", "resnet_time_scale_shift", "time_embedding_dim",
              "upsample_type"]
LATER_VQ = ["force_upcast", "lookup_from_codebook", "mid_block_add_attention", "norm_type", "scaling_factor"]


def latent_channels(model):
    if isinstance(model, VQModel):
        return model.config.vq_embed_dim or model.config.latent_channels
    return model.config.latent_channels


def unet_io(model, seed):
    """Inputs and outputs of the U-Net for every case; prints the size of its output."""
    tensors = {}
    down = 2 ** (len(model.config.block_out_channels) - 1)
    for case, ((h, w), timestep) in enumerate(CASES):
        sample = randn((1, model.config.in_channels, h * down, w * down), seed + case)
        if case == 1:  # off-centre and large, so that norms are not handed a standard normal
            sample = 2.5 * sample + 0.7
        timestep = torch.tensor([timestep], dtype=torch.int64)
        with torch.no_grad():
            output = model(sample, timestep).sample
        tensors[f"{case}.inputs.sample"] = sample
        tensors[f"{case}.inputs.timestep"] = timestep
        tensors[f"{case}.outputs.sample"] = output
    return tensors


def decoder_io(model, seed):
    """Inputs and outputs of the decoder. VQ: through the codebook, and beside it without."""
    tensors = {}
    for case, (h, w) in enumerate([(6, 6), (5, 7), (3, 2)]):
        latents = randn((1, latent_channels(model), h, w), seed + case)
        with torch.no_grad():
            tensors[f"{case}.inputs.latents"] = latents
            tensors[f"{case}.outputs.sample"] = model.decode(latents).sample
            if isinstance(model, VQModel):
                margin = codebook_margin(latents, model.quantize.embedding.weight)
                assert margin > 1e-4, f"decoder case {case}: two codes nearly tie ({margin}); change the seed"
                quantised, _, (_, _, indices) = model.quantize(latents)
                tensors[f"{case}.outputs.quantized"] = quantised
                tensors[f"{case}.outputs.indices"] = indices.reshape(1, h, w).to(torch.int64)
                tensors[f"{case}.outputs.sample_force_not_quantize"] = model.decode(
                    latents, force_not_quantize=True).sample
    return tensors


def encoder_io(model, seed):
    """Inputs and outputs of the encoder; the last case has sides no power of two divides."""
    tensors = {}
    down = 2 ** (len(model.config.block_out_channels) - 1)
    for case, (h, w) in enumerate([(4 * down, 4 * down), (3 * down, 5 * down), (4 * down - 1, 3 * down + 1)]):
        sample = randn((1, model.config.in_channels, h, w), seed + case).clamp(-1, 1)
        with torch.no_grad():
            tensors[f"{case}.inputs.sample"] = sample
            if isinstance(model, VQModel):
                tensors[f"{case}.outputs.latents"] = model.encode(sample).latents
            else:
                tensors[f"{case}.outputs.moments"] = model.encode(sample).latent_dist.parameters
    return tensors


def model_index(unet_model, first_stage, part):
    sr = unet_model.config.in_channels > unet_model.config.out_channels
    return {
        "_class_name": "LDMSuperResolutionPipeline" if sr else "LDMPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        part: ["diffusers", type(first_stage).__name__],
    }


def write_old(model, folder, later):
    """Rewrites a saved component as the first diffusers releases wrote it."""
    state = {}
    for name, tensor in model.state_dict().items():
        for new, old in OLD_ATTENTION.items():
            name = name.replace(new, old) if ".attentions." in name else name
        state[name] = tensor.clone()
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in later}
    config["_diffusers_version"] = "0.2.4"
    write_json(folder / "config.json", config)


def build(name):
    """The models of one variant, with their seeded weights."""
    _, unet_config, (kind, ae_config), scheduler, seed = VARIANTS[name]
    unet_model = randomise(UNet2DModel(**unet_config), seed)
    first_stage = randomise((VQModel if kind == "vq" else AutoencoderKL)(**ae_config), seed + 1)
    return unet_model, first_stage, DDIMScheduler(**scheduler)


def write_variant(name):
    about, _, (kind, _), _, seed = VARIANTS[name]
    unet_model, first_stage, scheduler = build(name)
    folder = FIXTURES / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    part = "vqvae" if kind == "vq" or name == "photo" else "vae"
    unet_model.save_pretrained(folder / "unet")
    first_stage.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    write_json(folder / "model_index.json", model_index(unet_model, first_stage, part))
    io = {
        f"{folder.name}/unet/io.safetensors": unet_io(unet_model, seed + 10),
        f"{folder.name}/{part}/decoder_io.safetensors": decoder_io(first_stage, seed + 20),
        f"{folder.name}/{part}/encoder_io.safetensors": encoder_io(first_stage, seed + 30),
    }
    for path, tensors in io.items():
        write_tensors(FIXTURES / "models" / path, tensors)
    if name == "old-bin":
        write_old(unet_model, folder / "unet", LATER_UNET)
        write_old(first_stage, folder / part, LATER_VQ)
        check_old(folder, unet_model, first_stage)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    spread = {k: f"{v.std():.2f}" for t in io.values() for k, v in t.items()
              if k.startswith("0.outputs.") and v.is_floating_point() and v.numel() > 1}
    vq_model = isinstance(first_stage, VQModel)
    unet_io_, decoder_io_, encoder_io_ = io.values()
    half = [
        half_precision_error(unet_model, unet_io_, lambda m, x: m(x["sample"], x["timestep"]).sample, "sample"),
        half_precision_error(first_stage, decoder_io_, lambda m, x: m.decode(x["latents"]).sample, "sample"),
        half_precision_error(
            first_stage, encoder_io_,
            lambda m, x: m.encode(x["sample"]).latents if vq_model else m.encode(x["sample"]).latent_dist.parameters,
            "latents" if vq_model else "moments"),
    ]
    print(f"{name}: {size / 1024:.0f} KiB, output spread {spread}")
    assert max(map(max, half)) < 1.1e-3, f"{name}: too ill-conditioned for an f16 tolerance ({half}); change the seed"
    print(f"  error of f16 storage: {[[float(f'{e:.1e}') for e in h] for h in half]}")
    return {"name": name, "about": about, "autoencoder": kind, "autoencoder_folder": part, "seed": seed}


def half_precision_error(model, tensors, call, output):
    """Error of each case, relative to its range, with weights and stored maps in f16.

    Every filter, matrix and output of a convolution or block is rounded to f16 and all else stays
    f32: what a correct half-precision runtime does. It shows how much of a tolerance is
    taken by the format itself.
    """
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim >= 2 and "quantize" not in name:
                parameter.copy_(parameter.half().float())
    for module in rounded.modules():
        if isinstance(module, (torch.nn.Conv2d, ResnetBlock2D, Attention)):
            module.register_forward_hook(lambda _m, _i, out: out.half().float())
    errors = []
    case = 0
    while f"{case}.outputs.{output}" in tensors:
        inputs = {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"{case}.inputs.")}
        expected = tensors[f"{case}.outputs.{output}"]
        with torch.no_grad():
            error = (call(rounded, inputs) - expected).abs().max() / (expected.max() - expected.min())
        errors.append(float(error))
        case += 1
    return errors


def check_old(folder, unet_model, first_stage):
    """The rewritten folder must load in diffusers and compute the same."""
    loaded = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=False).eval()
    sample = randn((1, loaded.config.in_channels, 8, 8), 1)
    with torch.no_grad():
        assert torch.equal(loaded(sample, 7).sample, unet_model(sample, 7).sample)
        first = VQModel.from_pretrained(folder / "vqvae", use_safetensors=False).eval()
        latents = randn((1, 3, 4, 4), 2)
        assert torch.equal(first.decode(latents).sample, first_stage.decode(latents).sample)


def main():
    names = sys.argv[1:] or list(VARIANTS)
    rows = [write_variant(name) for name in names]
    if not sys.argv[1:]:
        write_json(FIXTURES / "models" / "index.json", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
