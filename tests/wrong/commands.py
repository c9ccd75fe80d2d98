"""Commands that cannot be meant, and files that do not hold what the command says."""

from __future__ import annotations

from .row import Command

MODEL = """
import torch
from torch import nn

weights = 3


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).eval()


def needs(width):
    return nn.Linear(width, 2)


def pair():
    return build(), 3


def nothing():
    build()


def crashes():
    return torch.load("weights.pt", weights_only=True)
"""

DATA = """
import eke
import torch


def part(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(96, 8, generator=generator), torch.randint(3, (96,), generator=generator)
    return list(zip(x.split(32), y.split(32)))


def splits():
    return {"calibration": part(1), "selection": part(2), "report": part(3)}


def task():
    return eke.Task(**splits())


def loader():
    return part(1)


def two():
    return {"calibration": part(1), "report": part(3)}


def my_loss(model, batch):
    return model(batch["pixels"])


def spoiled():
    return eke.Task(**splits(), loss=my_loss)


def narrow():
    return {**splits(), "calibration": [(x[:, :3], y) for x, y in part(1)]}
"""

FILES = {
    "wrong_model.py": MODEL,
    "wrong_data.py": DATA,
    "syntax.py": "def build(:\n    pass\n",
    "imports.py": "import a_package_that_is_not_there\n\n\ndef build():\n    pass\n",
    "model.pt": "weights",
    "broken.yaml": "budget: [\n",
    "odd.yaml": "budgett: {size: 0.5x}\n",
    "in_use/holiday.jpg": "mine",
}

SOURCE = "wrong_model.py:build --data wrong_data.py:task"
HALF = "--size 0.5x"
WRITE = "`FILE.py:FUNCTION`: a Python file, a colon, and a function in it that takes no arguments."
LIMIT = "A number and a unit, such as `0.5x`, `50%`, `3ms`, `400kB`."
RETURNS = "Such a function returns the network itself."
SPLITS = "The function returns an `eke.Task`, or a dictionary with calibration, selection and report."

ROWS = [
    Command(
        "compres", "No such command 'compres'. Did you mean 'compress'?", "It is misspelt.", "`eke --help` lists them."
    ),
    Command(
        "compress",
        "No model was given, got None: eke compress FILE.py:FUNCTION --data FILE.py:FUNCTION, or eke "
        "compress --task demo.",
        "There is no default model.",
        WRITE,
    ),
    Command(
        "compress wrong_model.py:build --size 0.5x",
        "No data were given for wrong_model.py:build, got None: add --data FILE.py:FUNCTION",
        "Statistics, planning and the report need data.",
        SPLITS,
    ),
    Command(
        f"compress {SOURCE}",
        "Nothing was limited, got the budget {}: give a limit, such as --max-drop 1% --latency 0.5x.",
        "Without a limit there is nothing to look for.",
        LIMIT,
    ),
    Command(
        "compress wrong_model.py --data wrong_data.py:task --size 0.5x",
        "Write FILE.py:FUNCTION, such as my_model.py:build, ... got 'wrong_model.py'.",
        "A file may hold several models.",
        WRITE,
    ),
    Command(
        "compress model.pt --data wrong_data.py:task --size 0.5x",
        "Write FILE.py:FUNCTION, such as my_model.py:build, ... got 'model.pt'.",
        "A file of tensors does not say what the network computes.",
        "Write a function that builds the network and loads the tensors.",
    ),
    Command(
        "compress wrong_modle.py:build --data wrong_data.py:task --size 0.5x",
        "There is no file 'wrong_modle.py' (looked in ...). Did you mean 'wrong_model.py'?",
        "It is misspelt, or elsewhere.",
        "Check the path.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:biuld --data wrong_data.py:task --size 0.5x",
        "wrong_model.py has no function 'biuld'. Did you mean 'build'?",
        "It is misspelt.",
        WRITE,
    ),
    Command(
        "compress wrong_model.py:weights --data wrong_data.py:task --size 0.5x",
        "wrong_model.py has int, not a function, 'weights'.",
        "It is not a function.",
        WRITE,
    ),
    Command(
        "compress wrong_model.py:needs --data wrong_data.py:task --size 0.5x",
        "wrong_model.py:needs is called without arguments, but it needs some: missing a required argument: 'width'.",
        "The command cannot pass them.",
        "Write a function without arguments that calls it.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:pair --data wrong_data.py:task --size 0.5x",
        "wrong_model.py:pair must return a torch.nn.Module, got tuple.",
        RETURNS,
        "Return the module alone.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:nothing --data wrong_data.py:task --size 0.5x",
        "wrong_model.py:nothing must return a torch.nn.Module, got NoneType.",
        RETURNS,
        "It lacks its `return`.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:crashes --data wrong_data.py:task --size 0.5x",
        "FileNotFoundError: [Errno 2] No such file or directory: 'weights.pt'",
        "The error came from your file; its traceback is shown.",
        "Paths are relative to where the command is run.",
        code=1,
    ),
    Command(
        "compress syntax.py:build --data wrong_data.py:task --size 0.5x",
        "SyntaxError: invalid syntax",
        "The file is no valid Python.",
        "Run it with Python.",
        code=1,
    ),
    Command(
        "compress imports.py:build --data wrong_data.py:task --size 0.5x",
        "ModuleNotFoundError: No module named 'a_package_that_is_not_there'",
        "The file needs a package that is not installed here.",
        "Install it where eke is installed.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:build --data wrong_data.py:loader --size 0.5x",
        "wrong_data.py:loader must return an eke.Task or a dictionary with calibration, selection, report, got list.",
        "One loader is one split.",
        SPLITS,
        code=1,
    ),
    Command(
        "compress wrong_model.py:build --data wrong_data.py:two --size 0.5x",
        "wrong_data.py:two returned no selection: all of calibration, selection, report are needed.",
        "All three have their use.",
        SPLITS,
        code=1,
    ),
    Command(
        "compress wrong_model.py:build --data wrong_data.py:spoiled --size 0.5x",
        'loss(model, batch) raised TypeError: ... in wrong_data.py:... my_loss return model(batch["pixels"])',
        "The error came from your loss; its line is shown.",
        "Mend it there.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:build --data wrong_data.py:narrow --size 0.5x",
        "The model does not run on calibration batch 0, (float32 (32, 3), int64 (32,))",
        "What the loader yields goes into the model as it is.",
        "Compare the shape in the message with the first layer.",
        code=1,
    ),
    Command(
        "compress wrong_model.py:build --data numbers.csv --size 0.5x",
        "Write FILE.py:FUNCTION, such as my_model.py:build, ... got 'numbers.csv'.",
        "A file does not say what is input and what is target.",
        SPLITS,
    ),
    Command(
        f"compress {SOURCE} --size half",
        "budget.size could not be read: 'half'. Write for example '0.5x', '50%' or '400kB'.",
        "It is no number.",
        LIMIT,
    ),
    Command(
        f"compress {SOURCE} --size 0.5",
        "budget.size='0.5' has no unit and means less than one: for a share of what the model costs now write '0.5x'.",
        "Without a unit it is half a byte.",
        LIMIT,
    ),
    Command(
        f"compress {SOURCE} --latency 2x",
        "budget.latency='2x' allows more than the model costs now",
        "It is the time that may be taken, not the speed-up.",
        "Twice as fast is `0.5x`.",
    ),
    Command(
        f"compress {SOURCE} --latency 3",
        "budget.latency has no unit in '3'; allowed: 'x', '%', 's', 'ms', 'us'.",
        "Seconds or milliseconds?",
        LIMIT,
    ),
    Command(
        f"compress {SOURCE} --max-drop 5",
        "budget.max_drop must be below 100 %, got '5': one point is '1%' or 0.01.",
        "Without a unit it is a share.",
        "`--max-drop 5%`.",
    ),
    Command(f"compress {SOURCE} --sise 0.5x", "No such option: --sise", "It is misspelt.", "`eke compress --help`."),
    Command(
        f"compress {SOURCE} --steps many {HALF}", "Invalid value for '--steps'", "It is no number.", "`--steps 900`."
    ),
    Command(
        f"compress {SOURCE} --threads 0 {HALF}", "Invalid value for '--threads'", "torch needs one.", "Leave it out."
    ),
    Command(
        f"compress {SOURCE} --skip layer9 {HALF}",
        "There is no module or site 'layer9' in this model. Allowed: 0, 1, 2.",
        "A misspelt name would be compressed.",
        "`eke inspect` lists the names.",
        code=1,
    ),
    Command(
        f"compress {SOURCE} {HALF} --out model.pt",
        "--out model.pt is a file: give a folder.",
        "A result is a folder.",
        "Give a new path.",
    ),
    Command(
        f"compress {SOURCE} {HALF} --out in_use",
        "--out in_use holds files that are not eke's (holiday.jpg): give an empty or a new folder.",
        "eke does not write among your files.",
        "Give a new path.",
    ),
    Command(
        f"compress {SOURCE} {HALF} --out /proc/eke",
        "/proc/eke/.run cannot be made (No such file or directory): give the path of a folder where you may write.",
        "The system does not allow it.",
        "Give another path.",
        code=1,
    ),
    Command(
        f"compress {SOURCE} --set budget.sise=0.5x",
        "--set has an unknown key 'budget.sise'. Did you mean 'budget.size'?",
        "It is misspelt.",
        "Take the key in the message.",
    ),
    Command(
        f"compress {SOURCE} --set size",
        "--set needs KEY=VALUE, such as --set budget.latency=0.4x, got 'size'.",
        "It lacks its value.",
        "`--set budget.size=0.5x`.",
    ),
    Command(
        "compress --recipe none.yaml",
        "There is no recipe at none.yaml: give a YAML file, or the folder of a result.",
        "It is misspelt, or elsewhere.",
        "Check the path.",
        code=1,
    ),
    Command(
        "compress --recipe broken.yaml",
        "broken.yaml is not valid YAML",
        "It was edited or cut short.",
        "The message has the line.",
    ),
    Command(
        "compress --recipe odd.yaml",
        "odd.yaml has an unknown key 'budgett'. Did you mean 'budget'?",
        "It is misspelt.",
        "Take the key in the message.",
    ),
    Command(
        "compress --task cifar",
        "There is no ...task 'cifar'.",
        "eke brings only a few tasks.",
        "Take one in the message, or your own data.",
    ),
    Command(
        f"compress {SOURCE} --task demo",
        "--task demo brings its own model and data, got 'wrong_model.py:build' beside it: give one of them.",
        "They contradict each other.",
        "Leave one out.",
    ),
    Command(
        f"compress {SOURCE} {HALF} --nested",
        "--nested orders the plans of --front N, got --front None.",
        "There is one plan.",
        "Add `--front 4`.",
    ),
    Command(
        "verify nowhere",
        "nowhere is not an eke artifact: there is no such folder, and so no plan.json.",
        "It is misspelt, or elsewhere.",
        "Check the path.",
        code=1,
    ),
    Command(
        "verify in_use",
        "in_use is not an eke artifact: it has no plan.json.",
        "It is another folder.",
        "Give the folder that `--out` named.",
        code=1,
    ),
    Command(
        "gate wrong_model.py:build nowhere --data wrong_data.py:task",
        "There is no folder 'nowhere': give a result's folder or FILE.py:FUNCTION.",
        "It is misspelt, or elsewhere.",
        "Check the path.",
        code=1,
    ),
    Command(
        "gate wrong_model.py:build wrong_model.py:build",
        "gate needs data, and wrong_model.py:build and wrong_model.py:build name none: add --data FILE.py:FUNCTION.",
        "Only results name their data.",
        SPLITS,
    ),
    Command(
        "gate wrong_model.py:build wrong_model.py:build --data wrong_data.py:task",
        "96 samples cannot prove a drop of at "
        "most 0.5 points with 95 % confidence, even if the models never differ: at least 765 are needed.",
        "Few samples cannot show a small drop.",
        "More samples, or a larger `--max-drop`.",
        code=1,
    ),
    Command(
        "gate wrong_model.py:build wrong_model.py:build --data wrong_data.py:task --max-drop lots",
        "--max-drop could not be read: 'lots'. Write for example '1%' or 0.01.",
        "It is no number.",
        "`--max-drop 1%`.",
    ),
    Command(
        "inspect wrong_model.py:build",
        "inspect needs what wrong_model.py:build is called with: --data FILE.py:FUNCTION or --input 1,3,224,224.",
        "Shapes and times depend on the inputs.",
        "Give data, or the shape of an input.",
    ),
    Command(
        "inspect wrong_model.py:build --input 2,5",
        "The model does not run on what it is called with, (float32 (2, 5)): ... Give data, or --input shapes, such as "
        "1,3,224,224.",
        "The shape does not fit the first layer.",
        "Compare the shape in the message with the first layer.",
        code=1,
    ),
    Command(
        "gate wrong_model.py:build wrong_model.py:build --data wrong_data.py:narrow --max-drop 50%",
        "The model does not run on calibration batch 0 (wrong_model.py:build), (float32 (32, 3), int64 (32,))",
        "What the loader yields goes into the model as it is.",
        "Compare the shape in the message with the first layer.",
        code=1,
    ),
    Command(
        "inspect wrong_model.py:build --input wide",
        "--input needs a shape such as 1,3,224,224",
        "It is no shape.",
        "Whole numbers with commas.",
    ),
    Command(
        "why wrong_model.py:build",
        "why needs the data of wrong_model.py:build: --data FILE.py:FUNCTION.",
        "Losses are predicted on data.",
        SPLITS,
    ),
    Command(
        "report in_use",
        "There is no report at in_use/report.json: give the folder of a result, or its report.json.",
        "It is another folder.",
        "Give the folder that `--out` named.",
    ),
]
