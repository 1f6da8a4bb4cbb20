"""`python -m qtune`."""

if __name__ == "__main__":
    import sys

    from qtune.cli import main

    sys.exit(main())
