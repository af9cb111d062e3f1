"""The networks that people name on the command line: `module:name` or `my_net.py:Net`, with arguments if need be."""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from scripting import UserError, in_short
from universal.reading.refusals import place_of

MODEL_HELP = (
    "what builds it: module:name or my_net.py:Net, with literal arguments if it needs some, as in Net(10, bias=False)"
)


def load_builder(text: str) -> Callable[[], nn.Module]:
    """What builds the network that `text`, of --model, names. Raises UserError as `load_callable` does, and for a
    network in the place of what builds one."""
    build = load_callable(text, "--model")
    if isinstance(build.func, nn.Module):
        raise UserError(f"--model {text}: is a network and not what builds one: name its class or a function")
    return partial(build_network, build, text)


def load_callable(text: str, option: str) -> partial:
    """The function or class that `text` names, with the arguments that it may give: literals, never evaluated.

    Raises UserError, with the line of the user's file that is to blame, if there is none.
    """
    match = re.fullmatch(r"(?P<place>.+):(?P<name>[^\W\d]\w*)(?P<arguments>\(.*\))?", text.strip(), re.DOTALL)
    if not match:
        raise UserError(f"{option} {text}: give module:name or file.py:name, such as target_cnn:TargetCNN")
    place, name = match["place"], match["name"]
    args, kwargs = literal_arguments(match["arguments"] or "()", f"{option} {text}")
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"{option} {text}: {place} is no file: give the path of a Python file")
    try:
        module = module_at(place)
    except Exception as error:  # a person's own file may raise anything
        reason = f"{in_short(error)}{place_of(error)}"
        raise UserError(f"{option} {text}: {place} cannot be imported ({reason}): correct it first") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{option} {text}: {place} has no callable {name}: name a class or function of it")
    return partial(getattr(module, name), *args, **kwargs)


def module_at(place: str):
    """The module of this name, or in this file, beside which what it imports may lie."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(place).resolve().parent))
    spec.loader.exec_module(module)
    return module


def literal_arguments(arguments: str, option: str) -> tuple[list, dict]:
    """The values of "(1, name='two')". Raises UserError unless all of them are literals."""
    try:
        call = ast.parse(f"_{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not a call")
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if None in named:
            raise ValueError("**")
        return [ast.literal_eval(value) for value in call.args], named
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(
            f"{option}: {arguments} are not literals: give numbers, strings and lists, as in (10, bias=False)"
        ) from error


def build_network(build: Callable[[], nn.Module], text: str) -> nn.Module:
    """What `build` returns. Raises UserError if that is not a module."""
    try:
        network = build()
    except Exception as error:  # likewise
        raise UserError(f"--model {text}: cannot be built ({in_short(error)}{place_of(error)})") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--model {text}: gives a {type(network).__name__}, not a torch.nn.Module")
    return network
