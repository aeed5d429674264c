"""The `rwft` command straight from a clone: `accelerate launch cli.py train configs/awr.yaml`."""

from rwft.cli import main

if __name__ == "__main__":
    main()
