"""What a training run will take, foreseen without weights, data or accelerator."""
