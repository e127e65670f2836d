"""Starting weights that already enlarge: what makes a short training possible.

Every residual block of diffusers' networks is x + f(x) and everything between the blocks is linear, except the last
GroupNorm and SiLU. So with the last convolution of each block at zero a network is linear up to there, and those two can be
made linear too: SiLU(x) - SiLU(-x) = x, so a value kept as the pair (x, -x) passes; and a GroupNorm whose group also holds
the constants (c, -c) with c far above x has mean 0 and a deviation that hardly depends on the picture.

Wired that way the encoder's first three latent channels begin as the picture reduced by 4 (2x2 means twice), the decoder
begins as two bilinear enlargements of those channels, and the U-Net as the v that belongs to x0 = the LR picture at every
timestep. All other channels start at random as usual, and every weight is trained.
"""

import torch

CONSTANT = 24.0


def _quiet_blocks(module):
    """Zeroes the last convolution of every residual block."""
    for m in module.modules():
        if m.__class__.__name__ == "ResnetBlock2D":
            torch.nn.init.zeros_(m.conv2.weight)
            torch.nn.init.zeros_(m.conv2.bias)


def _row(conv, out, taps, bias=0.0):
    """Sets one output channel: `taps` maps an input channel to a kernel (a number stands for the centre tap)."""
    conv.weight[out] = 0
    for channel, k in taps.items():
        k = torch.as_tensor(k, dtype=conv.weight.dtype)
        if k.ndim == 2:
            conv.weight[out, channel] = k
        else:
            conv.weight[out, channel, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = k
    conv.bias[out] = bias


def _paired(conv, source, groups, channels_per_group):
    """Output channels (R, G, B, -R, -G, -B) and constants of `conv`, laid out so that each group of the following norm holds
    matching pairs; `source(c)` gives the taps of colour c. Returns {(c, sign): channel} and the norm's gain."""
    place = {}
    if channels_per_group >= 8:
        for c in range(3):
            place[c, 1], place[c, -1] = c, 3 + c
        constants = [6, 7]
        gain = (2 * CONSTANT ** 2 / channels_per_group) ** 0.5
        used = range(channels_per_group)
    else:
        if channels_per_group < 4 or groups < 3:
            raise SystemExit("the wiring needs groups of at least 4 channels, and 3 groups, before the last convolution")
        for c in range(3):
            place[c, 1], place[c, -1] = c * channels_per_group, c * channels_per_group + 1
        constants = [c * channels_per_group + i for c in range(3) for i in (2, 3)]
        gain = (2 * CONSTANT ** 2 / channels_per_group) ** 0.5
        used = range(3 * channels_per_group)
    for k in used:
        _row(conv, k, {})
    for (c, sign), k in place.items():
        _row(conv, k, {i: sign * torch.as_tensor(t) for i, t in source(c).items()})
    for n, k in enumerate(constants):
        _row(conv, k, {}, CONSTANT if n % 2 == 0 else -CONSTANT)
    return place, gain, constants


@torch.no_grad()
def wire_autoencoder(vae):
    if len(vae.config.block_out_channels) != 3:
        raise SystemExit("the wiring is for f = 4: three block_out_channels")
    e, d, n = vae.encoder, vae.decoder, vae.config.latent_channels
    _quiet_blocks(vae)
    box = torch.tensor([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]])  # the padding is (0, 1, 0, 1)
    tent = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16  # on nearest 2x: bilinear
    for c in range(3):
        _row(e.conv_in, c, {c: 1.0})
        for block in e.down_blocks[:2]:
            for r in block.resnets:
                if r.conv_shortcut is not None:
                    _row(r.conv_shortcut, c, {c: 1.0})
            _row(block.downsamplers[0].conv, c, {c: box})
    wide = e.conv_norm_out
    place, gain, _ = _paired(e.down_blocks[2].resnets[0].conv_shortcut, lambda c: {c: 1.0}, wide.num_groups,
                             wide.num_channels // wide.num_groups)
    for k in place.values():
        wide.weight[k] = gain
    for c in range(3):
        _row(e.conv_out, c, {place[c, 1]: 2.0, place[c, -1]: -2.0})
    for k in range(n, 2 * n):
        _row(e.conv_out, k, {}, -8.0)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        for k in range(conv.weight.shape[0]):
            _row(conv, k, {k: 1.0})
    for c in range(3):
        _row(d.conv_in, c, {c: 0.5})
        _row(d.up_blocks[0].upsamplers[0].conv, c, {c: tent})
        for r in d.up_blocks[0].resnets:
            if r.conv_shortcut is not None:
                _row(r.conv_shortcut, c, {c: 1.0})
    first = d.up_blocks[1].resnets[0].conv_shortcut
    if first is not None:
        for c in range(3):
            _row(first, c, {c: 1.0})
    norm = d.conv_norm_out
    if any(r.conv_shortcut is not None for r in d.up_blocks[2].resnets):
        for c in range(3):
            _row(d.up_blocks[1].upsamplers[0].conv, c, {c: tent})
        place, gain, _ = _paired(d.up_blocks[2].resnets[0].conv_shortcut, lambda c: {c: 1.0}, norm.num_groups,
                                 norm.num_channels // norm.num_groups)
    else:
        place, gain, _ = _paired(d.up_blocks[1].upsamplers[0].conv, lambda c: {c: tent}, norm.num_groups,
                                 norm.num_channels // norm.num_groups)
    for k in place.values():
        norm.weight[k] = gain
    for c in range(3):
        _row(d.conv_out, c, {place[c, 1]: 1.0, place[c, -1]: -1.0})


def _pairs(count, per_group, size):
    """Places `count` values as (x, -x) pairs into groups of `size` channels, `per_group` values to a group, the group's last
    two used channels left to the constants. Returns ([(plus, minus)], [(constant, -constant) of each group])."""
    places, constants = [], []
    for v in range(count):
        g, i = divmod(v, per_group)
        if i == 0:
            constants.append((g * size + 2 * per_group, g * size + 2 * per_group + 1))
        places.append((g * size + 2 * i, g * size + 2 * i + 1))
    return places, constants


def _gain(values, constant, size):
    """Deviation of a group of `size` channels that holds `values` pairs of unit variance and the constants."""
    return ((2 * values + 2 * constant ** 2) / size) ** 0.5


@torch.no_grad()
def wire_unet(unet, signal, slope, offset, most=4.0, shift=0.5, scale=128.0):
    """Wires v = (a / s) z - x0 / s (a, s the square roots of alpha-bar and its complement, both quotients at most `most`)
    with x0 = slope * LR + offset in the first three latent channels and 0 in the others: the estimate a z - s v is then x0
    at every timestep, and no noise is left in it. The gains are made in the last residual block: its time embedding sets
    the constant of each of its second norm's groups, which divides. `slope`, `offset`: three numbers each. `shift` keeps
    the divisor bounded where the gain of z is 0; the shortcut takes it off again."""
    latent, width = unet.config.out_channels, unet.conv_in.weight.shape[0]
    last, big = unet.up_blocks[-1].resnets[-1], 2 * CONSTANT
    hidden = last.conv_shortcut.weight.shape[1] - width  # the skip comes after the hidden channels
    narrow, wide = width // last.norm2.num_groups, (hidden + width) // last.norm1.num_groups
    values = 3 + latent
    per_in, per = wide // 2 - 1, narrow // 2 - 1
    if per < 1 or hidden % wide:
        raise SystemExit("the wiring of the U-Net needs groups of at least 4 channels")
    # 1. conv_in: x0's three colours, then z, as pairs.
    source, constants = _pairs(values, per_in, wide)
    for k in range(len(constants) * wide):
        _row(unet.conv_in, k, {})
    for v, (plus, minus) in enumerate(source):
        taps, bias = ({latent + v: slope[v]}, offset[v]) if v < 3 else ({v - 3: 1.0}, 0.0)
        _row(unet.conv_in, plus, taps, bias)
        _row(unet.conv_in, minus, {c: -t for c, t in taps.items()}, -bias)
    for plus, minus in constants:
        unet.conv_in.bias[plus], unet.conv_in.bias[minus] = big, -big
    # What else reads the constants before a norm starts without them.
    flat = [c for pair in constants for c in pair]
    for block in unet.down_blocks[:1]:
        for r in block.resnets:
            r.conv2.weight[flat] = 0
            r.conv2.bias[flat] = 0
        for d in block.downsamplers or []:
            d.conv.weight[:, flat] = 0
    for r in unet.up_blocks[-1].resnets:
        h = r.conv_shortcut.weight.shape[1] - width
        r.conv_shortcut.weight[:, [h + c for c in flat]] = 0
    # 2. norm1 and SiLU of the last block undo themselves on pairs; conv1 lays the values out by gain.
    for v, (plus, minus) in enumerate(source):
        used = min(per_in, values - v // per_in * per_in)
        for k in (plus, minus):
            last.norm1.weight[hidden + k] = _gain(used, big, wide)
    x_place, x_const = _pairs(3, per, narrow)
    z_place, z_const = _pairs(latent, per, narrow)
    start = len(x_const) * narrow
    z_place, z_const = [(p + start, m + start) for p, m in z_place], [(p + start, m + start) for p, m in z_const]
    end = start + len(z_const) * narrow
    if end > width:
        raise SystemExit("the wiring of the U-Net needs a wider first level")
    for k in range(end):
        _row(last.conv1, k, {})
        last.time_emb_proj.weight[k] = 0
        last.time_emb_proj.bias[k] = 0
    for (plus, minus), (a, b) in zip(source, x_place + z_place):
        _row(last.conv1, a, {hidden + plus: 1.0, hidden + minus: -1.0})
        _row(last.conv1, b, {hidden + plus: -1.0, hidden + minus: 1.0})
        for k in (a, b):
            last.norm2.weight[k] = scale * (2 / narrow) ** 0.5
    # 3. The divisors, as a ridge regression on what the time embedding gives.
    t = torch.arange(1000)
    f = torch.nn.functional.silu(unet.time_embedding(unet.time_proj(t))).double()
    f = torch.cat([f, torch.ones(1000, 1, dtype=torch.float64)], 1)
    a, s = signal.a.cpu().double(), signal.s.cpu().double()
    for wanted, pairs in ((1 / s.clamp_min(1 / most), x_const), ((a / s.clamp_min(1e-6)).clamp_max(most) + shift, z_const)):
        c = scale / wanted
        w = f / c[:, None]  # relative error
        solution = torch.linalg.solve(w.T @ w + 1e-6 * torch.eye(w.shape[1], dtype=w.dtype), w.T @ torch.ones(1000, dtype=w.dtype))
        for plus, minus in pairs:
            for k, sign in ((plus, 1), (minus, -1)):
                last.time_emb_proj.weight[k] = sign * solution[:-1].float()
                last.time_emb_proj.bias[k] = sign * solution[-1].float()
    # 4. conv2 and the shortcut give v as pairs; norm and SiLU undo themselves once more.
    v_place, v_const = _pairs(latent, per, narrow)
    for k in range(len(v_const) * narrow):
        _row(last.conv_shortcut, k, {})
        _row(last.conv2, k, {})
    for c, (plus, minus) in enumerate(v_place):
        zp, zm = source[3 + c]
        for k, sign in ((plus, 1.0), (minus, -1.0)):
            last.conv2.weight[k, z_place[c][0], 1, 1], last.conv2.weight[k, z_place[c][1], 1, 1] = sign, -sign
            if c < 3:
                last.conv2.weight[k, x_place[c][0], 1, 1], last.conv2.weight[k, x_place[c][1], 1, 1] = -sign, sign
            last.conv_shortcut.weight[k, hidden + zp, 0, 0] = -0.5 * sign * shift
            last.conv_shortcut.weight[k, hidden + zm, 0, 0] = 0.5 * sign * shift
    for plus, minus in v_const:
        last.conv_shortcut.bias[plus], last.conv_shortcut.bias[minus] = CONSTANT, -CONSTANT
    for c, (plus, minus) in enumerate(v_place):
        used = min(per, latent - c // per * per)
        for k in (plus, minus):
            unet.conv_norm_out.weight[k] = _gain(used, CONSTANT, narrow)
        _row(unet.conv_out, c, {plus: 1.0, minus: -1.0})


def freeze_gains(unet):
    """The divisors are sums of large terms of both signs: what makes them is left as it is. (Every other block learns its
    own use of the time embedding.)"""
    unet.time_embedding.requires_grad_(False)
    unet.up_blocks[-1].resnets[-1].time_emb_proj.requires_grad_(False)
