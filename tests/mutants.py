"""One-line faults, each of which the tests must notice.

    python tests/mutants.py            # all of them, as a table
    pytest -m slow tests/mutants.py    # the same, as tests

Each is planted in a copy of the repository, never here: there the text `good`, which stands once in `file`, becomes `bad`, and the
tests of `file` must fail.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = {  # (file, its tests): [(good, bad), ...]
    ("common/solvers.py", "test_solvers"): [
        ("x = x + (s[i + 1] - s[i]) * _slope(", "x = x - (s[i + 1] - s[i]) * _slope("),
        ("return (x - denoiser(x, sigma)) / sigma", "return (denoiser(x, sigma) - x) / sigma"),
        ("_slope(denoiser, x + h * slope, net[i + 1])", "_slope(denoiser, x + h * slope, net[i])"),
        ("(net[i] * net[i + 1]).sqrt()", "(net[i] + net[i + 1]) / 2"),
        ("3: (23 / 12, -16 / 12, 5 / 12)", "3: (23 / 12, -16 / 12, 4 / 12)"),
        ("k = min(len(x0s), n - i)", "k = len(x0s)"),
        ("d1 = d1 + (d1 - d1_old) * h1 / (h1 + h2)", "d1 = d1 - (d1 - d1_old) * h1 / (h1 + h2)"),
        ("* (weights * lagrange).sum()", "* (weights * lagrange).mean()"),
        ("*slopes[:order]], [t[i]", "*slopes[:order - 1]], [t[i]"),
        ("r = torch.stack(r)", "r = torch.stack(r).detach()"),
        ('half = (hh if variant == "bh1" else torch.expm1(hh)) / 2', "half = hh / 2"),
        ("x0_new = denoiser(x, net[i + 1])", "x0_new = denoiser(x, s[i + 1])"),
    ],
    ("common/diffusion.py", "test_diffusion"): [
        ("total = (sigma**2 + self.sigma_data**2).sqrt()", "total = sigma + self.sigma_data"),
        ("(sigma.log() / 4)", "(sigma.log() / 2)"),
        ("(1 / rho)) * u) ** rho", "(1 / rho)) * u) ** (rho - 1)"),
        ("return (x0 - x) / expand(sigma, x) ** 2", "return (x - x0) / expand(sigma, x) ** 2"),
        ("return (x - sigma * velocity) / (1 + sigma)", "return (x + sigma * velocity) / (1 + sigma)"),
        ("- d / 2 * (2 * math.pi * variance).log()", "+ d / 2 * (2 * math.pi * variance).log()"),
    ],
    ("common/unet.py", "test_unet"): [
        ("(1 + scale)", "(1 - scale)"),
        ("emb = emb + self.map_augment(", "emb = emb - self.map_augment("),
    ],
    ("common/datasets.py", "test_datasets"): [
        ("return images.float() / 127.5 - 1", "return images.float() / 128 - 1"),
        ("step = self.world * self.batch_size", "step = self.batch_size"),
        ("batch[places] = images[rows]", "batch[:] = images[rows]"),
        ("{p: self.coming.get(p) or self.thread.submit", "{p: self.thread.submit"),
        ("(AHEAD + 1) * step, step)", "step, step)"),
        ("Unpickler(opened, ALLOWED, \"array\"", "pickle.Unpickler(opened"),
        ("allow_pickle=False", "allow_pickle=True"),
        ("number[labels - 1].tolist()", "(labels - 1).tolist()"),
        ("pixels.reshape(-1, 3, k, k)", "pixels.reshape(-1, k, k, 3).transpose(0, 3, 1, 2)"),
        ("[there[n] for n in BATCHES[split]]", "[there[n] for n in sorted(BATCHES[split])]"),
        ("labels.max() > 1000", "labels.max() > 1001"),
        ("{s.st_size} {s.st_mtime_ns}", "{s.st_size}"),
        ('if split in file["serves"]:', "if True:"),
        ("                    old.unlink()\n", "                    pass\n"),
        ("if size < IN_MEMORY:", "if True:"),
        ("(mapped or device.type", "(False or device.type"),
    ],
    ("common/fid.py", "test_fid"): [
        ("- 2 * cross)", "- cross)"),
        ("delta.outer(delta) * (self.n * n / (self.n + n))", "delta.outer(delta) * (n / (self.n + n))"),
        ("self.scatter / (self.n - 1)", "self.scatter / self.n"),
        ("count_include_pad=False", "count_include_pad=True"),
        (".kthvalue(k + 1).values", ".kthvalue(k).values"),
        ("return share(fake, real), share(real, fake)", "return share(real, fake), share(fake, real)"),
        ("(place - left)", "(place - left + 0.5)"),
        ("* 10 // self.n, sums", "// 10, sums"),
        ("(mu.shape, cov.shape) != ((extractor.dim,),", "(mu.shape, cov.shape) != (mu.shape,"),
        ("evenly(load_dataset(name, \"train\", data_dir).images, 50_000)", "load_dataset(name, \"train\", data_dir).images[:50_000]"),
        ("- torch.special.xlogy(p, p).sum(1)", "- torch.special.xlogy(p, p).mean(1)"),
        ("true = x0 if i == 0 else true", "true = x0 if i == 1 or true is None else true"),
        ("scores[label].add(x0, first)", "scores[label].add(x0[:-1], first)"),
        ("labels_for(seeds, label_dim, device)\n            for", "labels_for(range(len(seeds)), label_dim, device)\n            for"),
        ('extractor.name == "inception" and name in EDM_REFERENCES', "name in EDM_REFERENCES"),
    ],
    ("common/training.py", "test_training"): [
        ("list(net.parameters()), 1 - decay)", "list(net.parameters()), decay)"),
        ("torch.Generator().manual_seed(int(seed))", "torch.Generator().manual_seed(int(seeds[0]))"),
        ("os.replace(part, path)", "path.write_bytes(part.read_bytes())"),
        ("weights_only=True", "weights_only=False"),
        ('torch.set_rng_state(self.restored["rng"]["cpu"])', "pass"),
        ("loss_of(*part) * (len(part[0]) / rows)", "loss_of(*part)"),
        ("tensor[start:start + (at_most or rows)]", "tensor[start:rows]"),
        ("max(self.checkpoint_seconds, 20 * cost)", "self.checkpoint_seconds"),
    ],
    ("common/teacher.py", "test_teacher"): [
        ("with torch.random.fork_rng([]):", "if True:"),
        ("(s**2 + denoiser.sigma_data**2) / (s", "(s + denoiser.sigma_data) / (s"),
        ("        optimizer.step()\n", ""),
        ('"optimizer": optimizer, "stream": stream}', '"optimizer": optimizer}'),
        ("        ema_update(ema,", "        ema_update(denoiser,"),
    ],
    ("ld3.py", "test_ld3"): [
        ("q = self.theta1.softmax(0).cumsum(0)", "q = self.theta1.softmax(0).flip(0).cumsum(0)"),
        ("told = levels + self.theta2", "told = levels - self.theta2"),
        ("levels.detach().diff()", "self.theta1.detach().diff()"),
        ("(loss_of(moved, own) < loss)", "(loss_of(moved, own) > loss)"),
        ("return origin + offset * (radius / norm).clamp_max(1)", "return origin + offset * (radius / norm)"),
        ("        optimizer1.step()\n", ""),
        ("            optimizer2.step()\n", "            pass\n"),
        ("vars(self).update(state)", "pass"),
    ],
    ("dode.py", "test_dode"): [
        ("lambdas.append(across / length if", "lambdas.append(-across / length if"),
        ('gain * (slope - state["output"])', 'gain * (state["output"] - slope)'),
        ("slope, gain = slopes[0], stage.weights[0]\n", "slope, gain = slopes[0], h\n"),
        ("slope, gain = sum(w / h * slope for w, slope in zip(stage.weights, slopes)), h", "slope, gain = slopes[0], h"),
        ('ours["x"] = ours["x"] + lambdas[-1] * delta', "pass"),
        ('start = state["start"] if stage.second else x', "start = x"),
        ('*state["slopes"][:3]]', '*state["slopes"][:2]]'),
        ("[(k + 1) * scale for k", "[k * scale + 1 for k"),
        ("scale * len(student) - 1", "scale * len(student)"),
        ("targets += [len(levels) - 1] * count", "targets += [len(levels) - count] * count"),
        ('"ddim" if solver in TWO_EVALUATIONS else solver, levels', "solver, levels"),
        ("10**9 * (config.seed + 1)", "0"),
        ("sum_over_ranks(sums).tolist()", "sums.tolist()"),
        ("            done = target\n", ""),
        ("x / (1 + sigma**2) ** 0.5", "x"),
        ('"slopes": slopes, "output": slope}', '"slopes": slopes, "output": state["output"] if stage.second else slope}'),
        ("torch.allclose(grids[key], levels, rtol=1e-9, atol=0)", "True"),
    ],
    ("distributional.py", "test_distributional"): [
        ("            discriminator.heads.eval()  # spectral norm: no power iteration for further parts of the batch\n", ""),
        ("        discriminator.heads.train()\n", ""),
        ("return sum(F.softplus(-logits).mean() for logits in fake)", "return sum(F.softplus(logits).mean() for logits in fake)"),
        ("in real) + sum(F.softplus(logits)", "in real) + sum(F.softplus(-logits)"),
        ("return gamma / 2 * gradient.square()", "return gamma * gradient.square()"),
        ("x0, create_graph=True)", "x0)"),
        ("c_out = (sigma - self.sigma_min) *", "c_out = sigma *"),
        ("_(block|up|down|in)", "_(block|in)"),
        ("coarser := x)", "x)"),
        ("logits[torch.arange(len(x), device=x.device), labels] if self.num_classes", "logits[:, 0] if self.num_classes"),
        ("steps=5 if config.smoke else None)]", "steps=5 if config.smoke else None).train()]"),
        ("lambda noise, labels: generator(sigma_max * noise,", "lambda noise, labels: generator(noise,"),
        ("        self.optimizer.step()\n", ""),
        ("config.lr_d * correction, 0.99**correction", "config.lr_d * correction"),
        ("config.lr_d * correction,", "config.lr_d,"),
        ("if config.r1_gamma and step and step %", "if config.r1_gamma and step %"),
        ("config.r1_every * r1_penalty(", "r1_penalty("),
        ("ema_update(ema, generator, ema_decay(step * config.batch_size,", "ema_update(ema, generator, ema_decay(step,"),
        ('"optimizer_d": d.optimizer,', ""),
        ("~largest.isfinite()", "largest.isnan()"),
        ("run.loss = torch.where(good, history.losses[step, 0], torch.nan)", "run.loss = history.losses[step, 0]"),
        ("labels = labels if label_dim else None", "labels = None if label_dim else None"),
        ("average_gradients(parameters)", "pass"),
        ("one_step(ema, config.sigma_max)}", "one_step(generator, config.sigma_max)}"),
        ("- before[name]).norm() / before[name].norm()", "- before[name]).norm() / now[name].norm()"),
    ],
    ("progressive.py", "test_progressive"): [
        ("t = torch.linspace(1, 0, 2 * n + 1", "t = torch.linspace(1, 0, n + 1"),
        ("torch.stack([sigmas[:-2:2], sigmas[1::2], sigmas[2::2]], 1)", "torch.stack([sigmas[:-2:2], sigmas[2::2], sigmas[1::2]], 1)"),
        ("return rows[rows[:, 0] > rows[:, 2]]", "return rows"),
        ("((sigma, sigma_mid), (sigma_mid, sigma_end)))", "((sigma, sigma_end), (sigma_mid, sigma_end)))"),
        ("d2 = teacher(r1 * x + (1 - r1) * d1, sigma_mid)", "d2 = teacher(r1 * x + (1 - r1) * d1, sigma)"),
        ("d2 = teacher(r1 * x + (1 - r1) * d1, sigma_mid)", "d2 = teacher(r1 * x - (1 - r1) * d1, sigma_mid)"),
        ("(r2 * (1 - r1) * d1 + (1 - r2) * d2)", "((1 - r1) * d1 + (1 - r2) * d2)"),
        ("(1 / sigma**2).clamp(min=1)", "(1 / sigma**2).clamp(max=1)"),
        ("-sigma / (1 + sigma**2).sqrt(), c_in", "sigma / (1 + sigma**2).sqrt(), c_in"),
        ("return torch.ones_like(sigma), -sigma, c_in", "return torch.ones_like(sigma), sigma, c_in"),
        ("return student.eval().requires_grad_(True)", "return student.train().requires_grad_(True)"),
        ("updates * (2 if n <= 2 else 1)", "updates"),
        ("            halving.load_state_dict(student.state_dict())\n", ""),
        ("            optimizer.state.clear()\n", ""),
        ("config.lr * (1 - (step - begin) / (end - begin))", "config.lr * (1 - step / end)"),
        ("parameter.data.neg_()", "pass"),
        ("x = x0 + expand(sigma, x0) * noise", "x = x0 + noise"),
        ("        optimizer.step()\n", ""),
        ("                student.load_state_dict(ema.state_dict())\n", "                pass\n"),
    ],
    ("cfd.py", "test_cfd"): [
        ("(classifier(target)[0] / tau)", "(classifier(target)[0] * tau)"),
        ("(classifier(target)[0] / tau)", "(classifier(target)[1] / tau)"),
        ("features.log_softmax(1), sharpened", "(features / tau).log_softmax(1), sharpened"),
        ("F.kl_div(features.log_softmax(1), sharpened,", "F.kl_div(sharpened, features.log_softmax(1),"),
        ('reduction="batchmean"', 'reduction="mean"'),
        ("entropy = -(log_p.exp()", "entropy = (log_p.exp()"),
        ("- math.log(len(log_p))", ""),
        ("diversity = (log_mean.exp() * log_mean).sum()", "diversity = -(log_mean.exp() * log_mean).sum()"),
        ("beta * (gamma * entropy + (1 - gamma) * diversity)", "beta * ((1 - gamma) * entropy + gamma * diversity)"),
        ("if n >= config.cfd_from:", "if n > config.cfd_from:"),
        ("            halving.load_state_dict(student.state_dict())\n", ""),
        ("            optimizer.state.clear()\n", ""),
        ("(1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2", "(1 + math.cos(math.pi * step / end)) / 2"),
        ("        optimizer.step()\n", ""),
        ("config.cfd_from if config.pd else config.from_steps", "config.from_steps"),
    ],
    ("common/classifier.py", "test_cfd"): [("((x + 1) / 2 - self.mean) / self.std", "(x - self.mean) / self.std")],
    ("common/edm_pickle.py", "test_edm_pickle"): [
        ("return self.allowed[module, name]\n", "return self.allowed.get((module, name)) or super().find_class(module, name)\n"),
        ('if data[:2] == b"PK":', "if False:"),
        ("map_location=\"cpu\", weights_only=True)", "map_location=\"cpu\", weights_only=False)"),
        ("tuple(stride) != tuple(dense) or", "False or"),
        ("> len(storage):", "> 10**30:"),
        ('if ema.class_name != "EDMPrecond":', "if False:"),
        ('codec not in ("latin1", "latin-1")', 'codec == "latin1"'),
        ('"fourier", "residual"): "ncsnpp"', '"fourier", "residual"): "ddpmpp"'),
        ('given["in_channels"] != given["out_channels"]', "False"),
        ('        raise pickle.UnpicklingError("it refers to objects outside the file")', "        return None"),
    ],
    ("cud.py", "test_cud"): [
        ("features = self.net.forward_features(z.to(dtype), t, labels,", "features = self.net.forward_features(z.to(dtype), t, None,"),
        ("labels if config.conditional else None", "None"),
        ("sample(of_head(labelled(net, labels), head)", "sample(of_head(net, head)"),
        ("t * (1 - 2 * self.phi) + self.phi", "t * (2 * self.phi - 1) + 1 - self.phi"),
        ("(logvar / 2).exp(), gaussian_kl", "logvar.exp(), gaussian_kl"),
        ("(mu**2 + logvar.exp() - 1 - logvar)", "(mu**2 + logvar.exp() - 1 + logvar)"),
        ("(t - i * h).clamp(EPS, 1)", "(t + i * h).clamp(EPS, 1)"),
        ("k2 = v(z - s * k1, 1)", "k2 = v(z, 1)"),
        ("ends = [z - expand(i * h, z) * k", "ends = [z - s * k"),
        ("ends[1] = z - 2 * s * k2", "ends[1] = z - s * k2"),
        ("(k1 + 4 * goals[0] + k3)", "(k1 + 4 * k2 + k3)"),
        ("t >= EPS + heads * h", "t >= EPS + h"),
        ("    with torch.no_grad():\n        k1", "    with torch.enable_grad():\n        k1"),
        ("return weights[0] * catch_up + weights[1] * data", "return weights[1] * catch_up + weights[0] * data"),
        ("(z - v - x0_target)", "(z + v - x0_target)"),
        ("return z - t * velocity(z, t.flatten())", "return z + t * velocity(z, t.flatten())"),
        ('n = steps_for(solver, nfe, ends_in_zero=walk == "t")', 'n = steps_for(solver, nfe, ends_in_zero=walk != "t")'),
        ("return lambda z, t: net(z, t, head)[-1]", "return lambda z, t: net(z, t, head)[0]"),
        ("        self.optimizer.step()\n", ""),
        ("(1 + i) / (10 + i)))", "(1 + i) / (10 + i)) * 0)"),
        ('for name in ("trained", "ema", "optimizer")}', 'for name in ("trained", "optimizer")}'),
        ("            stream.position = 0\n", ""),
        ("            torch.manual_seed(config.seed + 1)\n", "            pass\n"),
        ("        net.eval()\n", ""),
        ("config.exact_rk, quiet) + config.kl_weight * kl", "config.exact_rk, quiet) + kl"),
        ("            if i == config.steps - 1:\n", "            if i == config.steps:\n"),
        ("for own in (student.net, student.ema) if first", "for own in (student.net,) if first"),
        ("targets[rows, i // config.distill_steps]", "targets[rows, i % 3]"),
        ("+ 10**9 * (config.seed + 1)  #", "  #"),
    ],
}
MUTANTS = [(file, tests, good, bad) for (file, tests), faults in FAULTS.items() for good, bad in faults]


def survives(mutant):
    """Plant `mutant` in a copy; True if its tests still pass there."""
    file, tests, good, bad = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fewstep"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "*.egg-info", "__pycache__", ".venv"))
        source = (copy / file).read_text()
        assert source.count(good) == 1, f"{file}: {good!r} stands there {source.count(good)} times, not once"
        (copy / file).write_text(source.replace(good, bad))
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-n", "0", f"tests/{tests}.py"]
        result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode in (0, 1), result.stdout + result.stderr  # anything else is not a test that failed
        return result.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{Path(m[0]).stem}: {m[3].strip()[:50] or 'deleted ' + m[2].strip()}")
def test_mutant_is_killed(mutant):
    assert not survives(mutant)


if __name__ == "__main__":
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = 0
        for (file, _, good, bad), survived in zip(MUTANTS, pool.map(survives, MUTANTS)):
            alive += survived
            verdict = "SURVIVED" if survived else "killed"
            print(f"{verdict:9s} {file:20s} {good.strip()[:55]}  ->  {bad.strip()[:55] or '(deleted)'}", flush=True)
    print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} killed")
    sys.exit(alive > 0)
