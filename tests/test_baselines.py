"""common/baselines.py: the row "best without training" is what its name says."""
import json

import pytest
import torch

import common.baselines as baselines
from common.baselines import best_untrained, solver_name, untrained_sampler
from common.datasets import ASSETS
from common.diffusion import GRIDS, GaussianMixture, noise_from_seeds, sigma_grid
from common.solvers import ORDERS, SOLVERS, steps_for

TABLE = json.loads((ASSETS / "untrained.json").read_text())


class Recorder(GaussianMixture):
    """An exact denoiser that writes down the noise levels and labels it is called with."""

    def __init__(self):
        super().__init__(torch.eye(4).view(4, 1, 2, 2), 0.3)
        self.levels, self.labels = [], []

    def forward(self, x, sigma, labels=None):
        self.levels.append(float(sigma))
        self.labels.append(labels)
        return super().forward(x, sigma)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_row_is_the_sampler_that_it_names(solver, grid, monkeypatch):
    noise, labels = noise_from_seeds(range(3), (1, 2, 2)), torch.tensor([2, 0, 1])
    for order in ORDERS[solver]:
        row = {"solver": solver, "order": order, "grid": grid}
        monkeypatch.setattr(baselines, "_measured", lambda row=row: {"digits": {"4": row}})
        teacher = Recorder()
        name, sampler = untrained_sampler(teacher, "digits", 4, 0.01, 40.0)
        got, levels = sampler(noise, labels), teacher.levels
        assert name == f"untrained ({solver_name(solver, order)}, {grid})"
        assert len(levels) == 4 and levels[0] == 40.0
        assert all(used is labels for used in teacher.labels)
        sigmas = sigma_grid(grid, steps_for(solver, 4), 0.01, 40.0)
        plain = Recorder()
        expected = SOLVERS[solver](plain, 40.0 * noise, sigmas, order=order)
        assert torch.equal(got, expected) and levels == plain.levels


def test_names():
    assert solver_name("unipc", 3) == "unipc3" and solver_name("heun", 2) == "heun"
    assert solver_name("dpm2", 2) == "dpm2" and solver_name("euler", 1) == "euler"


def test_a_set_that_was_not_measured_says_so(capsys):
    baselines._say.cache_clear()
    assert best_untrained("folder", 4) == ("unipc", 3, "cosine")
    for _ in range(2):
        name, sampler = untrained_sampler(Recorder(), "folder", 4)
    assert name == "untrained (unipc3, cosine)"
    assert sampler(noise_from_seeds(range(2), (1, 2, 2)), None).shape == (2, 1, 2, 2)
    assert capsys.readouterr().out.count("not measured on folder with 4 evaluations") == 1


def test_every_measured_choice_can_be_made():
    for dataset, counts in TABLE.items():
        for nfe, row in counts.items():
            assert best_untrained(dataset, int(nfe)) == (row["solver"], row["order"], row["grid"])
            teacher = Recorder()
            noise = noise_from_seeds(range(2), (1, 2, 2))
            untrained_sampler(teacher, dataset, int(nfe))[1](noise, None)
            assert len(teacher.levels) == int(nfe)
