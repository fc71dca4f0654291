"""`python -m gspmd` is `gspmd`."""

from gspmd.cli import main

if __name__ == "__main__":
    main()
