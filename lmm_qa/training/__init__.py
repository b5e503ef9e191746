"""Fine-tune a rater on opinion scores: data, losses, the training run, export."""
