"""The precision of network passes: float32, or bfloat16 where the processor multiplies in it.

Weights, losses, solvers' states and metrics are float32 or float64 everywhere. What autocast
rounds are the inputs of convolutions and products inside of the network: to 8 bits.
"""
import contextlib
import time

import torch


def has_bf16(device):
    """Whether the GPU, or the CPU's instructions, multiply in bfloat16: emulation is slow."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return known.get("avx512_bf16", False) or known.get("amx_bf16", False)


def autocast(device, bf16):
    """A context in which convolutions and products run in bfloat16, if `bf16`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


def chosen_precision(config, device, passes, repeats=3):
    """--precision: whether to train in bfloat16, and what was chosen and why, for the log.

    auto, on a GPU: bf16 if it has it. On a CPU that has it: bf16 if `passes()`, a step's forward
    and backward pass, takes a tenth less time in it: the least of `repeats` calls, which alternate
    after one of each that does not count. The random numbers that they draw (dropout) are
    drawn again by the step. Under --smoke nothing is measured.
    """
    if config.precision != "auto":
        return config.precision == "bf16", f"{config.precision}, as asked"
    if not has_bf16(device):
        return False, "fp32, there are no fast products in bfloat16 here"
    if torch.device(device).type == "cuda":
        return True, "bf16"
    if config.smoke:
        return False, "fp32"
    taken = {False: [], True: []}
    for bf16 in (repeats + 1) * [False, True]:
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[]), autocast(device, bf16):
            passes()
        taken[bf16].append(time.perf_counter() - start)
    fp32, bf16 = (min(seconds[1:]) for seconds in taken.values())
    measured = f"forward and backward pass {fp32:.3g} s in fp32, {bf16:.3g} s in bf16"
    faster = bf16 < 0.9 * fp32
    return faster, f"{'bf16' if faster else 'fp32'} ({measured})"


@contextlib.contextmanager
def tf32():
    """Products in TF32 where a GPU has it: for sampling, not for training or features.

    Simulated (20 evaluations, inputs of all convolutions and of attention rounded to 10 bits):
    images move by an RMSE of .0002 on digits and .0003 on MNIST; 19 evaluations instead of 20
    move them by .010 and .005.
    """
    convolution, product = torch.backends.cudnn, torch.backends.cuda.matmul
    convolution.allow_tf32 = product.allow_tf32 = True
    try:
        yield
    finally:
        convolution.allow_tf32 = product.allow_tf32 = False
