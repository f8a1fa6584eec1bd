"""The training loop. Start at `trainer.Trainer.train_step`."""
