"""Convert a model folder that version 0.1 exported: python pretrained/convert_0_1.py FOLDER RECIPE.

The recipe is that of the run, with the names of this version. Parameters get other names and keep their values.
"""

import json
import sys
from pathlib import Path

from safetensors import safe_open

from deepeq.files import write_atomically, write_tensors
from deepeq.train import load_config
from deepeq.train.pretrained import CONFIG, FORMAT, WEIGHTS
from deepeq.train.recipe import to_plain


def convert(folder: Path, recipe: Path) -> None:
    """Rewrite the configuration and the weights of a folder in place."""
    old, config = json.loads((folder / CONFIG).read_text()), load_config(recipe)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = {name: name.replace("network.core.cell.", "network.cell.") for name in file.keys()}  # noqa: SIM118
        tensors = {new: file.get_tensor(name).clone() for name, new in names.items()}
    content = {"format": FORMAT, "vocab_size": old["vocab_size"], "unit": old["level"]} | to_plain(config)
    del content["run"]
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt", "facts": "{}"})
    write_atomically(folder / CONFIG, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
