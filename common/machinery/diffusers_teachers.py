"""A diffusion model of diffusers as a Denoiser; and back, as folders that diffusers reads.

Read are a UNet2DModel, unconditional or with classes, and the config of a DDPM or DDIM scheduler:
a pipeline's folder (unet/, scheduler/), the model's with scheduler_config.json in it, or such a
repository on the hub. Weights come from safetensors, never from a pickle. diffusers is imported
in functions alone: who does not use it need not have it.
"""
import re
from pathlib import Path

import torch
from torch import nn

from common.diffusion import Denoiser
from common.machinery.foreign import Refused, check_weights, refusing

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
FILES_OF_OURS = (".safetensors", ".pt", ".pkl")
PREDICTIONS = {"x": "sample", "v": "v_prediction", "eps": "epsilon"}  # ours: diffusers'


def is_diffusers(spec):
    """Whether `spec` is a folder, or can be the name of a repository on the hub: owner/model."""
    path = Path(spec)
    name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(spec)) and path.suffix not in FILES_OF_OURS
    return path.is_dir() or bool(name and not path.exists())


class Network(nn.Module):
    """A UNet2DModel as scripts use a network: F(z, t, labels), labels indices or one-hot rows."""

    checkpoint = False  # True: recompute blocks in the backward pass

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        size = unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        self.img_shape = (unet.config.in_channels, *size)
        self.label_dim = unet.config.num_class_embeds or 0

    def forward(self, z, t, labels=None):
        if self.checkpoint and not self.unet.is_gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if not self.label_dim:
            labels = None
        elif labels is not None and labels.ndim == 2:
            labels = labels.argmax(1)
        return self.unet(z, t, labels, return_dict=False)[0]


class DiffusersDenoiser(Denoiser):
    """D(x, sigma) of a UNet2DModel, which sees z = x / sqrt(1 + sigma^2) and a timestep t.

    sigma_t = sqrt(1 - a_t) / sqrt(a_t), a = the scheduler's alphas_cumprod. Between two training
    timesteps t is linear in log sigma, as in diffusers; outside of them it is the nearest. Never
    clipped: clip_sample and thresholding are a sampler's. Around the network all is float64, for
    x - sigma eps cancels. It also multiplies the network's error by sigma, and the last sigma of
    cosine betas is 20,000: there, with eps, take --sigma-max 80.
    """

    arch, kwargs = "diffusers", None

    def __init__(self, unet, scheduler):
        super().__init__(Network(unet), sigma_data=1.0)
        self.scheduler, self.prediction = scheduler, scheduler.config.prediction_type
        self.register_buffer("log_sigmas", sigma_table(scheduler).log(), persistent=False)

    def timestep(self, sigma):
        """The training timestep, 0 ... T - 1 and between; sigma: float64, any shape."""
        table, log_sigma = self.log_sigmas, sigma.log()
        i = torch.searchsorted(table, log_sigma.detach()).clamp(1, len(table) - 1)
        t = i - (table[i] - log_sigma) / (table[i] - table[i - 1])
        return t.clamp(0, len(table) - 1)

    def coefficients(self, sigma):
        """c_skip, c_out, c_in: x0 = x - sigma eps = alpha^2 x - alpha sigma v."""
        alpha = (1 + sigma**2).rsqrt()
        if self.prediction == "sample":
            return torch.zeros_like(sigma), torch.ones_like(sigma), alpha
        if self.prediction == "v_prediction":
            return alpha**2, -alpha * sigma, alpha
        return torch.ones_like(sigma), -sigma, alpha

    def forward(self, x, sigma, labels=None, augment_labels=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in = self.coefficients(sigma)
        z = (c_in * x).to(next(self.model.parameters()).dtype)
        t = self.timestep(sigma).flatten().expand(len(x))  # (B,)
        return (c_skip * x + c_out * self.model(z, t, labels)).to(x.dtype)

    def predict(self, prediction):
        """Take the network's output for 'x', 'v' or 'eps'; it has to be trained for that."""
        self.prediction = PREDICTIONS[prediction]
        self.scheduler = self.scheduler.from_config(
            self.scheduler.config, prediction_type=self.prediction
        )

    def save(self, path):
        """Write a pipeline into the folder `path`, less its suffix: for diffusers and --teacher."""
        from diffusers import DDPMPipeline

        folder = Path(path).with_suffix("")
        with refusing(f"cannot write {folder}"):
            DDPMPipeline(self.net.unet, self.scheduler).save_pretrained(folder)

    def load(self, path):
        """Take the weights of a student of this model that `save` wrote. Raises UsageError."""
        folder = Path(path).with_suffix("")
        with refusing(f"{folder}: not a student of this teacher"):
            found = _read_scheduler(folder).config.prediction_type
            if found != self.prediction:
                raise Refused(f"its prediction_type is {found}: --teacher takes it")
            self.net.unet.load_state_dict(_read_model(folder).state_dict())


def our_name(name):
    """A parameter's name in a residual block or attention of diffusers as common.unet's."""
    name = re.sub(r"(resnets|attentions)\.\d+", "_block", name)
    for theirs, ours in (("conv_shortcut", "skip"), (r"to_[qkv]\b", "qkv"), ("to_out", "proj")):
        name = re.sub(theirs, ours, name)
    return name


def sigma_table(scheduler):
    """sigma of every training timestep, (T,), float64, increasing."""
    a = scheduler.alphas_cumprod.double()
    return (1 - a).sqrt() / a.sqrt()


# ---------------------------------------------------------------------------------- reading

WEIGHTS = "diffusion_pytorch_model.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
FILES = ("*config.json", WEIGHTS, HALF, f"unet/{WEIGHTS}", f"unet/{HALF}")  # wanted of the hub


def sigma_range(spec):
    """The lowest and the highest noise level of a model's training. Raises UsageError."""
    with refusing(f"--teacher {spec}: not a usable model of diffusers"):
        return sigma_table(_read_scheduler(_folder(spec)))[[0, -1]].tolist()


def load_diffusers(spec):
    """A folder or a hub name -> DiffusersDenoiser on the CPU. Raises UsageError."""
    with refusing(f"--teacher {spec}: not a usable model of diffusers"):
        folder = _folder(spec)
        scheduler = _read_scheduler(folder)
        return DiffusersDenoiser(_read_model(folder), scheduler)


def _folder(spec):
    """The folder `spec`, or where the hub's repository of that name was downloaded to."""
    try:
        import diffusers  # noqa: F401
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Refused('this needs diffusers: pip install -e ".[diffusers]"') from None
    if Path(spec).is_dir():
        return Path(spec)
    return Path(snapshot_download(str(spec), allow_patterns=FILES))


def _read_config(kind, folder, subfolder):
    """The config of a class of diffusers, and the folder it is in: the subfolder or `folder`."""
    inner = folder / subfolder
    place = inner if (inner / kind.config_name).exists() else folder
    return kind.load_config(str(place)), place


def _read_scheduler(folder):
    import diffusers

    config, _ = _read_config(diffusers.DDPMScheduler, folder, "scheduler")
    config = {"prediction_type": "epsilon", "beta_schedule": "linear", **config}
    for name, known in {
        "_class_name": SCHEDULERS, "beta_schedule": BETAS, "prediction_type": PREDICTIONS.values()
    }.items():
        if config.get(name) not in known:
            found = f"{name} is {config.get(name)}"
            raise Refused(f"its scheduler's {found}; known are {', '.join(known)}")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    sigmas = sigma_table(scheduler)
    good = len(sigmas) > 1 and sigmas.isfinite().all() and sigmas[0] > 0
    if not (good and (sigmas.diff() > 0).all()):
        raise Refused("its scheduler's noise levels are not finite, above 0 and increasing")
    return scheduler


def _is_size(value):
    sides = value if type(value) in (list, tuple) and len(value) == 2 else (value,)
    return all(type(side) is int and 0 < side <= 4096 for side in sides)


def _read_model(folder):
    import diffusers

    config, place = _read_config(diffusers.UNet2DModel, folder, "unet")
    for good, why in (
        (config.get("_class_name") == "UNet2DModel", f"is a {config.get('_class_name')}"),
        (_is_size(config.get("sample_size")), "has no sample_size of 1 to 4096 pixels"),
        (config.get("in_channels") == config.get("out_channels"), "also predicts its variance"),
        (config.get("time_embedding_type", "positional") == "positional", "embeds no timesteps"),
        (config.get("class_embed_type") is None, "has class_embed_type"),
    ):
        if not good:
            raise Refused(f"the model {why}; a UNet2DModel by save_pretrained is needed")
    logging = diffusers.utils.logging
    logging.set_verbosity(logging.CRITICAL)  # what it would say is in the error
    unet, info = diffusers.UNet2DModel.from_pretrained(
        str(place), use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True,
        variant=None if (place / WEIGHTS).exists() else "fp16", torch_dtype=torch.float32,
    )
    keys = [*info["missing_keys"], *info["unexpected_keys"]]
    if keys:
        raise Refused(f"its weights do not fit its config (missing or unexpected: {keys})")
    check_weights(unet.state_dict())
    return unet
