"""What is identical in all six papers: denoiser, solvers, U-Net, data, FID, teachers, runs."""
