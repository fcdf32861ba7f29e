"""Runs the command line as `python -m saro`, for when the console script is not on the path."""

from saro.cli import main

if __name__ == "__main__":
    main()
