"""For `torchrun`: commands of `deepeq` in turn, so that the processes start once for all of them.

The argument is a list in JSON of triples: a port that is free, the words of a command, and either null or three paths:
a folder, the name of a copy of it to make first, and what to delete from that copy.
"""

import json
import os
import shutil
import sys

from deepeq.cli import main

for port, command, copied in json.loads(sys.argv[1]):
    if copied and os.environ["RANK"] == "0":
        source, target, dropped = copied
        shutil.copytree(source, target)
        shutil.rmtree(dropped)
    # The meeting place that `torchrun` set up serves one group of processes, and each command makes its own.
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    if code := main(command):
        sys.exit(code)
