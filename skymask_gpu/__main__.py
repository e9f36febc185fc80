"""The entry point of ``python -m skymask_gpu`` and of the script ``skymask-gpu``."""

import signal


def main() -> None:
    """Import the command line and run it.

    Ctrl-C during the import ends the process at once. Otherwise, with torch half loaded, Python
    would print a long traceback.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from skymask_gpu import cli

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
