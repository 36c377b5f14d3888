"""``python -m deeprelax_cuda`` is the `deeprelax` command."""

import sys

from deeprelax_cuda.cli import main

sys.exit(main())
