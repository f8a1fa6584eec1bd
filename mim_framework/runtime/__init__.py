"""What runs share, each with its section of the recipe: ranks, optimizers, teachers, the forward of a step, metrics."""
