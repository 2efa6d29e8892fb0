"""`python -m e88` is the `e88` command."""

from e88.cli import main

if __name__ == "__main__":
    main()
