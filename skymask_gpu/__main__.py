"""``python -m skymask_gpu``, and what the script ``skymask-gpu`` calls."""

import signal


def main() -> None:
    """Import the command line and run it; Ctrl-C during the import, with torch half loaded, ends the process at once."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from skymask_gpu import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
