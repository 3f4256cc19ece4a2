"""`python -m deepeq`, the same as the command `deepeq`; what `torchrun -m deepeq` starts."""

import sys

from deepeq.cli import main

sys.exit(main())
