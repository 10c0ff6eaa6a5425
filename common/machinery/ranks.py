"""torchrun: every rank draws the same random numbers and takes its slice of them."""
import atexit
import contextlib
import os

import torch
import torch.distributed as dist


def rank_and_world(device=None):
    """(rank, number of ranks). Under torchrun the first call, with a device, joins the group.

    A WORLD_SIZE without a RANK is left over in the shell.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if device.type != "cuda":  # nccl would wait for ranks that wait for this one
            atexit.register(leave_group)
    return dist.get_rank(), dist.get_world_size()


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of(n):
    """This rank's slice of 0 ... n - 1; sizes differ by at most 1, rank 0 has the most."""
    rank, world = rank_and_world()
    return slice(-(-n * rank // world), -(-n * (rank + 1) // world))


def sum_over_ranks(tensor):
    """The sum of every rank's `tensor`, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(tensor):
    """`tensor` of rank 0, in place."""
    if rank_and_world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather_rows(rows):
    """All ranks' rows (n_r, ...), in the order of the ranks. The n_r may differ."""
    if rank_and_world()[1] == 1:
        return rows
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts).to(rows.device)


def gather_with_gradient(rows):
    """All ranks' rows (n, ...), n the same on each; for a loss that is no mean over images.

    Each rank computes the whole loss. Its gradient is multiplied by the number of ranks here, so
    that the average of `average_gradients` is the gradient of one rank that has all rows.
    """
    rank, world = rank_and_world()
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank] = rows + (world - 1) * (rows - rows.detach())
    return torch.cat(parts)


def average_gradients(parameters):
    """Every gradient <- its mean over the ranks, in one all-reduce."""
    if rank_and_world()[1] > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


@contextlib.contextmanager
def masks_of_this_rank(device, *key):
    """Dropout masks that differ from rank to rank, and with the integers `key`: seed, step, ...

    The generators that all ranks share do not move: noise does not depend on how many there are.
    """
    rank, world = rank_and_world()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, enabled=world > 1):
        if world > 1:  # a hash of integers is the same in every process
            torch.manual_seed(hash((rank, *key)) % 2**62)
        yield
