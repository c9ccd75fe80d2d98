"""Numbers out of range, strings instead of objects, functions that take something else."""

from __future__ import annotations

import torch

import eke
from eke.compression import Recovery, cross_entropy
from eke.structures import UniformGrid

from .row import Row, batches, compress, net


def fails(structure, weight, metric):
    raise KeyError("metric")


def lone_samples():
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 3)).eval()
    return compress(model, recovery=Recovery(steps=2, batch_size=1))


def survey():
    found = eke.survey(net(), batches(), loss=cross_entropy, seconds=0.02)
    return list(found.options(only="conv"))


STRUCTURES = "A structure is an object that says which matrices are allowed."
SOLVER = "A solver finds a member of a structure near a matrix."
RECOVERY = "`eke.compression.Recovery(steps=...)`."

ROWS = [
    Row(
        "0 threads",
        lambda _: compress(threads=0),
        ValueError,
        "threads must be a whole number from 1 up, got 0.",
        "torch needs one.",
        "None keeps torch's number.",
    ),
    Row(
        "threads as text",
        lambda _: compress(threads="4"),
        ValueError,
        "threads must be a whole number from 1 up, got '4'.",
        "It is no number.",
        "`threads=4`.",
    ),
    Row(
        "negative seconds",
        lambda _: compress(seconds=-1),
        ValueError,
        "seconds must be a positive number of seconds, such as 3, got -1.",
        "Clocks need time.",
        "3 is the default.",
    ),
    Row(
        "a negative seed",
        lambda _: compress(seed=-1),
        ValueError,
        "seed must be a whole number from 0 up, got -1.",
        "Runs are repeatable by their seed.",
        "0 is the default.",
    ),
    Row(
        "no seed",
        lambda _: compress(seed=None),
        ValueError,
        "seed must be a whole number from 0 up, got None.",
        "Runs are repeatable by their seed.",
        "0 is the default.",
    ),
    Row(
        "names to skip that do not exist",
        lambda _: compress(skip=["layer9"]),
        ValueError,
        "There is no module or site 'layer9' in this model. Allowed: 0, 1, 2.",
        "A misspelt name would be compressed.",
        "`eke inspect` lists the names.",
    ),
    Row(
        "one name to skip",
        lambda _: compress(skip="head"),
        TypeError,
        "skip must be a list of names, got 'head': write skip=['head'].",
        "Text would be read letter by letter.",
        "`skip=['head']`.",
    ),
    Row(
        "modules to skip",
        lambda _: compress(skip=[net()[0]]),
        TypeError,
        "skip takes names of modules or sites as in model.named_modules(), got Linear.",
        "eke works on copies.",
        "Pass their names.",
    ),
    Row(
        "everything skipped",
        lambda _: compress(skip=["0", "2"]),
        ValueError,
        "There is nothing to compress: 0 channel groups and 0 matrices of Sequential with 0 sites can be changed "
        "(skip=['0', '2']).",
        "Nothing is left.",
        "Skip less.",
    ),
    Row(
        "the class of a structure",
        lambda _: compress(structures=[UniformGrid]),
        TypeError,
        "structures must have project, bits, check and exactness, got <class '...UniformGrid'> of type: write for "
        "example "
        "UniformGrid(...), an instance.",
        STRUCTURES,
        "`UniformGrid(8)`.",
    ),
    Row(
        "one structure",
        lambda _: compress(structures=UniformGrid(4)),
        TypeError,
        "structures must be a list, got UniformGrid(bits=4): write structures=[UniformGrid(bits=4)].",
        STRUCTURES,
        "Put it into a list.",
    ),
    Row(
        "a structure's name",
        lambda _: compress(structures="int8"),
        TypeError,
        "structures must be a list of structures, got 'int8': write for example "
        "structures=[eke.structures.UniformGrid(8)].",
        STRUCTURES,
        "`[eke.structures.UniformGrid(8)]`.",
    ),
    Row(
        "names of structures",
        lambda _: compress(structures=["int8"]),
        TypeError,
        "structures must have project, bits, check and exactness, got 'int8' of str: write for example UniformGrid(8).",
        STRUCTURES,
        "`[eke.structures.UniformGrid(8)]`.",
    ),
    Row(
        "a solver's name",
        lambda _: compress(solver="admm"),
        TypeError,
        "solver must be a function, called as solver(structure, weight, metric), got 'admm'.",
        SOLVER,
        "Pass the function, or None.",
    ),
    Row(
        "a solver with other arguments",
        lambda _: compress(solver=lambda structure, weight: weight),
        TypeError,
        "solver is called as solver(structure, weight, metric), but what was given takes (structure, weight)",
        SOLVER,
        "Take all three.",
    ),
    Row(
        "a solver that returns nothing",
        lambda _: compress(solver=lambda structure, weight, metric: None),
        TypeError,
        "The solver returned NoneType for UniformGrid(bits=8), where a member of it is needed, a tensor (64, 8): "
        "return "
        "structure.project(weight) where nothing better is found.",
        SOLVER,
        "`return structure.project(weight)`.",
    ),
    Row(
        "a solver that returns another shape",
        lambda _: compress(solver=lambda structure, weight, metric: weight[:1]),
        ValueError,
        "The solver returned (1, 8) with 0 values that are not finite for UniformGrid(bits=8) at '0', a matrix "
        "(64, 8).",
        SOLVER,
        "Return a matrix of the weight's shape.",
    ),
    Row(
        "a solver that raises",
        lambda _: compress(solver=fails),
        ValueError,
        "The solver raised KeyError: ...'metric', for UniformGrid(bits=8) and a matrix (64, 8)",
        "The error came from your solver.",
        "The traceback above the message has its line.",
    ),
    Row(
        "a number as the recovery",
        lambda _: compress(recovery=100),
        TypeError,
        "recovery must be an eke.compression.Recovery or None, got 100: Recovery(steps=100).",
        "It has several numbers.",
        RECOVERY,
    ),
    Row(
        "half a step",
        lambda _: Recovery(steps=2.5),
        TypeError,
        "Recovery.steps must be a whole number, got 2.5.",
        "Steps are counted.",
        RECOVERY,
    ),
    Row(
        "fewer than 0 steps",
        lambda _: Recovery(steps=-1),
        ValueError,
        "Recovery needs steps >= 0, batch_size >= 1, learning_rate > 0 and weight_decay >= 0, got Recovery(steps=-1",
        "Steps are counted.",
        RECOVERY,
    ),
    Row(
        "a learning rate too large",
        lambda _: compress(recovery=Recovery(steps=6, learning_rate=1e30)),
        FloatingPointError,
        "The loss became nan at step 1 of 6: lower the learning rate.",
        "Training diverged.",
        "3e-3 is the default.",
    ),
    Row(
        "a match that is no tensor",
        lambda _: compress(recovery=Recovery(steps=2, match=lambda ours, theirs: 1.0)),
        TypeError,
        "Recovery.match(student, teacher) must return a scalar tensor with a gradient, got float.",
        "Recovery minimises it.",
        "Return a tensor computed from the student's outputs.",
    ),
    Row(
        "batches of one for batch normalisation",
        lambda _: lone_samples(),
        ValueError,
        "Step 0 of the recovery failed on (float32 (1, 8), int64 (1,)), Expected more than 1 value per channel when "
        "training, ...: batch normalisation needs several samples: raise Recovery(batch_size=), or set drop_last=True.",
        "One sample has no variance.",
        "`Recovery(batch_size=64)`; for batches of several sizes `drop_last=True`.",
    ),
    Row(
        "an example that does not fit",
        lambda _: compress(example=torch.ones(2, 5)),
        ValueError,
        "The model does not run on example, (float32 (2, 5)): ... Give example=, what the model is called with: a "
        "tensor, a "
        "tuple of positional or a dictionary of keyword arguments.",
        "Costs are measured on it.",
        "Leave it out: the first batch is taken.",
    ),
    Row(
        "a batch as the example",
        lambda _: compress(example=batches()[0]),
        ValueError,
        "The model does not run on example, (float32 (32, 8), int64 (32,))",
        "It is what the model is called with, without targets.",
        "`example=inputs`.",
    ),
    Row(
        "True as progress",
        lambda _: compress(progress=True),
        TypeError,
        "progress must be a function, called as progress(stage, share, text), got True.",
        "It is called as the run advances.",
        "`progress=lambda stage, share, text: print(text)`.",
    ),
    Row(
        "a path as the recipe",
        lambda _: compress(recipe="recipe.yaml"),
        TypeError,
        "recipe must be a dictionary of plain values, kept with the result, got 'recipe.yaml'.",
        "In Python, a recipe is what you want to keep.",
        "`yaml.safe_load(text)`, or `eke compress --recipe`.",
    ),
    Row(
        "objects in the recipe",
        lambda _: compress(recipe={"net": net()}),
        TypeError,
        "recipe must hold plain values (text, numbers, lists, dictionaries)",
        "It is written as YAML.",
        "Write their names.",
    ),
    Row(
        "a name in a survey that does not exist",
        lambda _: survey(),
        ValueError,
        "No decision's name contains 'conv'; there are ['channels:0', 'matrix:0', 'matrix:2'].",
        "Nothing would be shown.",
        "Take a part of a name in the message.",
    ),
    Row(
        "a misspelt name of eke",
        lambda _: eke.Bugdet,
        AttributeError,
        "module 'eke' has no attribute 'Bugdet'. Did you mean 'Budget'?",
        "There is no such name.",
        "`dir(eke)`.",
    ),
]
