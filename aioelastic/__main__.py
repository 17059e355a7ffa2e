"""`python -m aioelastic` is `aioelastic`."""

from .cli import program

if __name__ == "__main__":
    program()
