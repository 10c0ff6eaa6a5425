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
        ("self.position += self.world * self.batch_size", "self.position += self.batch_size"),
    ],
    ("common/fid.py", "test_fid"): [
        ("- 2 * cross)", "- cross)"),
        ("delta.outer(delta) * (self.n * batch / (self.n + batch))", "delta.outer(delta) * (batch / (self.n + batch))"),
        ("self.scatter / (self.n - 1)", "self.scatter / self.n"),
        ("count_include_pad=False", "count_include_pad=True"),
    ],
    ("common/training.py", "test_training"): [
        ("list(net.parameters()), 1 - decay)", "list(net.parameters()), decay)"),
        ("torch.Generator().manual_seed(int(seed))", "torch.Generator().manual_seed(int(seeds[0]))"),
        ("os.replace(part, path)", "path.write_bytes(part.read_bytes())"),
        ("weights_only=True", "weights_only=False"),
        ('torch.set_rng_state(self.restored["rng"]["cpu"])', "pass"),
    ],
    ("common/teacher.py", "test_teacher"): [
        ("(s**2 + denoiser.sigma_data**2) / (s", "(s + denoiser.sigma_data) / (s"),
        ("        optimizer.step()\n", ""),
        ('"optimizer": optimizer, "stream": stream}', '"optimizer": optimizer}'),
        ("        ema_update(ema,", "        ema_update(denoiser,"),
    ],
    ("ld3.py", "test_ld3"): [
        ("q = self.theta1.softmax(0).cumsum(0)", "q = self.theta1.softmax(0).flip(0).cumsum(0)"),
        ("told = levels + self.theta2", "told = levels - self.theta2"),
        ("levels.detach().diff()", "self.theta1.detach().diff()"),
        ("(loss_of(moved, batch) < loss)", "(loss_of(moved, batch) > loss)"),
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
        ("                dist.all_reduce(sums)\n", "                pass\n"),
        ("            done = target\n", ""),
        ("x / (1 + sigma**2) ** 0.5", "x"),
        ('"slopes": slopes, "output": slope}', '"slopes": slopes, "output": state["output"] if stage.second else slope}'),
        ("torch.allclose(grids[key], levels, rtol=1e-9, atol=0)", "True"),
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
