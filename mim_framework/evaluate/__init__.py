"""What a model is worth: features of its encoder, and pictures of its reconstructions."""
