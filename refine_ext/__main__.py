"""`python -m refine_ext` is the command `refine-ext`."""

from .cli import main

if __name__ == "__main__":
    main()
