"""One U-Net family: DDPM++, NCSN++ and ADM are three settings of it.

EDM's three networks (Karras et al. 2022, arXiv 2206.00364, appendix F) come from two code
bases: Song et al. 2021 (arXiv 2011.13456: DDPM++, NCSN++) and Dhariwal & Nichol 2021
(arXiv 2105.05233: ADM). Both embed the noise level in a vector, push the output of every
encoder block on a stack, pop it in the decoder, and end in a head. `SONG` and `ADM` below
list the differences.

Names and shapes of parameters and buffers equal those of the public EDM checkpoints, so
`load_state_dict(strict=True)` takes them (without their leading `model.`).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Init:
    """Weights uniform with variance gain^2 / fan.

    fan is fan_in (He et al. 2015) or the mean of fan_in and fan_out (Glorot & Bengio 2010).
    """
    fan_mean: bool
    gain: float = 1.0
    bias_gain: float = 0.0

    def __call__(self, c_out, c_in, *kernel):
        """Weight (c_out, c_in, *kernel) and bias (c_out,)."""
        fan = ((c_in + c_out) / 2 if self.fan_mean else c_in) * math.prod(kernel)
        bound = self.gain * math.sqrt(3 / fan)
        bias_bound = self.bias_gain * math.sqrt(3 / fan)
        weight = torch.empty(c_out, c_in, *kernel).uniform_(-bound, bound)
        bias = torch.empty(c_out).uniform_(-bias_bound, bias_bound)
        return nn.Parameter(weight), nn.Parameter(bias)


@dataclass(frozen=True)
class Family:
    """The design choices in which the two code bases differ."""
    skip_scale: float  # factor of every residual sum
    norm_eps: float  # of every GroupNorm
    scale_shift: bool  # the embedding scales and shifts norm1's output; else: added before it
    head_channels: int | None  # per attention head (narrower: no attention); None: one head
    resample_proj: bool  # resampling blocks: 1x1 convolution on every skip; else: if c changes
    attend_all: bool  # attention in all decoder blocks of a resolution; else: in the last
    late_labels: bool  # class labels enter after the embedding's MLP; else: before it
    ddpm_embedding: bool  # [cos, sin] of 10000^(-i/n); else: [sin, cos] of 10000^(-i/(n-1))
    out_head: bool  # head named out_*; the first convolution is as wide as level 0
    init: Init
    init_attn: Init  # query, key, value
    init_zero: Init  # last layer of residual branches and of the net: blocks start as identities


SONG = Family(
    skip_scale=math.sqrt(0.5),
    norm_eps=1e-6,
    scale_shift=False,
    head_channels=None,
    resample_proj=True,
    attend_all=False,
    late_labels=False,
    ddpm_embedding=False,
    out_head=False,
    init=Init(True),
    init_attn=Init(True, math.sqrt(0.2)),
    init_zero=Init(True, 1e-5),
)
ADM = Family(
    skip_scale=1.0,
    norm_eps=1e-5,
    scale_shift=True,
    head_channels=64,
    resample_proj=False,
    attend_all=True,
    late_labels=True,
    ddpm_embedding=True,
    out_head=True,
    init=Init(False, math.sqrt(1 / 3), math.sqrt(1 / 3)),
    init_attn=Init(False, math.sqrt(1 / 3), math.sqrt(1 / 3)),
    init_zero=Init(False, 0.0),
)


# --------------------------------------------------------------------------------- layers

def not_bfloat16_on_cpu(layer, x):
    """layer(x), in float32 where x is bfloat16 on a CPU; the result has x's dtype.

    Measured under autocast: group norm in channels_last takes six times as long in bfloat16
    there, resampling upwards ten times.
    """
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return layer(x)
    with torch.autocast("cpu", enabled=False):
        return layer(x.float()).bfloat16()


def linear(c_in, c_out, init, bias=True):
    """(B, c_in) -> (B, c_out)."""
    layer = nn.Linear(c_in, c_out, bias=bias, device="meta")  # no random draws by torch
    layer.weight, default_bias = init(c_out, c_in)
    layer.bias = default_bias if bias else None
    return layer


class Conv2d(nn.Module):
    """Convolution after resampling by `up` or `down`, the taps of a 1-d filter:

        (B, c_in, H, W) -> (B, c_out, H', W'), H' = 2H, H/2 or H

    kernel 0: resampling alone. `fused` (NCSN++'s auxiliary path): convolution first, and one
    padding for both.
    """

    def __init__(self, c_in, c_out, kernel, init, up=None, down=None, fused=False):
        super().__init__()
        self.weight, self.bias = init(c_out, c_in, kernel, kernel) if kernel else (None, None)
        self.up, self.fused = bool(up), fused
        taps = torch.tensor(up or down or (), dtype=torch.float32)
        square = torch.outer(taps, taps) / taps.sum() ** 2 if up or down else None
        self.register_buffer("resample_filter", None if square is None else square[None, None])
        pad = max(len(taps) - 1, 0) // 2
        self.pad, self.resample_pad = (kernel // 2 + pad, 0) if fused else (kernel // 2, pad)

    def resample(self, x):
        c = x.shape[1]
        f = self.resample_filter.expand(c, 1, -1, -1)  # (C, 1, taps, taps): per channel
        options = dict(stride=2, padding=self.resample_pad, groups=c)
        if self.up:  # 4: one pixel becomes 2 x 2
            return F.conv_transpose2d(x, 4 * f, **options)  # (B, C, 2H, 2W)
        return F.conv2d(x, f, **options)  # (B, C, H/2, W/2)

    def forward(self, x):
        if self.resample_filter is not None and not self.fused:
            x = not_bfloat16_on_cpu(self.resample, x)
        if self.weight is not None:
            x = F.conv2d(x, self.weight, self.bias, padding=self.pad)  # (B, c_out, H', W')
        return not_bfloat16_on_cpu(self.resample, x) if self.fused else x


class GroupNorm(nn.GroupNorm):
    def forward(self, x):
        return not_bfloat16_on_cpu(super().forward, x)


def group_norm(channels, eps):
    """GroupNorm with at most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(f"model_channels * channel_mult make a layer of {channels} channels, "
                         f"which GroupNorm cannot divide into min(32, {channels} // 4) = "
                         f"{groups} groups; with a multiple of 32 as model_channels it "
                         "always can")
    return GroupNorm(groups, channels, eps=eps)


class Block(nn.Module):
    """skip(x) + conv1(silu(norm1(conv0(silu(norm0(x))), emb))), then self-attention if asked.

        (B, c_in, H, W), emb (B, c_emb) -> (B, c_out, H', W')

    Each sum is multiplied by the family's skip_scale. Sums are made in place: a convolution's
    output is not needed again, and new memory costs more than the addition.
    """

    def __init__(self, c_in, c_out, c_emb, family, dropout, attention=False, **resample):
        super().__init__()
        self.family, self.dropout = family, dropout
        self.norm0 = group_norm(c_in, family.norm_eps)
        self.conv0 = Conv2d(c_in, c_out, 3, family.init, **resample)
        self.affine = linear(c_emb, c_out * (2 if family.scale_shift else 1), family.init)
        self.norm1 = group_norm(c_out, family.norm_eps)
        self.conv1 = Conv2d(c_out, c_out, 3, family.init_zero)
        self.skip = None
        if c_in != c_out or resample:
            kernel = 1 if family.resample_proj or c_in != c_out else 0
            self.skip = Conv2d(c_in, c_out, kernel, family.init, **resample)
        self.heads = 0
        if attention:
            self.heads = c_out // family.head_channels if family.head_channels else 1
        if self.heads:
            if c_out % self.heads:
                raise ValueError(f"model_channels * channel_mult make a layer of {c_out} "
                                 f"channels, which {self.heads} attention heads cannot share; "
                                 f"with a multiple of {family.head_channels} as "
                                 "model_channels they always can")
            self.norm2 = group_norm(c_out, family.norm_eps)
            self.qkv = Conv2d(c_out, 3 * c_out, 1, family.init_attn)
            self.proj = Conv2d(c_out, c_out, 1, family.init_zero)

    def attend(self, x):
        """Self-attention over all pixels: (B, C, H, W) -> (B, C, H, W)."""
        qkv = self.qkv(self.norm2(x))  # (B, 3C, H, W), its channels ordered as (head, c, q|k|v)
        qkv = qkv.reshape(x.shape[0], self.heads, -1, 3, x.shape[2] * x.shape[3])
        qkv = qkv.permute(3, 0, 1, 4, 2)  # (3, B, heads, HW, C/heads)
        qkv = qkv.contiguous()  # fused kernels need C/heads dense
        attention = lambda qkv: F.scaled_dot_product_attention(*qkv.unbind(0))
        y = not_bfloat16_on_cpu(attention, qkv)  # (B, heads, HW, C/heads)
        return self.proj(y.transpose(2, 3).reshape(x.shape))

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))  # (B, c_out, H', W')
        p = self.affine(emb)[:, :, None, None]  # (B, c_out or 2 c_out, 1, 1)
        if self.family.scale_shift:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu((self.norm1(h) * (1 + scale)).add_(shift))
        else:
            h = F.silu(self.norm1(h.add_(p)))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = h.add_(x if self.skip is None else self.skip(x)).mul_(self.family.skip_scale)
        return self.attend(x).add_(x).mul_(self.family.skip_scale) if self.heads else x


class NoiseEmbedding(nn.Module):
    """[sin, cos](frequency_i c_noise): (B,) -> (B, c).

    Frequencies are geometric, or random and then part of the checkpoint.
    """

    def __init__(self, channels, random, ddpm):
        super().__init__()
        self.channels, self.ddpm = channels, ddpm
        freqs = 16 * torch.randn(channels // 2) if random else None
        self.register_buffer("freqs", freqs)  # cycles per unit of c_noise

    def forward(self, c_noise):
        if self.freqs is not None:  # hundreds of cycles: the order of products is EDM's
            angle = c_noise[:, None] * (2 * math.pi * self.freqs)  # (B, c/2)
        else:
            n = self.channels // 2
            i = torch.arange(n, device=c_noise.device, dtype=c_noise.dtype)
            freqs = 10000 ** (-i / (n if self.ddpm else n - 1))
            angle = c_noise[:, None] * freqs  # (B, c/2)
        parts = [angle.cos(), angle.sin()] if self.ddpm else [angle.sin(), angle.cos()]
        return torch.cat(parts, dim=1)


# -------------------------------------------------------------------------------- network

class UNet(nn.Module):
    """The raw network F(x, c_noise) of EDM's Eq. 7; `Denoiser` makes D(x, sigma) of it.

    Options have EDM's names; the defaults are DDPM++ for CIFAR-10.

    label_dim       number of classes, 0: unconditional
    augment_dim     number of augmentation parameters, 0: none
    model_channels  unit of all widths: levels (channel_mult), embedding (channel_mult_emb)
                    and noise features (channel_mult_noise)
    label_dropout   probability that a label is dropped in training
    patch           side of the squares of pixels that become the channels of one place: 2 makes
                    12 channels at 16x16 of 3 at 32x32, a quarter of the places to compute
                    (1: the EDM checkpoints). attn_resolutions count places, not pixels

    ValueError: a resolution that cannot be halved often enough, widths that GroupNorm or the
    heads cannot divide, an unknown type. Fused attention has no second derivative: for that,
    run the forward pass under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    """

    checkpoint = False  # True: recompute every block in the backward pass

    def __init__(self, img_resolution, img_channels, label_dim=0, augment_dim=0, *,
                 family=SONG, model_channels=128, channel_mult=(2, 2, 2), channel_mult_emb=4,
                 num_blocks=4, attn_resolutions=(16,), dropout=0.13, label_dropout=0.0,
                 embedding_type="positional", channel_mult_noise=1,
                 encoder_type="standard", resample_filter=(1, 1), patch=1):
        super().__init__()
        if embedding_type not in ("positional", "fourier"):
            raise ValueError(f"embedding_type={embedding_type!r} is unknown; "
                             "use 'positional' or 'fourier'")
        if encoder_type not in ("standard", "residual"):
            raise ValueError(f"encoder_type={encoder_type!r} is unknown; "
                             "use 'standard' or 'residual'")
        halvings = len(channel_mult) - 1
        if img_resolution % (patch * 2**halvings):
            raise ValueError(f"img_resolution={img_resolution} cannot be halved {halvings} "
                             f"times; use a multiple of {patch * 2**halvings}, or fewer levels "
                             f"than len(channel_mult)={len(channel_mult)}")
        c_noise = model_channels * channel_mult_noise
        c_emb = model_channels * channel_mult_emb
        if c_noise % 2:
            raise ValueError(f"model_channels={model_channels} is odd, but sines and cosines "
                             "come in pairs; use an even number")
        self.img_resolution, self.img_channels, self.patch = img_resolution, img_channels, patch
        self.out_channels = img_channels * patch**2  # of the head, before pixels are put back
        self.label_dim, self.augment_dim = label_dim, augment_dim
        self.family, self.label_dropout = family, label_dropout

        # Layers are made in the order of the checkpoints' parameters.
        random = embedding_type == "fourier"
        self.map_noise = NoiseEmbedding(c_noise, random, family.ddpm_embedding)
        if label_dim and not family.late_labels:
            self.map_label = linear(label_dim, c_noise, family.init)
        if augment_dim:
            init = family.init_zero if family.late_labels else family.init
            self.map_augment = linear(augment_dim, c_noise, init, bias=False)
        self.map_layer0 = linear(c_noise, c_emb, family.init)
        self.map_layer1 = linear(c_emb, c_emb, family.init)
        if label_dim and family.late_labels:
            self.map_label = linear(label_dim, c_emb, family.init, bias=False)
            nn.init.normal_(self.map_label.weight)  # unit normal class embeddings

        def block(c_in, c_out, **options):
            return Block(c_in, c_out, c_emb, family, dropout, **options)

        levels = []
        for i, mult in enumerate(channel_mult):
            levels.append((img_resolution // patch >> i, model_channels * mult))
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c = levels[0][1] if family.out_head else model_channels
        c_aux = self.out_channels
        skips = []  # channels of the encoder's outputs
        for level, (res, width) in enumerate(levels):
            name = f"{res}x{res}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(c_aux, c, 3, family.init)
            else:
                self.enc[f"{name}_down"] = block(c, c, down=resample_filter)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        c_aux, c, 3, family.init, down=resample_filter, fused=True)
                    c_aux = c
            skips.append(c)
            for i in range(num_blocks):
                attention = res in attn_resolutions
                self.enc[f"{name}_block{i}"] = block(c, width, attention=attention)
                c = width
                skips.append(c)
        for level, (res, width) in reversed(list(enumerate(levels))):
            name = f"{res}x{res}"
            if level == len(levels) - 1:
                self.dec[f"{name}_in0"] = block(c, c, attention=True)
                self.dec[f"{name}_in1"] = block(c, c)
            else:
                self.dec[f"{name}_up"] = block(c, c, up=resample_filter)
            for i in range(num_blocks + 1):
                last = i == num_blocks
                attention = res in attn_resolutions and (family.attend_all or last)
                self.dec[f"{name}_block{i}"] = block(c + skips.pop(), width, attention=attention)
                c = width
        self.feature_channels = c  # of forward_features
        norm = group_norm(c, family.norm_eps)
        conv = Conv2d(c, self.out_channels, 3, family.init_zero)
        if family.out_head:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{name}_aux_norm"], self.dec[f"{name}_aux_conv"] = norm, conv

    @property
    def img_shape(self):
        """(C, H, W) of one image."""
        return self.img_channels, self.img_resolution, self.img_resolution

    def one_hot(self, labels):
        """Labels as `forward` takes them, but not None, as rows (B or 1, label_dim)."""
        if labels.ndim < 2 and not labels.is_floating_point():
            labels = F.one_hot(labels.long(), self.label_dim).reshape(-1, self.label_dim)
        if labels.ndim != 2 or labels.shape[1] != self.label_dim:
            raise ValueError(f"labels of shape {tuple(labels.shape)}; use one-hot "
                             f"(B, {self.label_dim}) or integer class indices (B,)")
        return labels

    def embed(self, batch, c_noise, labels=None, augment_labels=None):
        """Noise level and conditions as one vector per image: (B, c_emb)."""
        dtype = self.map_layer0.weight.dtype
        emb = self.map_noise(c_noise.to(dtype).reshape(-1).expand(batch))  # (B, c_noise)
        if self.label_dim:
            if labels is None:
                labels = emb.new_zeros(batch, self.label_dim)
            labels = self.one_hot(labels).to(dtype)  # (B or 1, label_dim)
            if self.training and self.label_dropout:
                kept = torch.rand(batch, 1, device=emb.device) >= self.label_dropout
                labels = labels * kept
            if not self.family.late_labels:
                emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = emb.new_zeros(batch, self.augment_dim)
            emb = emb + self.map_augment(augment_labels.to(dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))  # (B, c_emb)
        if self.label_dim and self.family.late_labels:
            emb = emb + self.map_label(labels)
        return F.silu(emb)

    def forward_features(self, x, c_noise, labels=None, augment_labels=None, balance=None):
        """The input of the head: (B, model_channels * channel_mult[0], H / patch, W / patch)."""
        emb = self.embed(x.shape[0], c_noise, labels, augment_labels)
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):  # NCSN++ adds the downsampled input
                aux = (x + layer(aux)) * math.sqrt(0.5)
                x = skips[-1] = aux
                continue
            x = self.run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)  # (B, width, H / 2^level, W / 2^level)
        for name, layer in self.dec.items():
            if not isinstance(layer, Block):  # the head
                break
            if "_block" in name:
                skip = skips.pop()
                if balance is not None:
                    share = balance.to(x.dtype)[:, None, None, None]
                    x, skip = 2 * share * x, 2 * (1 - share) * skip
                x = torch.cat([x, skip], dim=1)
            x = self.run(layer, x, emb)
        return x

    def run(self, block, x, emb):
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def head(self, features):
        """`forward_features` -> (B, img_channels, H, W)."""
        if self.family.out_head:
            norm, conv = self.out_norm, self.out_conv
        else:
            norm, conv = list(self.dec.values())[-2:]
        return self.pixels(conv(F.silu(norm(features))))

    def pixels(self, x):
        """(B, out_channels, H / patch, W / patch) -> (B, img_channels, H, W)."""
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x

    def forward(self, x, c_noise, labels=None, augment_labels=None, balance=None):
        """F(x, c_noise): (B, C, H, W) -> (B, C, H, W).

        c_noise         (B,) or one number for all
        labels          class indices (B,) or one-hot (B, label_dim); None: zeros
        augment_labels  (B, augment_dim); None: zeros
        balance         (B,) in 0 ... 1: weights 2 balance for the decoder's features and
                        2 (1 - balance) for the encoder's skips; None: both 1

        Conditions that the network was not built for are ignored.
        """
        features = self.forward_features(x, c_noise, labels, augment_labels, balance)
        return self.head(features)


def ddpmpp(img_resolution, img_channels, label_dim=0, augment_dim=0, **overrides):
    """DDPM++ as EDM trained it on CIFAR-10 ("VP"). `overrides`: options of `UNet`.

    An unknown option raises TypeError, here and below.
    """
    return UNet(img_resolution, img_channels, label_dim, augment_dim, **overrides)


def ncsnpp(img_resolution, img_channels, label_dim=0, augment_dim=0, **overrides):
    """NCSN++ as EDM trained it on CIFAR-10 ("VE").

    Random frequencies, a bilinear filter, a residual encoder.
    """
    options = dict(
        embedding_type="fourier",
        channel_mult_noise=2,
        encoder_type="residual",
        resample_filter=(1, 3, 3, 1),
    )
    return UNet(img_resolution, img_channels, label_dim, augment_dim, **(options | overrides))


def adm(img_resolution, img_channels, label_dim=0, augment_dim=0, **overrides):
    """ADM as EDM trained it on ImageNet-64.

    Scale-and-shift blocks, heads of 64 channels, attention at three resolutions.
    """
    options = dict(
        family=ADM,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
    )
    return UNet(img_resolution, img_channels, label_dim, augment_dim, **(options | overrides))
