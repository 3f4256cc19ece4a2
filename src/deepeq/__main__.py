"""`python -m deepeq`, the same as the command `deepeq`; what `torchrun -m deepeq` starts."""

import sys

from deepeq.command import main

if __name__ == "__main__":
    sys.exit(main())
