"""What every oracle script shares: where fixtures live, how a model is filled with
seeded weights that hide no bug, and how results are written reproducibly."""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def randomise(model, seed, gain=1.0):
    """Fills every parameter in name order from one generator.

    Matrices and filters get a spread of 1/sqrt(fan-in), so activations keep their
    size through the network. Norm weights are spread round 1 and every bias round 0,
    both wide enough that a weight or bias left out, swapped or read from a neighbour
    moves the output by far more than any tolerance. Only arithmetic of the CPU
    generator is used, so the numbers do not depend on diffusers' own initialisers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "quantize.embedding" in name:
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(gain * noise / fan_in**0.5)
            elif name.endswith("weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def randn(shape, seed):
    """A standard normal tensor of its own CPU generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def write_tensors(path, tensors):
    """Writes a safetensors file with contiguous CPU tensors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, str(path))
    path.chmod(0o644)


def write_json(path, value):
    """Writes JSON with a stable order; a list gets one line for each entry."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, list):
        text = "[\n" + ",\n".join(json.dumps(row, sort_keys=True) for row in value) + "\n]\n"
    else:
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    path.write_text(text)


def codebook_margin(latents, codebook):
    """How far the least clear choice of a code is from flipping, relative to the latent's size.

    `latents` is [1, C, H, W], `codebook` [codes, C]. The gap between the distances to the
    nearest and to the second nearest code changes by at most twice a latent's error, so a
    run with a gap far above rounding is decoded from the same codes by every correct
    implementation.
    """
    flat = latents.permute(0, 2, 3, 1).reshape(-1, codebook.shape[1]).double()
    distance = torch.cdist(flat, codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    best = distance.topk(2, dim=1, largest=False).values
    return float((best[:, 1] - best[:, 0]).min() / flat.abs().max())
