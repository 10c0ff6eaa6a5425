"""Options, runs, ranks, files, plots: nothing here says anything about diffusion."""
