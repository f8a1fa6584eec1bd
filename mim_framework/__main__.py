"""`python -m mim_framework` is the command `mim`."""

from mim_framework.commands.cli import main

if __name__ == "__main__":
    main(prog_name="mim")
