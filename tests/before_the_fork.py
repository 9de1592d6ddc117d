"""What forked commands find done: imports, and what the first command of a process works out.

Only the process imports this from which commands are forked, once. It computes nothing with torch,
whose threads would not survive the fork.
"""

import gc
import importlib
import logging
import pkgutil

from PIL import Image
from typer.testing import CliRunner

import flowtrain
from flowtrain.cli.main import app

LIBRARIES = [
    *["torch._dynamo", "torch.utils.flop_counter", "torch.utils.tensorboard"],
    *["torchvision.utils", "torchvision.datasets", "sklearn.datasets", "safetensors.torch"],
    *["pydantic", "pytest", "rich.progress", "rich.table", "rich._emoji_codes", "jinja2"],
]
OPTIONAL = "flowtrain.tools.explore"  # a package without which flowtrain works, and a test hides

for name in LIBRARIES:
    importlib.import_module(name)
for info in pkgutil.walk_packages(flowtrain.__path__, "flowtrain."):
    if not info.name.endswith("__main__") and not info.name.startswith(OPTIONAL):
        importlib.import_module(info.name)
Image.init()  # the plugins of all formats
CliRunner().invoke(app, ["train", "--set", "model.stepz=3"])  # the schemas of all components
logging.getLogger("flowtrain").handlers.clear()  # its handler has a stream that is closed by now
gc.collect()
gc.freeze()  # otherwise each command copies the memory of what it collects
