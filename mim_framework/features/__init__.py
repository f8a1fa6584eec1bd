"""What an encoder of any origin makes of images, in Python and in files. Start at `subjects.open_encoder`."""
