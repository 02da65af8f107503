"""``python main.py …`` is the ``tandem`` command of a source tree."""

from hosting.cli import main

if __name__ == "__main__":
    main()
