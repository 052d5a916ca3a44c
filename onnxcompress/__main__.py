"""``python -m onnxcompress``."""

from onnxcompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
