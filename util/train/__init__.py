"""What every training run does: steps, schedule, checkpoints, records, processes."""
