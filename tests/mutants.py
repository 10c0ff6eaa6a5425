"""One-line faults, each of which the tests must notice.

    python tests/mutants.py            # all of them, as a table
    pytest -m slow tests/mutants.py    # the same, as tests

Each is planted in a copy of the repository, never here. There the text `good`, which stands once
in `file`, becomes `bad`, and the tests of `file` must fail.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAULTS = {  # (file, its tests): [(good, bad), ...]
    ("common/solvers.py", "test_solvers"): [
        ("(s[i] - s[i + 1]) / net[i])", "(s[i + 1] - s[i]) / net[i])"),
        ("(x - denoiser(x, sigma)).div_(sigma)", "(denoiser(x, sigma) - x).div_(sigma)"),
        ("x.addcmul_(weight, term)", "x.addcmul_(weight.detach(), term)"),
        ("_slope(denoiser, x_euler, net[i + 1])", "_slope(denoiser, x_euler, net[i])"),
        (".add_(slope), h / 2", ".sub_(slope), h / 2"),
        ("(net[i] * net[i + 1]).sqrt()", "(net[i] + net[i + 1]) / 2"),
        ("3: (23 / 12, -16 / 12, 5 / 12)", "3: (23 / 12, -16 / 12, 4 / 12)"),
        ("k = min(len(x0s), n - i)", "k = len(x0s)"),
        ("d1 = d1 + (d1 - d1_old) * h1 / (h1 + h2)", "d1 = d1 - (d1 - d1_old) * h1 / (h1 + h2)"),
        ("weights = weights - phi1 / 2 * d1", "weights = weights + phi1 / 2 * d1"),
        ("lagrange = half * weights", "lagrange = weights"),
        ("*slopes[:order]]", "*slopes[:order - 1]]"),
        ("(b2 - r[m] * b1) / (r[j] - r[m])", "(b2 + r[m] * b1) / (r[j] - r[m])"),
        ("(b2 - r[m] * b1) / (r[j] - r[m])", "(b2 - r[m] * b1) / (r[j] - r[m]).detach()"),
        ("1 - ratio - sum(parts)", "1 - ratio + sum(parts)"),
        ('half = (hh if variant == "bh1" else torch.expm1(hh)) / 2', "half = hh / 2"),
        ("x0_new, r = denoiser(x_next, net[i + 1])", "x0_new, r = denoiser(x_next, s[i + 1])"),
        ("[*x0s[:k], x0_new]", "[*x0s, x0_new]"),
    ],
    ("common/diffusion.py", "test_diffusion"): [
        ("total = (sigma**2 + self.sigma_data**2).sqrt()", "total = sigma + self.sigma_data"),
        ("clamp(min=tiny).log() / 4)", "clamp(min=tiny).log() / 2)"),
        ("sigma.clamp(min=tiny)", "sigma"),
        ("(low + (high - low) * u) ** rho", "(low + (high - low) * u) ** (rho - 1)"),
        ("return (x0 - x) / expand(sigma, x) ** 2", "return (x - x0) / expand(sigma, x) ** 2"),
        (" (x - sigma * velocity) / (1 + sigma)", " (x + sigma * velocity) / (1 + sigma)"),
        ("- d / 2 * (2 * math.pi * variance).log()", "+ d / 2 * (2 * math.pi * variance).log()"),
        ("torch.Generator().manual_seed(int(seed", "torch.Generator().manual_seed(int(seeds[0]"),
    ],
    ("notebooks/compare.py", "test_compare"): [
        ("per_image = 4 if", "per_image = 3 if"),
        ('+ 2 * int(c["rk"][0]) - 1', '+ 2 * int(c["rk"][0]) + 1'),
        ("cost += 16 * c[", "cost += 14 * c["),
        ("cost += (2 if stage <= 2 else 1)", "cost += (2 if stage < 2 else 1)"),
        ('first = c["cfd_from"]', "pass"),
        ('if config.teacher and method != "cud":', "if config.teacher:"),
        ('return metrics if command == shlex.join(arguments)', "return metrics if command"),
        ('arguments.append("--resume")', "pass"),
    ],
    ("common/unet.py", "test_unet"): [
        ("(1 + scale)", "(1 - scale)"),
        ("emb = emb + self.map_augment(", "emb = emb - self.map_augment("),
        ("y = not_bfloat16_on_cpu(attention, qkv)", "y = attention(qkv)"),
        ('    with torch.autocast("cpu", enabled=False):\n', "    if True:\n"),
    ],
    ("common/datasets.py", "test_datasets"): [
        ("return images.float() / 127.5 - 1", "return images.float() / 128 - 1"),
        ('return "folder" if as_files', 'return name if as_files'),
        ("self.position += self.batch_size", "self.position += self.part"),
        ("batch[places] = images[rows]", "batch[:] = images[rows]"),
        ("if position != self.position:  # the", "if True:  # the"),
        ("self._fetch, self.position + step)", "self._fetch, self.position)"),
        ("(mapped or device.type", "(False or device.type"),
        ("position + self.rank * self.part, self.part)", "position, self.part)"),
        ("if batch_size % world:", "if False:"),
        ("ranks or rank_and_world()", "ranks or (0, 1)"),
    ],
    ("common/machinery/folders.py", "test_datasets"): [
        ("order = int if", "order = str if"),
        ("if _top(name, start) not in folders:", "if False:"),
        ("image = ImageOps.exif_transpose(image)\n", "pass\n"),
        ("(levels + 128) // 257", "levels // 256 * 0 + levels % 256"),
        ('"RGBA", image.size, "white"', '"RGBA", image.size, "black"'),
        ("if top.lower() in SPLITS[split]), None)", "if top.lower() == split), None)"),
        ("self.classes if counts else []", "self.classes"),
        ('part == "__MACOSX" or part.startswith(".")', 'part == "__MACOSX"'),
        ("if top and not more and", "if"),
        ("followlinks=True", "followlinks=False"),
        ("if os.path.realpath(link) in map(", "if os.path.realpath(folder) in map("),
        ("{s.st_size} {s.st_mtime_ns * times}", "{s.st_size}"),
        ("{s.st_size} {s.st_mtime_ns * times}", "{s.st_mtime_ns * times}"),
        ("                        old.unlink()\n", "                        pass\n"),
        ("path.stat().st_size == size", "True"),
        ('self.by_edm = "dataset.json" in found', "self.by_edm = True"),
    ],
    ("notebooks/imagenet_to_png.py", "test_datasets"): [
        ("ids[label]", 'f"{label:04d}"'),
        ("reshape(-1, 3, side, side).transpose(0, 2, 3, 1)", "reshape(-1, side, side, 3)"),
    ],
    ("common/classifier.py", "test_classifier"): [
        ("torch.default_generator.manual_seed(seed)", "torch.manual_seed(seed)"),
        (" and has_bf16(device)", ""),
        ('{"pool": True} if pool', '{"pool": False} if pool'),
        ("x = F.max_pool2d(x, self.pool) if self.pool > 1 else x", "pass"),
        ("with torch.random.fork_rng(devices=[]):", "if True:"),
        (", ranks=(0, 1))", ")"),
        ("(F.interpolate(x, **self.resize) + 1) / 2", "F.interpolate(x, **self.resize)"),
    ],
    ("common/fid.py", "test_fid"): [
        ("- 2 * cross", "- cross"),
        ("root.T @ cov2 @ root", "root @ cov2 @ root.T"),
        ("    if failed:\n", "    if False:\n"),
        ("delta.outer(delta) * (self.n * n / (self.n + n", "delta.outer(delta) * (n / (self.n + n"),
        ("self.scatter / (self.n - 1)", "self.scatter / self.n"),
        (".kthvalue(k + 1).values", ".kthvalue(k).values"),
        (" share(fake, real), share(real, fake)", " share(real, fake), share(fake, real)"),
        ("* 10 // self.n", "// 10"),
        ("(mu.shape, cov.shape) != ((extractor.dim,),", "(mu.shape, cov.shape) != (mu.shape,"),
        (
            'evenly(load_dataset(name, "train", data_dir).images, 50_000)',
            'load_dataset(name, "train", data_dir).images[:50_000]',
        ),
        ("- torch.special.xlogy(p, p).sum(1)", "- torch.special.xlogy(p, p).mean(1)"),
        ("target = x0 if i == 0 else target", "target = x0 if i <= 1 else target"),
        (
            "order = [*first_ones, *(label for label in labelled if label not in first_ones)]",
            "order = list(labelled)",
        ),
        ("errors = dict(zip(order, sum", "errors = dict(zip(labelled, sum"),
        (" - (k.trace() if x is y and i == j else 0)", ""),
        ("- 2 * between / (m * n)", "- between / (m * n)"),
        ("(blocks - 1) ** 0.5", "blocks**0.5"),
        ("if not all(a.isfinite().all() for a in moments):", "if False:"),
        ("if not features.isfinite().all():", "if False:"),
        ("if not len(features):", "if False:"),
        ("np.linalg.eigvalsh(cov).min() < -1e-3 * size", "False"),
        (".cumsum(0), place, right=True", ", place, right=True"),
        ("to_uint8(x0)[: config.save_images - first]", "to_uint8(x0)"),
        ('require(not sees, "fd"', 'require(True, "fd"'),
        ("if len(images) < 2:", "if False:"),
        ("if len(images) < 4:", "if False:"),
        ("part / (2 * root) if root", "part / root if root"),
        ("metrics[label].add(x0, first)", "metrics[label].add(x0[:-1], first)"),
        ("labels_for(seeds, net.label_dim, ", "labels_for(range(len(seeds)), net.label_dim, "),
        ("if not x0.isfinite().all():", "if False:"),
        ("                with tf32():\n", "                if True:\n"),
        ("last = evaluator.unseen or evaluator", "last = evaluator"),
        ("pure_noise.add(noise, first)", "pure_noise.add(0 * noise, first)"),
        ('if evaluator.against == "train" and space.name in', "if space.name in"),
        ('= extractor.name == "inception" and name in EDM_REFERENCES', "= name in EDM_REFERENCES"),
    ],
    ("common/machinery/inception.py", "test_fid"): [
        ("count_include_pad=False", "count_include_pad=True"),
        ("(place - left)", "(place - left + 0.5)"),
        ('hexdigest()[:8] != "6726825d"', 'hexdigest()[:8] == ""'),
        ("features @ self.classes.T", "features @ self.classes.T + 1"),
    ],
    ("common/teacher.py", "test_teacher"): [
        ("(s**2 + denoiser.sigma_data**2) / (s", "(s + denoiser.sigma_data) / (s"),
        ("if takes_shipped(dataset, device):", "if shipped:"),
        ("        optimizer.step()\n", ""),
        ("optimizer=optimizer, stream=stream)", "optimizer=optimizer)"),
        ("        ema_update(ema, denoiser", "        ema_update(denoiser, ema"),
        (".mul(1.2).sub(1.2)", ".mul(1.2).add(1.2)"),
        (".mul(1.2).sub(1.2)", ".sub(1.2)"),
        ("list(net.parameters()), 1 - decay)", "list(net.parameters()), decay)"),
        ("min(halflife, images_seen * ramp)", "min(halflife, images_seen)"),
        ("min(warmed_up, 1 - step / config.steps)", "min(warmed_up, 1)"),
        ("while sizes[-1] % 2 == 0 and sizes[-1] > 8:", "while sizes[-1] > 8:"),
        ('about["flow"] = {"phi": denoiser.phi}', "pass"),
    ],
    ("common/machinery/options.py", "test_options"): [
        ('"low": ("at least", operator.ge)', '"low": ("at least", operator.gt)'),
        ('else {"low": 0}', "else {}"),
        ('else {"high": 2**40}', "else {}"),
        ("        cli.running = False\n", "        pass\n"),
        ('"high": ("at most", operator.le)', '"high": ("at most", operator.lt)'),
        ('"above": ("above", operator.gt)', '"above": ("above", operator.ge)'),
        ('"below": ("below", operator.lt)', '"below": ("below", operator.le)'),
        ('if part is not None and "choices" in meta:', "if False:"),
        ("(smoke if config.smoke else {})", "{}"),
        ("if getattr(config, name) is None:", "if True:"),
        ("else tuple(dict.fromkeys(value))", "else value"),
        ("tuple(v) if isinstance(v, list) else v", "v"),
        ("allow_abbrev=False", "allow_abbrev=True"),
        ("require(config.eval_n >= 4, ", "require(config.eval_n >= 2, "),
        ("sys.exit(130)", "sys.exit(1)"),
        ("< MANY_IMAGES:", "<= MANY_IMAGES:"),
        ('device == "auto" and torch.cuda', "torch.cuda"),
    ],
    ("common/machinery/run.py", "test_run"): [
        ('torch.set_rng_state(rng["cpu"])', "pass"),
        ("loss_fn(*part) * (len(part[0]) / rows)", "loss_fn(*part)"),
        ("b[start : start + at_most]", "b[start:rows]"),
        ("max(self.checkpoint_seconds, 20 * cost)", "self.checkpoint_seconds"),
        ("torch.where(torch.stack(norms).isfinite().all(), total, math.nan)", "total"),
        ("if self.loss is not None and (due or show):", "if self.loss is not None and show:"),
        ("if not math.isfinite(value):", "if math.isinf(value):"),
        ("max(begin, self.done)", "begin"),
        ("yield step - begin", "yield step"),
        ("self.done = step + 1", "self.done = step"),
        ("                due |= stopping\n", ""),
        ("        self.calls += 1\n", ""),
        ("self.config.seed, self.done, self.calls)", "self.config.seed, self.calls)"),
        ('if state.get("half_way") and not finished:', "if False:"),
        ('if state.get("half_way") and not finished:', 'if state.get("half_way"):'),
        ("if finished and saved != self._options() and", "if False and"),
        ("if finished and saved != self._options() and", "if finished and"),
        ("or cli.running) and not self.config.smoke", "or cli.running)"),
        ("self.done < self.planned or cli.running", "self.done < self.planned"),
        ("self.lock.acquire(timeout=0)", "pass"),
        ("if saved == self._options() or", "if True or"),
        ("                log.write(b", "                (b"),
        ("if in_main else ()", "if True else ()"),
        ("return shlex.join([", 'return " ".join(['),
        ('f"folder-{name}" if name in DATASETS else name', "name"),
        ("        torch.manual_seed(config.seed)\n", ""),
        ("        optimizer.zero_grad(set_to_none=False)\n", ""),
        ("loss.backward(inputs=parameters)", "loss.backward()"),
        ("                with cast:\n", "                if True:\n"),
        ("                part.load_state_dict(saved[name])\n", "                pass\n"),
        ("if saved != value:", "if False:"),
        ("(n, *shape, device=self.device)[share_of(n)]", "(n, *shape, device=self.device)"),
        ('self.done = self.restored["step"]', "pass"),
    ],
    ("common/precision.py", "test_fid"): [
        ("        convolution.allow_tf32 = product.allow_tf32 = False\n", "        pass\n"),
    ],
    ("common/precision.py", "test_precision"): [
        ("    if not has_bf16(device):\n", "    if False:\n"),
        ("min(seconds[1:])", "min(seconds)"),
        ("with torch.random.fork_rng(devices=[]), autocast", "with autocast"),
        ("0.9 * fp32", "fp32"),
    ],
    ("common/machinery/run.py", "test_precision"): [
        ('self.restored and self.restored.get("bf16")', "None"),
        ("if b is None else b[:at_most]", "if b is None else b"),
    ],
    ("common/machinery/ranks.py", "test_ranks"): [
        ("hash((rank, *key))", "hash(key)"),
        ("hash((rank, *key))", "hash((rank,))"),
        ("(hash((rank, *key)) % 2**62)", "(int(torch.randint(2**62, ())) + rank)"),
        ("with torch.random.fork_rng(devices, enabled=world > 1):", "if True:"),
        ('[device] if device.type == "cuda" else []', "[]"),
        ("slice(-(-n * rank // world),", "slice(n * rank // world,"),
    ],
    ("common/machinery/files.py", "test_files"): [
        ("os.replace(part, path)", "path.write_bytes(part.read_bytes())"),
        ("weights_only=True", "weights_only=False"),
        ("lock.acquire(timeout=PATIENCE)", "pass"),
        ("part.unlink(missing_ok=True)", "pass"),
        ("if file.tell() < size:", "if False:"),
    ],
    ("common/machinery/files.py", "test_foreign_files"): [
        ("        check_weights(weights)\n", ""),
        ('if about.get("kind") != kind:', "if False:"),
        ("        file_size(path)\n        with safetensors", "        with safetensors"),
        ("if not known or", "if"),
        ("sum(entry.file_size for entry in entries) > most", "False"),
    ],
    ("common/machinery/schedule.py", "test_foreign_files"): [
        ("if not sigmas_net.isfinite().all():", "if False:"),
        ("check_grid(sigmas, f\"--schedule {path}: `sigmas`\")", "sigmas"),
    ],
    ("common/machinery/pickles.py", "test_foreign_pickles"): [
        ("if self.left < 0:", "if False:"),
        ("if code not in OPCODES:", "if False:"),
        ("if text not in self.allowed and text not in SPELLING:", "if False:"),
        ("        check_key(self.stack[-2])\n", ""),
        ("            check_key(key)\n", "            pass\n"),
        ("if type(target) is Record and target.state is None:", "if type(target) is Record:"),
        ("elif type(target) is not dict:", "elif False:"),
        ("if id(text) not in self.encoded:", "if True:"),
        ("load_empty_set = pickle._Unpickler.load_empty_list", "pass"),
    ],
    ("common/machinery/foreign.py", "test_foreign_pickles"): [
        ("c if c.isprintable() else", "c if True else"),
        ("if not stat.S_ISREG(status.st_mode):", "if False:"),
        ("if not 0 < size <= most:", "if False:"),
    ],
    ("common/machinery/foreign.py", "test_foreign_files"): [
        ("if not file.peek(len(begins)).startswith(begins):", "if False:"),
        ("type(v) in NUMBER and abs(v) <= MOST_NUMBER", "abs(v) <= MOST_NUMBER"),
        ("type(v) in NUMBER and abs(v) <= MOST_NUMBER", "type(v) in NUMBER"),
        ("or len(items) > MOST_ITEMS", ""),
        ("if len(taps) % 2 or", "if"),
        ("if blocks > len(shapes):", "if False:"),
        ("if needed.get(name) != shapes.get(name):", "if False:"),
        ("if not weight.float().isfinite().all():", "if weight.float().isinf().all():"),
        ("with torch.random.fork_rng([]), _WithoutMemory():", "with _WithoutMemory():"),
    ],
    ("common/machinery/pickles.py", "test_edm_pickle"): [
        ("if PERSISTENT not in self.allowed:", "if False:"),
        ('codec not in ("latin1", "latin-1")', 'codec == "latin1"'),
        ("not args:\n            self.append({})", "not args:\n            self.append([])"),
    ],
    ("common/machinery/edm_pickle.py", "test_edm_pickle"): [
        ('if data[:2] == b"PK":', "if False:"),
        ('if class_name != "EDMPrecond":', "if False:"),
        ('"fourier", "residual"): "ncsnpp"', '"fourier", "residual"): "ddpmpp"'),
        ("if channels != out:", "if False:"),
        ("[width * s for s in stride]", "[width for s in stride]"),
        ('array.copy("C")', "array.T.copy().T"),
    ],
    ("common/machinery/edm_pickle.py", "test_foreign_pickles"): [
        ("if id(module) in seen:", "if False:"),
        ("0 <= n < 2**40 for n in numbers", "-(2**40) < n < 2**40 for n in numbers"),
        ("if len(seen) > 2 * MOST_WEIGHTS:", "if False:"),
        ("        check_weights(weights)\n", ""),
        ('system.get("little_endian") is not True', "False"),
    ],
    ("common/machinery/public_teachers.py", "test_foreign_pickles"): [("-reader{READER}", "")],
    ("common/machinery/folders.py", "test_foreign_files"): [
        ("if size > most or", "if"),
        ("entry and entry.compress_type not in PACKINGS:", "False:"),
        ("formats=FORMATS", "formats=None"),
        ("LARGEST, MOST_IMAGE, MOST_SCANS = 1024,", "LARGEST, MOST_IMAGE, MOST_SCANS = 4096,"),
        ('if data.count(b"\\xff\\xda") > MOST_SCANS:', "if False:"),
        ("width == height <= LARGEST", "width == height"),
        ("if labels and not 0 <= min(", "if labels and not -1 <= min("),
    ],
    ("common/fid.py", "test_foreign_files"): [
        ("np.allclose(cov, cov.T, 1e-3, 1e-6 * size)", "True"),
    ],
    ("common/machinery/diffusers_teachers.py", "test_diffusers"): [
        ("return alpha**2, -alpha * sigma, alpha", "return alpha**2, alpha * sigma, alpha"),
        ("return torch.ones_like(sigma), -sigma, alpha", "return torch.ones_like(sigma), sigma, 1"),
        ("alpha = (1 + sigma**2).rsqrt()", "alpha = 1 / (1 + sigma)"),
        ("t = i - (table[i] - log_sigma)", "t = i + (table[i] - log_sigma)"),
        ("log_sigma = self.log_sigmas, sigma.log()", "log_sigma = self.log_sigmas.exp(), sigma"),
        ("return t.clamp(0, len(table) - 1)", "return t"),
        ("            labels = labels.argmax(1)\n", "            labels = labels.argmin(1)\n"),
        ("            self.unet.enable_gradient_checkpointing()\n", "            pass\n"),
        ("    if keys:\n", "    if False:\n"),
        ("    check_weights(unet.state_dict())\n", ""),
        ("if found != self.prediction:", "if False:"),
        ("and path.suffix not in", "and path.suffix in"),
        ('("conv_shortcut", "skip"), ', ""),
    ],
    ("notebooks/to_diffusers.py", "test_diffusers"): [
        ('{"solver_type": variant}', "{}"),
        ('"zero") == "zero"', '"zero") != "zero"'),
        ('final_sigmas_type="zero", ', ""),
        ("solver_order=order", "solver_order=2"),
        ("(1 + sigmas[0].item() ** -2) ** -0.5", "1.0"),
        ("        self.set_begin_index(0)\n", ""),
        ("(not late, ", "(True, "),
    ],
    ("common/diffusion.py", "test_teacher"): [
        ("t * (1 - 2 * self.phi) + self.phi", "t * (2 * self.phi - 1) + 1 - self.phi"),
        ("x0_from_velocity(v.to(x.dtype), x,", "x0_from_velocity(-v.to(x.dtype), x,"),
    ],
    ("common/machinery/schedule.py", "test_dode"): [
        ("require(torch.equal(sigmas, sigmas_net),", "require(True,"),
        ("check(has == needs,", "check(True,"),
        ("int((lambdas.abs() <= MOST).sum())", "len(lambdas)"),
        ("one_line(message, most=1000)", "message"),
    ],
    ("common/machinery/options.py", "test_diffusers"): [
        ("known = sigma_range(teacher) if", "known = EDM_RANGE if"),
    ],
    ("progressive.py", "test_diffusers"): [("student.predict(prediction)", "pass")],
    ("distributional.py", "test_diffusers"): [
        ("our_name(name))", "name)"),
    ],
    ("common/classifier.py", "test_ld3"): [("F.normalize(a, dim=1)", "F.normalize(a, dim=2)")],
    ("ld3.py", "test_ld3"): [
        ("q = self.theta1.softmax(0).cumsum(0)", "q = self.theta1.softmax(0).flip(0).cumsum(0)"),
        ("inner = levels[1:-1] + self", "inner = levels[1:-1] - self"),
        ("return levels.detach().diff()", "return self.theta1.detach().diff()"),
        ("better = loss_fn(moved, i) < losses", "better = loss_fn(moved, i) > losses"),
        (" origin + offset * (radius / norm).clamp_max(1)", " origin + offset * (radius / norm)"),
        ("        optimizer1.step()\n", ""),
        ("            optimizer2.step()\n", "            pass\n"),
        ("optimizer2=optimizer2, state=state)", "optimizer2=optimizer2)"),
        ("torch.randperm(config.train_n, generator=rng)", "torch.arange(config.train_n)"),
        ("        grid.zero_grad()\n", ""),
        ("state.moved.zero_()", "pass"),
        ("+ step // in_round)", "+ step)"),
        ("if state.no_progress == 5 and", "if state.no_progress == 2 and"),
        ("max(0.8 * group[\"lr\"], lowest)", "max(1.0 * group[\"lr\"], lowest)"),
        ("                grid.load_state_dict(state.best)\n                ", "                "),
        ("if state.moved == 0:", "if state.moved > 0:"),
        ("nn.utils.clip_grad_norm_(theta, 1.0", "nn.utils.clip_grad_norm_(grid.parameters(), 1.0"),
        ("            nn.utils.clip_grad_norm_(theta, 1.0)", "            pass"),
        ("config.lr1, momentum=0.9)", "config.lr1)"),
        ("config.lr2 / config.nfe)", "config.lr2 / config.n)"),
        ("numel() / config.nfe**2", "numel() / config.n**2"),
        ("lr_latent=config.lr_latent / config.nfe,", "lr_latent=config.lr_latent / config.n,"),
        ("(1 + math.cos(", "(1 - math.cos("),
        ('optimizer2.param_groups[0]["lr"] = decay * config.lr2', "pass"),
        ("start = min(start_losses", "start = max(start_losses"),
        ("        return config.starts[start]\n", "        pass\n"),
        ("kind: (sigmas, sigmas) for kind", "kind: (sigmas, _) for kind"),
        ('if self.solver == "unipc" else {}', 'if self.solver == "" else {}'),
        ("x, sigmas, sigmas_net=sigmas_net)\n\n    samplers", "x, sigmas)\n\n    samplers"),
    ],
    ("dode.py", "test_dode"): [
        ("lambdas.append(inner(delta, error)", "lambdas.append(-inner(delta, error)"),
        ("gain * (d_i - point.output)", "gain * (point.output - d_i)"),
        ("gain = stage.weights[0] if stage.second else", "gain ="),
        ("slopes[0] if stage.second else change / gain", "slopes[0]"),
        ("-gain / stage.sigma", "gain / stage.sigma"),
        ("student_point._replace(x=student_point.x + lambdas[-1] * delta)", "student_point"),
        ("start = point.start if stage.second else x", "start = x"),
        ("*point.slopes[:3])", "*point.slopes[:2])"),
        ("(start + change, start, ", "(start + change, start, point.output if stage.second else "),
        ("x=point.x + lam * point.delta", "x=point.x - lam * point.delta"),
        ("        x = x + lam * delta\n", "        x = x + delta\n"),
        ("delta = (1 - to / sigma) * (d_i - d_before)", "delta = (1 - to / sigma) * d_i"),
        ("errors[kind] = inner(error, error)", "errors[kind] = -inner(error, error)"),
        ("x / (1 + sigma**2) ** 0.5", "x"),
        ("k - 1 if second else k", "k"),
        ("stages[-2:] = [Stage(", "stages[-1:] = [Stage("),
        ("to, scale * count)", "to, scale)"),
        ("levels.index(stage.to) for", "levels.index(stage.to) - 1 for"),
        ('"ddim" if solver in TWO_EVALUATIONS else solver  # as', "solver  # as"),
        ("        done = target\n", ""),
        ("return sum_over_ranks((a * b).sum()).item()", "return (a * b).sum().item()"),
        ("10**9 * (config.seed + 1)", "0"),
        ("seeds = seeds[share_of(config.fit_n)]", "pass"),
        ("labels_for(seed, ", "labels_for(seeds[: len(images)], "),
        ("        x = x.cpu()\n", "        pass\n"),
        ("run.resume(state=state)", "pass"),
        ("sigmas) if config.schedule else", "sigmas) if False else"),
        ("stages, lambdas, config.output)", "stages, lambdas)"),
        ("sampler(ipndm, sigmas, order=2)", "sampler(ipndm, sigmas)"),
        ("sampler(dpmpp, sigmas, order=2)", "sampler(dpmpp, sigmas)"),
        ('"teacher", 2 * (config.reference_nfe // 2)]', '"teacher", config.reference_nfe + 2]'),
    ],
    ("common/diffusion.py", "test_progressive"): [
        ("t = torch.linspace(1, 0, 2 * n + 1", "t = torch.linspace(1, 0, n + 1"),
        ("[sigmas[:-2:2], sigmas[1::2], sigmas[2::2", "[sigmas[:-2:2], sigmas[2::2], sigmas[1::2"),
        ("return rows[rows[:, 0] > rows[:, 2]]", "return rows"),
    ],
    ("common/baselines.py", "test_progressive"): [
        ("2 * updates if n <= 2 else updates", "updates"),
    ],
    ("common/baselines.py", "test_cfd"): [
        ('sigma_grid("edm", steps - 1', 'sigma_grid("edm", steps'),
        ('"ddim-edm", n] = ddim(teacher, edm)', '"ddim-edm", n] = ddim(teacher, sigmas)'),
        ("reference_sampler(teacher, config.sigma_max)", "reference_sampler(teacher)"),
        ("config.dataset, n, sigma_max", "config.dataset, n + 1, sigma_max"),
        ("samplers[name, nfe] = ddim(student, sigmas)", "samplers[name, nfe] = ddim(teacher, edm)"),
    ],
    ("progressive.py", "test_progressive"): [
        ("r1 = expand(sigma_mid, x)", "r1 = expand(sigma_end, x)"),
        ("= teacher(r1 * x + (1 - r1) * d1, sigma_mid", "= teacher(r1 * x + (1 - r1) * d1, sigma"),
        ("teacher(r1 * x + (1 - r1) * d1, sigma_mid", "teacher(r1 * x - (1 - r1) * d1, sigma_mid"),
        ("(r2 * (1 - r1) * d1 + (1 - r2) * d2)", "((1 - r1) * d1 + (1 - r2) * d2)"),
        ("(1 / sigma**2).clamp(min=1)", "(1 / sigma**2).clamp(max=1)"),
        ("-sigma / (1 + sigma**2).sqrt(), c_in", "sigma / (1 + sigma**2).sqrt(), c_in"),
        ("return torch.ones_like(sigma), -sigma, ", "return torch.ones_like(sigma), sigma, "),
        ("return student.eval().requires_grad_(True", "return student.train().requires_grad_(True"),
        ("                stage_teacher.load_state_dict(student.state_dict())\n", ""),
        ("                optimizer.state.clear()\n", ""),
        ("lr * (1 - step / updates)", "lr * (1 - step / run.planned)"),
        ("parameter.data.neg_()", "pass"),
        ("x = x0 + expand(sigma, x0) * noise", "x = x0 + noise"),
        ("            optimizer.step()\n", ""),
        ("*batch, mixed_precision=False)", "*batch)"),
        ("if step == updates - 1 and run.rank == 0:", "if step == 0 and run.rank == 0:"),
        ("(FIRST_STAGE if n == config.from_steps else 1)", "1"),
        ("target = teacher(x, sigma, labels)", "target = stage_teacher(x, sigma, labels)"),
        ("student=student, teacher=stage_teacher,", "student=student,"),
        ("            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)\n", ""),
        ("sigma, config.weight)", "sigma)"),
        ("config.seed, config.flip)", "config.seed)"),
    ],
    ("cfd.py", "test_cfd"): [
        ("(classifier(target)[0] / tau)", "(classifier(target)[0] * tau)"),
        ("(classifier(target)[0] / tau)", "(classifier(target)[1] / tau)"),
        ("features.log_softmax(1), sharpened", "(features / tau).log_softmax(1), sharpened"),
        ("kl_div(features.log_softmax(1), sharpened", "kl_div(sharpened, features.log_softmax(1)"),
        ('reduction="batchmean"', 'reduction="mean"'),
        ("entropy = -(log_p.exp()", "entropy = (log_p.exp()"),
        ("- math.log(len(log_p))", ""),
        ("diversity = (log_mean.exp() * log_mean).", "diversity = -(log_mean.exp() * log_mean)."),
        ("gamma * entropy + (1 - gamma) * diversity", "(1 - gamma) * entropy + gamma * diversity"),
        ("weight = (1 / sigma**2).clamp(min=1)", "weight = (1 / sigma**2).clamp(max=1)"),
        ("(r2 * (1 - r1) * d1 + (1 - r2) * d2)", "((1 - r2) * d2 + r2 * d1 - r1 * r2 * d1)"),
        ("if n >= config.cfd_from:", "if n > config.cfd_from:"),
        ("                stage_teacher.load_state_dict(student.state_dict())\n", ""),
        ("                optimizer.state.clear()\n", ""),
        ("math.cos(math.pi * step / updates)) / 2", "math.cos(math.pi * step / run.planned)) / 2"),
        ("            optimizer.step()\n", ""),
        ("*batch, mixed_precision=False)", "*batch)"),
        ("config.cfd_from if config.pd else config.from_steps", "config.from_steps"),
        ('name = "pd" if n >= config.cfd_from', 'name = "pd" if n > config.cfd_from'),
        ("if config.pd and n <= config.cfd_from:", "if config.pd and n < config.cfd_from:"),
        ("config.beta, config.gamma)", "config.gamma, config.beta)"),
        ("            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)\n", ""),
        ("log_p = gather_with_gradient(log_p)", "pass"),
        ("config.seed, config.flip)", "config.seed)"),
        ("x = x0 + expand(sigma, x0) * noise", "x = x0 + noise"),
    ],
    ("cud.py", "test_cud"): [
        ("net.forward_features(z.float(), t, labels,", "net.forward_features(z.float(), t, None,"),
        ("        v = partial(net, labels=labels)\n", "        v = net\n"),
        ("return sample(partial(net, labels=labels), noise,", "return sample(net, noise,"),
        ("t * (1 - 2 * self.phi) + self.phi", "t * (2 * self.phi - 1) + 1 - self.phi"),
        ("z1 = mu + noise * (logvar / 2).exp()", "z1 = mu + noise * logvar.exp()"),
        ("(mu**2 + logvar.exp() - 1 - logvar)", "(mu**2 + logvar.exp() - 1 + logvar)"),
        ("(t - i * h).clamp(EPS, 1)", "(t + i * h).clamp(EPS, 1)"),
        ("k2 = v(z - s * k1, 1)", "k2 = v(z, 1)"),
        ("v(z - expand(i * h, z) * k, i)", "v(z - s * k, i)"),
        ("(expand(7 * h, z) * k1 + s * k2) / 4", "(expand(7 * h, z) * k2 + s * k1) / 4"),
        (" = 5 / 12 * k1 + 2 / 3 * k2 - 1 / 12 * k3", " = 5 / 12 * k1 + 2 / 3 * k2 + 1 / 12 * k3"),
        ("t >= EPS + heads * h", "t >= EPS + h"),
        ("with torch.no_grad():  # the weights", "with torch.enable_grad():  # the weights"),
        ("return w * catch_up + (2 - w) * flow", "return (2 - w) * catch_up + w * flow"),
        ("for v in predictions)", "for v in predictions[:1])"),
        ("mean_square(z1 - v, x0)", "mean_square(z1 + v, x0)"),
        ("+ 0.1 * mean_square(v, v_ema)", "+ mean_square(v, v_ema)"),
        ("- expand(t, z) * velocity(z, t.reshape(-1", "+ expand(t, z) * velocity(z, t.reshape(-1"),
        ("velocity(z, t.reshape(-1), head)[-1]", "velocity(z, t.reshape(-1), head)[0]"),
        ("steps_for(solver, nfe, ends_in_zero=True)", "steps_for(solver, nfe, ends_in_zero=False)"),
        ("sigma_grid(grid, steps_for(solver, nfe))", 'sigma_grid("edm", steps_for(solver, nfe))'),
        ("dict(solver=solver, order=order,", "dict("),
        ("dict(solver=solver, order=order,", "dict(solver=solver,"),
        ("order=order, grid=grid, head", "order=order, head"),
        ('config.head if name == "cud" else 1', "config.head"),
        ("self.head = self.head or self.heads", "self.head = self.head or 1"),
        ("zs[m] + (16 - m) *", "zs[m] + (15 - m) *"),
        ("for m in (8, 11, 14)]", "for m in (8, 11, 15)]"),
        (
            "        optimizer.step()\n        ema_update(ema, net, ema_decay(i))\n        #",
            "        ema_update(ema, net, ema_decay(i))\n        #",
        ),
        ("min(0.9999, (1 + i) / (10 + i))", "0"),
        ("min(1, (i + 1) / max(1, config.warmup))", "min(1, i / max(1, config.warmup))"),
        ("run.resume(trained=trained, emas=emas,", "run.resume(trained=trained,"),
        ("    stream.position = 0\n", ""),
        ("    torch.manual_seed(run.config.seed + 1)\n", ""),
        ("    optimizer.state.clear()\n", ""),
        ("    optimizer.zero_grad()\n", ""),
        ("optimizer, cud, net, ema)", "optimizer, cud, net)"),
        ("optimizer, cud, net, ema)", "optimizer, net, net, ema)"),
        ("+ config.kl_weight * kl", "+ kl"),
        ("w = 2 * i / iterations if", "w = 2 - 2 * i / iterations if"),
        ("and i == config.steps - 1:", "and i == config.steps:"),
        ("m = i // config.distill_steps  #", "m = i % 3  #"),
        ("+ 10**9 * (config.seed + 1)  #", "  #"),
        (".heads - 1 + 3 * (2 - config.independent)", ".heads - 1 + 2 * (2 - config.independent)"),
        ("run.rand(n) / config.tn", "1 / config.tn + run.rand(n) * 0"),
        ("trained[0]) for name in names}).eval()", "trained[0]) for name in names})"),
    ],
    ("distributional.py", "test_distributional"): [
        ("            disc.heads.eval()\n", ""),
        ("        disc.heads.train()\n", ""),
        ("return sum(F.softplus(-logits).mean() for ", "return sum(F.softplus(logits).mean() for "),
        ("return loss + sum(F.softplus(logits)", "return loss + sum(F.softplus(-logits)"),
        ("return gamma / 2 * gradient.square()", "return gamma * gradient.square()"),
        ("x0, create_graph=True)", "x0)"),
        ("_(block|up|down|in)", "_(block|in)"),
        ("mixed.insert(0, x)", "mixed.append(x)"),
        ("return logits[torch.arange(len(x), device=x.device), labels]", "return logits[:, 0]"),
        (", device, 2, config.data_dir, steps)]", ", device, 2, config.data_dir, steps).train()]"),
        (" noise, labels: generator(sigma_max * noise,", " noise, labels: generator(noise,"),
        ("        optimizer_g.step()\n", ""),
        ("labels)\n        optimizer_d.step()\n", "labels)\n"),
        ("=False)\n            optimizer_d.step()\n", "=False)\n"),
        ("(0.0, 0.99**c)", "(0.0, 0.99)"),
        ("config.lr_d * c,", "config.lr_d,"),
        ("if config.r1_gamma and step and step %", "if config.r1_gamma and step %"),
        ("gamma=config.r1_gamma * config.r1_every", "gamma=config.r1_gamma"),
        ("seen = step * config.batch_size", "seen = step"),
        ("        optimizer_d=optimizer_d, stream=stream,\n", "        stream=stream,\n"),
        ("(disc(sample(noise, labels), labels))", "(disc(sample(noise, labels), labels * 0))"),
        ("    return ema\n", "    return generator\n"),
        ("loss_d, x0, noise_d, labels)", "loss_d, x0, noise_g, labels)"),
        ("fake = sample(noise, labels)", "fake = sample(noise, labels.flip(0))"),
        ('run.loss["R1"] = gradients(', 'run.loss["generator"] = 0 * gradients('),
        ('sigma_grid("cosine", nfe,', 'sigma_grid("edm", nfe,'),
        ("config.dataset, nfe, sigma_max", "config.dataset, nfe + 1, sigma_max"),
        ("self.scale[i], padding=1)", "self.scale[-1], padding=1)"),
        ("r1_gamma=1e-4 / 16,", "r1_gamma=1e-4,"),
        ("x0, labels, mixed_precision=False)", "x0, labels)"),
        ("(disc(x0, labels), disc(fake, labels))", "(disc(fake, labels), disc(x0, labels))"),
        (" / (config.r1_every + bool(config.r1_gamma))", " / (config.r1_every + 2)"),
        ("sample = one_step(generator, config.sigma_max)", "sample = one_step(generator, 80.0)"),
    ],
}
MUTANTS = [
    (file, tests, good, bad) for (file, tests), faults in FAULTS.items() for good, bad in faults
]
# Only whether a test fails counts: without what pytest does for a good report, half of the time.
PYTEST = [
    "-x", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "xdist.plugin", "-n", "0",
    "--assert=plain",
]
# One process imports what takes long, and forks for every fault; on Windows each starts anew.
PROCESSES = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
PROCESSES.set_forkserver_preload([
    "torch", "pytest", "matplotlib.figure", "diffusers.models.unets.unet_2d",
    "diffusers.schedulers.scheduling_ddim", "diffusers.pipelines.ddpm.pipeline_ddpm",
])


def run_tests(copy, tests):
    """In a process of its own: the tests of the repository in `copy`, to copy/output.txt."""
    os.chdir(copy)
    elsewhere = [place for place in sys.path if not Path(place or copy).is_relative_to(ROOT)]
    sys.path[:] = [str(copy), *elsewhere]
    os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(pytest.main([*PYTEST, f"tests/{tests}.py"]))


def survives(mutant):
    """Plant `mutant` in a copy; True if its tests still pass there."""
    file, tests, good, bad = mutant
    left_out = (".git", "runs", "*.egg-info", "__pycache__", ".venv")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fewstep"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*left_out))
        source = (copy / file).read_text()
        count = source.count(good)
        assert count == 1, f"{file}: {good!r} stands there {count} times, not once"
        (copy / file).write_text(source.replace(good, bad))
        process = PROCESSES.Process(target=run_tests, args=(copy, tests))
        process.start()
        process.join()
        # Anything else is not a test that failed.
        assert process.exitcode in (0, 1), (copy / "output.txt").read_text()
        return process.exitcode == 0


def name_of(mutant):
    file, _, good, bad = mutant
    return f"{Path(file).stem}: {bad.strip()[:50] or 'deleted ' + good.strip()}"


def test_every_fault_can_be_planted():
    for file, _, good, bad in MUTANTS:
        assert (ROOT / file).read_text().count(good) == 1 and good != bad, f"{file}: {good!r}"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=name_of)
def test_mutant_is_killed(mutant):
    assert not survives(mutant)


if __name__ == "__main__":
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        alive = 0
        for mutant, survived in zip(MUTANTS, pool.map(survives, MUTANTS)):
            file, _, good, bad = mutant
            alive += survived
            verdict = "SURVIVED" if survived else "killed"
            change = f"{good.strip()[:55]}  ->  {bad.strip()[:55] or '(deleted)'}"
            print(f"{verdict:9s} {file:30s} {change}", flush=True)
    print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} killed")
    sys.exit(alive > 0)
