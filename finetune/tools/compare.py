"""The former name of `python -m tools.compare`."""

from runpy import run_module

if __name__ == "__main__":
    run_module("tools.compare", run_name="__main__", alter_sys=True)
