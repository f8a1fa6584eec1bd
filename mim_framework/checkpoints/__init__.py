"""What survives a crash: checkpoints that are whole or not there, and what a resume needs of them."""
