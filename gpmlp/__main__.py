"""`python -m gpmlp` is the command `gpmlp`, from its first moment on: imports take seconds and may be interrupted as well."""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from gpmlp.cli import main as command

        return command.main()
    except KeyboardInterrupt:
        print("error: interrupted before anything was done.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
