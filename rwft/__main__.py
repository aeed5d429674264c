"""`python -m rwft`: the same as `rwft`."""

from rwft.cli import main

if __name__ == "__main__":
    main()
