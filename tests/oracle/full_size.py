"""Writes the full-size LDM-SR (113.6 M + 55.3 M parameters) with seeded random weights.

    full_size.py FOLDER [--compvis] [--onnx]

FOLDER gets: diffusers/ (a pipeline folder), with unet/io.safetensors, vqvae/decoder_io.safetensors and
vqvae/encoder_io.safetensors at 64x64 latents, named as in tests/fixtures; with --compvis
ldm-sr.ckpt (original key names); with --onnx the graphs of unet and decoder, opset 17 static
and dynamic, and the decoder without its codebook at 64x64 and 128x128. About 0.7 GB for each of the three. Nothing of it is ever committed.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel

import make_fixtures
from oracle_common import randn, randomise, write_json, write_tensors

UNET = dict(
    sample_size=64, in_channels=6, out_channels=3, block_out_channels=[160, 320, 320, 640],
    down_block_types=["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    layers_per_block=2, attention_head_dim=32, norm_num_groups=32, norm_eps=1e-5,
)
VQ = dict(
    block_out_channels=[128, 256, 512], down_block_types=["DownEncoderBlock2D"] * 3,
    up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=2, latent_channels=3, num_vq_embeddings=8192,
    sample_size=256,
)
SEED = 7


def build():
    unet = randomise(UNet2DModel(**UNET), SEED)
    vqvae = randomise(VQModel(**VQ), SEED + 1)
    return unet, vqvae, DDIMScheduler(**make_fixtures.SR_SCHEDULER)


def write_diffusers(folder, unet, vqvae, scheduler, latent=64):
    unet.save_pretrained(folder / "unet", max_shard_size="10GB")
    vqvae.save_pretrained(folder / "vqvae", max_shard_size="10GB")
    scheduler.save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", make_fixtures.model_index(unet, vqvae, "vqvae"))
    with torch.no_grad():
        sample, timestep = randn((1, 6, latent, latent), SEED + 2), torch.tensor([421])
        write_tensors(folder / "unet" / "io.safetensors", {
            "0.inputs.sample": sample, "0.inputs.timestep": timestep,
            "0.outputs.sample": unet(sample, timestep).sample})
        latents = randn((1, 3, latent, latent), SEED + 3)
        quantised, _, (_, _, indices) = vqvae.quantize(latents)
        write_tensors(folder / "vqvae" / "decoder_io.safetensors", {
            "0.inputs.latents": latents, "0.outputs.sample": vqvae.decode(latents).sample,
            "0.outputs.quantized": quantised, "0.outputs.indices": indices.reshape(1, latent, latent),
            "0.outputs.sample_force_not_quantize": vqvae.decode(latents, force_not_quantize=True).sample})
        picture = randn((1, 3, 2 * latent, 2 * latent), SEED + 4).clamp(-1, 1)
        write_tensors(folder / "vqvae" / "encoder_io.safetensors", {
            "0.inputs.sample": picture, "0.outputs.latents": vqvae.encode(picture).latents})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compvis", action="store_true", help="also write the original checkpoint layout")
    parser.add_argument("--onnx", action="store_true", help="also write ONNX graphs")
    args = parser.parse_args()
    unet, vqvae, scheduler = build()
    for name, model in (("unet", unet), ("vqvae", vqvae)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    write_diffusers(args.folder / "diffusers", unet, vqvae, scheduler)
    if args.compvis:
        import make_compvis
        state = make_compvis.to_compvis(unet, vqvae)
        torch.save({"state_dict": state, "global_step": 1}, args.folder / "ldm-sr.ckpt")
    if args.onnx:
        import export_onnx
        folder = args.folder / "onnx"
        export_onnx.export_unet(unet, folder / "unet.onnx", latent=(64, 64), dynamic=False)
        export_onnx.export_unet(unet, folder / "unet-dynamic.onnx", latent=(64, 64), dynamic=True)
        export_onnx.export_decoder(vqvae, folder / "decoder.onnx", latent=(64, 64), dynamic=False)
        export_onnx.export_decoder(vqvae, folder / "decoder-dynamic.onnx", latent=(64, 64), dynamic=True)
        # Without the codebook: what every other engine converts, at the two sizes that are benchmarked.
        for side in (64, 128):
            export_onnx.export_decoder(vqvae, folder / f"decoder-plain-{side}.onnx", latent=(side, side),
                                       dynamic=False, quantize=False)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
